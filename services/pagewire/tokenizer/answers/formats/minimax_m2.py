"""MiniMax M2: `<invoke>` with a `<parameter>` for each argument."""

from ..format import AnswerFormat, ParameterCalls, Section

FORMAT = AnswerFormat(
    name="minimax_m2",
    parser_names=("minimax_m2", "minimax-m2"),
    section=Section("<minimax:tool_call>", "</minimax:tool_call>"),
    calls=ParameterCalls(
        begin='<invoke name="',
        name_end=('">',),
        key_begin='<parameter name="',
        key_end='">',
        value_end="</parameter>",
        end="</invoke>",
        lead="\n",
        strips_lines=True,
    ),
    signs=("<minimax:tool_call>",),
)
