"""Kimi K2: the call's id, `functions.NAME:NUMBER`, then its arguments."""

from ..format import AnswerFormat, NamedCalls, Section

FORMAT = AnswerFormat(
    name="kimi_k2",
    parser_names=("kimi_k2",),
    section=Section("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    calls=NamedCalls(
        begin="<|tool_call_begin|>",
        name_lead="functions.",
        name_end=("<|tool_call_argument_begin|>",),
        end="<|tool_call_end|>",
        name_pattern=r"(?:functions\.)?(?P<name>.+?)(?::[0-9]+)?",
        name_is_id=True,
    ),
    signs=("<|tool_calls_section_begin|>",),
)
