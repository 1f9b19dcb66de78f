"""Mistral up to Small 3.1: `[TOOL_CALLS]`, then a list of JSON calls. Ids have nine letters and
digits."""

from ..format import AnswerFormat, NamedCalls

FORMAT = AnswerFormat(
    name="mistral",
    parser_names=("mistral",),
    calls=NamedCalls(
        begin="[TOOL_CALLS]",
        name_end=("[ARGS]", "{"),
        id_begin="[CALL_ID]",
        json_instead=True,
        forced_as_list=True,
    ),
    signs=("[TOOL_CALLS]",),
    hidden=("[ARGS]", "[CALL_ID]"),
    id_style="nine",
)
