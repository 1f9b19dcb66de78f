"""Llama 3.2 and 4, ToolACE: a list of calls as in Python."""

from ..format import AnswerFormat, PythonCalls

FORMAT = AnswerFormat(
    name="pythonic",
    parser_names=("pythonic", "llama4_pythonic", "llama4"),
    calls=PythonCalls(begin="<|python_start|>", end="<|python_end|>"),
    signs=("<|python_start|>",),
)
