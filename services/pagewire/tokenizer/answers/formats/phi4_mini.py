"""Phi-4-mini: `functools`, then a list of JSON calls; or a list between `<|tool_call|>` tokens."""

from ..format import AnswerFormat, JsonCalls

FORMAT = AnswerFormat(
    name="phi4_mini",
    parser_names=("phi4_mini_json", "phi4_mini"),
    calls=JsonCalls(begin=("<|tool_call|>", "functools["), is_list=True),
    signs=("<|/tool|>",),
    hidden=("<|/tool_call|>",),
)
