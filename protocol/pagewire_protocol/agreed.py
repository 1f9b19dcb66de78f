"""Numbers on which the scheduler and every worker must agree, beyond what a message says."""

from typing import Final

MAX_STEPS_IN_FLIGHT: Final = 8
"""Steps that the scheduler may have sent without having seen their results."""
SPARE_POSITIONS: Final = 16
"""Positions that a worker has behind the longest context. The scheduler learns a few steps late
that a request has ended, so steps in flight run it past its end; their tokens are dropped. More
than MAX_STEPS_IN_FLIGHT."""
MAX_PREFIX_GROUPS: Final = 8
"""Groups of rows with common leading blocks that one step names. A worker has buffers for so many,
and each adds tiles to a kernel's grid of fixed size, which cost time even where they stay empty."""

LAUNCHER_AGENT: Final = "pagewire-launcher"
"""The User-Agent of `pagewire serve` itself, which asks for the health of a starting stack ten
times a second: no traffic, and no failures."""

NOT_FINITE: Final = 1
"""In `StepResult.flags`: the row's logits were not finite."""
GRAMMAR_FAILED: Final = 2
"""The same: the row's grammar lets no token follow, or takes too much to be matched."""
