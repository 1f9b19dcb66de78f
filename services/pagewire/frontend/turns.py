"""Long work on the event loop, done a few milliseconds at a time, so that others have their turns."""

import asyncio
import time
from typing import Final

TURN_S: Final = 0.003
"""How long one request's work may go on before others have their turn."""


class Turn:
    """One request's use of the event loop: while `is_over`, await `next` before going on."""

    __slots__ = ("_began",)

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def is_over(self) -> bool:
        """Whether others are to have their turn."""
        return time.perf_counter() - self._began > TURN_S

    async def next(self) -> None:
        """Let everybody else have a turn."""
        await asyncio.sleep(0)
        self._began = time.perf_counter()
