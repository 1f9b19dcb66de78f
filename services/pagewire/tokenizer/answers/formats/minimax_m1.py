"""MiniMax M1: JSON calls, one a line, between `<tool_calls>` tags."""

from ..format import AnswerFormat, JsonCalls

FORMAT = AnswerFormat(
    name="minimax_m1",
    parser_names=("minimax", "minimax_m1"),
    calls=JsonCalls(begin=("<tool_calls>",), end="</tool_calls>"),
    signs=("<tool_calls>",),
)
