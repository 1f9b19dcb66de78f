"""DeepSeek V3.2: tags with the prefix DSML; an attribute says which arguments are strings."""

from ..format import AnswerFormat, ParameterCalls, Section

FORMAT = AnswerFormat(
    name="deepseek_v32",
    parser_names=("deepseek_v32", "deepseekv32"),
    section=Section("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
    calls=ParameterCalls(
        begin='<｜DSML｜invoke name="',
        name_end=('">',),
        key_begin='<｜DSML｜parameter name="',
        key_end='"',
        attribute_end=">",
        value_end="</｜DSML｜parameter>",
        end="</｜DSML｜invoke>",
        lead="\n",
    ),
    signs=("<｜DSML｜",),
)
