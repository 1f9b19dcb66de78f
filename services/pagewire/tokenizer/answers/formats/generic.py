"""JSON, for models of which nothing else is known: between the tags of `hermes`, or as the whole
answer where it names one of the tools. Prompts that Pagewire writes itself ask for it."""

from ..format import AnswerFormat, JsonCalls

FORMAT = AnswerFormat(
    name="generic",
    parser_names=("generic", "json"),
    calls=JsonCalls(begin=("<tool_call>",), end="</tool_call>", is_bare=True),
)
