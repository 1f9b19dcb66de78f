"""Qwen 3 Coder, Step 3, MiMo: a function in XML-like tags, with each argument in a tag of its
own."""

from ..format import AnswerFormat, ParameterCalls, Section

FORMAT = AnswerFormat(
    name="qwen3_coder",
    parser_names=("qwen3_coder", "qwen3_xml", "step3p5", "mimo"),
    section=Section("<tool_call>", "</tool_call>"),
    calls=ParameterCalls(
        begin="<function=",
        name_end=(">",),
        key_begin="<parameter=",
        key_end=">",
        value_end="</parameter>",
        end="</function>",
        lead="\n",
        strips_lines=True,
    ),
    signs=("<function=", "<parameter="),
)
