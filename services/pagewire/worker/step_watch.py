"""Notices a step that takes far longer than its like. Knows neither messages nor the clock."""

from collections import deque
from typing import Final

FACTOR: Final = 20
"""So many times the slowest step of its kind lately is too long."""
SAMPLES: Final = 16
"""Steps of a kind after which it is known how long they take."""
DECAY: Final = 0.999
"""A slow step is forgotten by and by."""
PAUSE_S: Final = 2.0
"""Between two looks: this process was stopped, or the machine was, and the step may be fine."""


class Stuck(Exception):
    """A step does not end: the device hangs."""


class _Times:
    """The slowest of late, in seconds a unit."""

    def __init__(self) -> None:
        self.count = 0
        self._slowest = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self._slowest = max(self._slowest * DECAY, seconds)

    def limit_s(self, units: int, least_s: float, unknown_s: float) -> float:
        if self.count < SAMPLES:
            return unknown_s
        return max(least_s, FACTOR * units * self._slowest)


class StepWatch:
    """The steps under way on one device, which ends them in the order of their launches. Steps of
    decodes alone are alike; those with prefill are compared by the token."""

    def __init__(self, least_s: float, unknown_s: float) -> None:
        """No step is stuck within `least_s` seconds; `unknown_s` as long as nothing is known of
        its kind, five times `least_s` with prefill."""
        self._least_s = least_s
        self._unknown_s = unknown_s
        self._decodes = _Times()
        self._prefill = _Times()
        self._under_way: deque[tuple[float, int]] = deque()
        """When each was launched, and its tokens; 0 of decodes alone."""
        self._since = 0.0
        """When the oldest one had the device to itself."""
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self._under_way)

    def launched(self, prefill_tokens: int, now: float) -> None:
        """A step begins. prefill_tokens: all its tokens if it has prefill, else 0. now: monotonic
        seconds."""
        if not self._under_way:
            self._since = now
        self._under_way.append((now, prefill_tokens))
        self._looked = now

    def ended(self, now: float) -> None:
        """The oldest step has ended."""
        _, tokens = self._under_way.popleft()
        seconds = now - self._since
        if tokens:
            self._prefill.add(seconds / tokens)
        else:
            self._decodes.add(seconds)
        self._since = now

    def clear(self) -> None:
        """Nobody waits for the steps under way any more."""
        self._under_way.clear()

    def look(self, now: float) -> None:
        """Raises Stuck."""
        if now - self._looked > PAUSE_S:
            self._since += now - self._looked
        self._looked = now
        if not self._under_way:
            return
        _, tokens = self._under_way[0]
        if tokens:
            limit_s = self._prefill.limit_s(tokens, 5 * self._least_s, self._unknown_s)
        else:
            limit_s = self._decodes.limit_s(1, self._least_s, self._unknown_s)
        if now - self._since > limit_s:
            raise Stuck(
                f"no step has ended for {now - self._since:.0f} s while {len(self)} are under way: "
                "the device hangs; starting anew"
            )
