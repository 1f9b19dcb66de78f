"""FunctionGemma: `call:NAME{key:value}`, with strings between `<escape>` tokens."""

from ..format import AnswerFormat, BraceCalls

FORMAT = AnswerFormat(
    name="functiongemma",
    parser_names=("functiongemma", "gemma"),
    calls=BraceCalls(begin="<start_function_call>", end="<end_function_call>", quote="<escape>"),
    signs=("<start_function_call>",),
)
