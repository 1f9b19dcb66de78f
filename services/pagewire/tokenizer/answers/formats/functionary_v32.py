"""Functionary v3.2: every part begins with `>>>` and its recipient; `all` is the user."""

from ..format import AnswerFormat, NamedCalls

FORMAT = AnswerFormat(
    name="functionary_v32",
    parser_names=("functionary_v3.2", "functionary_v32"),
    calls=NamedCalls(begin=">>>", name_end=("\n",), content_name="all"),
    signs=(">>>",),
)
