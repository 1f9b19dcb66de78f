"""Hermes, Qwen 2.5 and 3, Granite 4 and many others: JSON between `<tool_call>` tags."""

from ..format import AnswerFormat, JsonCalls

FORMAT = AnswerFormat(
    name="hermes",
    parser_names=("hermes", "qwen", "qwen25", "qwen3", "granite4"),
    calls=JsonCalls(begin=("<tool_call>",), end="</tool_call>"),
    signs=("<tool_call>",),
)
