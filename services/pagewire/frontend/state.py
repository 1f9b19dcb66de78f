"""What the HTTP handlers share: one object per process, made by the service or a test. No
globals."""

import time
from collections.abc import Callable

from aiohttp import web
from msgspec import Struct, field
from pagewire_protocol.structs import Role

from ..requests.counter_exchange import CounterExchange
from ..requests.counters import Counters
from ..requests.owner import RequestOwner
from .admission import Admission
from .auth import Auth
from .body import LargeBodies
from .body_readers import BodyReaders
from .cors import Cors
from .errors import ApiError
from .key_limits import KeyLimits
from .reading import Served
from .sse import Flusher
from .stack import Stack


class State(Struct):
    """The parts of one frontend process."""

    names: tuple[str, ...]
    """Names that the model answers to; answers have the first."""
    auth: Auth
    owner: RequestOwner
    stack: Stack
    counters: Counters
    flusher: Flusher
    cors: Cors
    key_limits: KeyLimits
    """What each API key may use."""
    large_bodies: LargeBodies
    """What is held of them."""
    admission: Admission
    """Which requests find room in the queue."""
    max_body: int
    """Bytes."""
    model_path: str = ""
    """The model's directory, file or hub id."""
    tokenizer_path: str = ""
    force_usage: bool = False
    """Streams report their usage whether the client asks for it or not."""
    has_docs: bool = True
    """Whether /docs and /openapi.json are there."""
    keep_alive_s: float = 0.0
    """A stream that is silent for so long is pinged; 0: never."""
    request_timeout_s: float = 0.0
    """A request that takes longer ends with an error; 0: never."""
    clock: Callable[[], float] = time.monotonic
    started: int = 0
    """Unix time in seconds."""
    generating: int = 0
    """Generation requests that have no complete answer yet."""
    lag_s: float = 0.0
    """How late the event loop's last timer was."""
    ignored: set[str] = field(default_factory=set[str])
    """What requests of agents held without effect, as far as it was logged."""
    log_requests: bool = False
    """Each request is a line of the log when it ends."""
    body_readers: BodyReaders = field(default_factory=BodyReaders)
    """Read what takes long to read."""
    counter_exchange: CounterExchange | None = None
    """Where the frontends of a stack share their counters."""

    def frontends(self) -> set[int]:
        """The incarnations of the frontends of this stack."""
        roster = self.stack.roster
        if roster is None:
            return set()
        return {peer.incarnation for peer in roster.peers if peer.role is Role.FRONTEND}

    def all_counters(self) -> Counters:
        """The sum over all frontends of the stack, those that are gone included."""
        if self.counter_exchange is None:
            return self.counters
        self.counter_exchange.publish()
        return self.counter_exchange.total(self.frontends())

    def served(self) -> Served:
        """What a body must fit."""
        return Served(self.stack.model(), self.names)

    def check_ready(self) -> None:
        """Raises ApiError 503 while generation is not possible."""
        if not self.stack.ready(self.clock()):
            raise self.unavailable()

    def check_accepting(self) -> None:
        """Raises ApiError 503 while generation is not possible, and what is missing is not just
        being started again: for that a request waits."""
        now = self.clock()
        if not self.stack.can_generate(now) and not (
            self.stack.is_heard(now) and self.owner.can_hold
        ):
            raise self.unavailable()

    def unavailable(self) -> ApiError:
        """Why generation is not possible, as an answer to the client."""
        return self.stack.unavailable(self.clock())


STATE = web.AppKey("state", State)
