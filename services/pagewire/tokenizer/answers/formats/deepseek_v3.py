"""DeepSeek V3 and R1: the function's name in a line, its arguments in a fenced block of JSON."""

from ..format import AnswerFormat, NamedCalls, Section

FORMAT = AnswerFormat(
    name="deepseek_v3",
    parser_names=("deepseek_v3", "deepseekv3"),
    section=Section("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    calls=NamedCalls(
        begin="<｜tool▁call▁begin｜>",
        name_lead="function",
        name_begin="<｜tool▁sep｜>",
        name_end=("\n",),
        arguments_lead="```json\n",
        arguments_tail="\n```",
        end="<｜tool▁call▁end｜>",
    ),
    signs=("<｜tool▁calls▁begin｜>", "```json"),
)
