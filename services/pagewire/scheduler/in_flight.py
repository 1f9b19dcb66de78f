"""The steps that one worker has been sent and has not answered yet.

Steps are numbered one after the other and answered in order. Knows neither what a step costs nor what its
result means.
"""

from collections import deque
from dataclasses import dataclass

from pagewire_protocol.columns import Slot

from .slots import I32


@dataclass(slots=True, eq=False)
class InFlightStep:
    """A step whose result is not there yet."""

    n: int
    run: I32
    """The slots that it runs [rows]."""
    counts: I32 | None
    """New tokens of each row [rows]; None: one each."""
    sampled: I32
    """The slots for which it returns a row."""
    sampled_bytes: bytes
    """The same as a column of the wire."""
    prefilled: I32
    """The slots whose requests end with it: their prompt is computed, and they want no token."""
    num_vacated: int
    """`Slots.num_vacated` when it was formed: as long as that is the same, no row is stale."""


class InFlightSteps:
    """The numbers of the newest step sent and of the newest one answered, and those between."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.num_returned = 0
        self.steps: deque[InFlightStep] = deque()

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def oldest(self) -> InFlightStep | None:
        """The step whose result comes next."""
        return self.steps[0] if self.steps else None

    def push(self, step: InFlightStep) -> None:
        """`step` is being sent."""
        self.num_sent = step.n
        self.steps.append(step)

    def last_step_of(self, slot: Slot) -> int:
        """The newest step in flight that runs `slot`; 0 when none does."""
        return next((s.n for s in reversed(self.steps) if bool((s.run == slot).any())), 0)

    def continue_after(self, number: int) -> None:
        """Number the first step `number` + 1."""
        self.num_sent = number
        self.num_returned = number
