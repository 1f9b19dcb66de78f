"""Mistral since Small 3.2: `[TOOL_CALLS]`, the name, `[ARGS]`, the arguments."""

from msgspec.structs import replace

from ..format import NamedCalls
from . import mistral

assert isinstance(mistral.FORMAT.calls, NamedCalls)
FORMAT = replace(
    mistral.FORMAT,
    name="mistral_v11",
    parser_names=("mistral_v11",),
    calls=replace(mistral.FORMAT.calls, forced_as_list=False),
    signs=("[TOOL_CALLS]", "[ARGS]"),
)
