"""Functionary for Llama 3.1: `<function=NAME>`, then the arguments as JSON."""

from ..format import AnswerFormat, NamedCalls

FORMAT = AnswerFormat(
    name="functionary_v31",
    parser_names=("functionary_v3.1", "functionary_v31"),
    calls=NamedCalls(begin="<function=", name_end=(">",), end="</function>"),
    signs=("<function=",),
)
