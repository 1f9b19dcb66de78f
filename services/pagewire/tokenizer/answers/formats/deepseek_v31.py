"""DeepSeek V3.1: the name and the arguments on both sides of a separator."""

from ..format import AnswerFormat, NamedCalls, Section

FORMAT = AnswerFormat(
    name="deepseek_v31",
    parser_names=("deepseek_v31", "deepseekv31"),
    section=Section("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    calls=NamedCalls(
        begin="<｜tool▁call▁begin｜>",
        name_end=("<｜tool▁sep｜>",),
        end="<｜tool▁call▁end｜>",
    ),
    signs=("<｜tool▁calls▁begin｜>",),
)
