"""What the HTTP handlers share: one object per process, made by the service or a test. No
globals."""

import time
from collections.abc import Callable

from aiohttp import web
from msgspec import Struct
from pagewire_protocol.structs import Role

from ..requests.counter_exchange import CounterExchange
from ..requests.counters import Counters
from ..requests.owner import RequestOwner
from .answers import PLAIN, ParserFactory
from .auth import Auth
from .cors import Cors
from .errors import ApiError, unknown_model
from .sse import Flusher
from .stack import Stack


class State(Struct):
    names: tuple[str, ...]
    """What the model is called; answers carry the first."""
    auth: Auth
    owner: RequestOwner
    stack: Stack
    tally: Counters
    flusher: Flusher
    cors: Cors
    max_body: int
    """Bytes."""
    force_usage: bool = False
    """Streams tell their usage whether it was asked for or not."""
    keep_alive_s: float = 0.0
    """A stream that says nothing for so long says so; 0: never."""
    request_timeout_s: float = 0.0
    """After which a request ends with an error; 0: never."""
    clock: Callable[[], float] = time.monotonic
    started: int = 0
    """Unix time in seconds."""
    generating: int = 0
    """HTTP requests whose answers are under way."""
    lag_s: float = 0.0
    """How late the event loop's last timer was."""
    chat_parser: ParserFactory = PLAIN
    """Makes the parsers that take chats' answers apart, by what the model's answers look like."""
    together: CounterExchange | None = None
    """The way to the counts of the other frontends."""

    def frontends(self) -> set[int]:
        """The incarnations of the frontends of this stack."""
        roster = self.stack.roster
        return (
            {peer.incarnation for peer in roster.peers if peer.role is Role.FRONTEND}
            if roster
            else set()
        )

    def all_counts(self) -> Counters:
        """Those of every frontend of the stack."""
        several = len(self.frontends()) > 1
        return self.together.total(self.frontends()) if self.together and several else self.tally

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise unknown_model(name, self.names)

    def check_ready(self) -> None:
        if not self.stack.ready(self.clock()):
            raise self.unavailable()

    def unavailable(self) -> ApiError:
        return self.stack.unavailable(self.clock())


STATE = web.AppKey("state", State)
