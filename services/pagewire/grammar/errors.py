"""Why a grammar is not taken."""

from typing import Final

PARAM: Final = "structured_outputs"
"""The parameter at fault, where the sender's own name for it is not known any more."""


class GrammarError(ValueError):
    """The grammar is at fault; the text says what about it, in one line."""
