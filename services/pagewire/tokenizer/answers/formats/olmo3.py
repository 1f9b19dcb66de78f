"""OLMo 3: calls as in Python, one a line, between `<function_calls>` tags."""

from ..format import AnswerFormat, PythonCalls

FORMAT = AnswerFormat(
    name="olmo3",
    parser_names=("olmo3",),
    calls=PythonCalls(begin="<function_calls>", end="</function_calls>", brackets=False),
    signs=("<function_calls>", "("),
)
