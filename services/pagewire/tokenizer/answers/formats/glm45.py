"""GLM 4.5 to 4.7: `<tool_call>`, the name, then pairs of `<arg_key>` and `<arg_value>`."""

from ..format import AnswerFormat, ParameterCalls

FORMAT = AnswerFormat(
    name="glm45",
    parser_names=("glm45", "glm47", "glm4_moe"),
    calls=ParameterCalls(
        begin="<tool_call>",
        name_end=("\n", "<arg_key>"),
        key_begin="<arg_key>",
        key_end="</arg_key>",
        value_begin="<arg_value>",
        value_end="</arg_value>",
        end="</tool_call>",
        lead="\n",
    ),
    signs=("<arg_key>",),
)
