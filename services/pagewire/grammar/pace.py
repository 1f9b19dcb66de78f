"""How often a matcher process looks at what a device may have told it, which wakes nobody. No clock.

Tokens come once a step, and steps take about as long as the shorter of the two before. So a process
sleeps through most of a step, and then looks often; the longer nothing comes, the more seldom. Steps
with prompts take longer, but those behind them do not: whoever slept too long would find the tokens
late, and take that for how long steps are.
"""

from typing import Final

LEAST_S: Final = 0.00005
MOST_S: Final = 0.005
"""Between two looks."""
LONGEST_S: Final = 0.05
"""Of a step; what comes later comes after a pause."""
EARLY: Final = 0.85
"""Of a step, through which it sleeps."""
LOOKS: Final = 24
"""In as long as nothing has come."""
TOGETHER_S: Final = 0.0005
"""In which the tokens of one step come."""


class Pace:
    """Of the looks of one process."""

    def __init__(self) -> None:
        self._at = 0.0
        self._last = 0.0
        """Seconds of the step before; 0: not known."""
        self._usual = 0.0
        self._sleeps = False
        """The next look is the first one for a while."""

    def begin(self, now: float) -> None:
        """A stream begins, whose first token may come at any time."""
        self._at = now
        self._last = self._usual = 0.0

    def told(self, now: float) -> None:
        """Tokens have come."""
        since = now - self._at
        if since > TOGETHER_S:
            self._at = now
            # What the first look finds may have been there for long.
            step = since if since < LONGEST_S and not self._sleeps else 0.0
            self._usual = min(step, self._last)
            self._last = step

    def pause_s(self, now: float) -> float:
        """Until the next look."""
        since = now - self._at
        until = EARLY * self._usual - since
        self._sleeps = until > 0
        return max(min(until if self._sleeps else since / LOOKS, MOST_S), LEAST_S)
