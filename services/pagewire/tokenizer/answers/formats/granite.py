"""Granite 3: a list of JSON calls behind `<|tool_call|>`, of the older ones behind
`<tool_call>`."""

from ..format import AnswerFormat, JsonCalls

FORMAT = AnswerFormat(
    name="granite",
    parser_names=("granite", "granite-20b-fc"),
    calls=JsonCalls(begin=("<|tool_call|>", "<tool_call>"), is_list=True),
    signs=("<|tool_call|>", "<|start_of_role|>"),
)
