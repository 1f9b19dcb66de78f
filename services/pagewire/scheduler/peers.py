"""The processes of the stack as the scheduler sees them: who is alive, what they can do, and the
Roster that tells the others.

Time comes with the calls. Knows nothing of requests; owners of requests are known by a number that
stands for their inbox.
"""

from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace
from pagewire_protocol.messages import (
    Heartbeat,
    Hello,
    Peer,
    Role,
    Roster,
    TokenizerFacts,
    WorkerFacts,
)
from pagewire_protocol.structs import SILENCE_S

LOADING_SILENCE_S: Final = 60.0
"""`SILENCE_S` for a peer that is loading: an import or a large file may hold its interpreter for
long."""
PAUSE_S: Final = 2.0
"""A gap in the scheduler's own time longer than this says that the scheduler was stopped, not that
its peers were silent."""


@dataclass(slots=True)
class Known:
    peer: Peer
    worker: WorkerFacts | None
    tokenizer: TokenizerFacts | None
    last_seen: float


class Peers:
    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._roster: Roster | None = None

    def hello(self, hello: Hello, now: float) -> list[Known]:
        """Note a peer. Returns those it replaces: an earlier life under the same role and name."""
        peer = hello.peer
        gone = [k for k in self._known.values() if self._is_former(k.peer, peer)]
        for known in gone:
            del self._known[known.peer.incarnation]
        new = Known(peer, hello.worker, hello.tokenizer, now)
        if peer.incarnation not in self._known or self._known[peer.incarnation].peer != peer:
            self._roster = None
        self._known[peer.incarnation] = new
        return gone

    @staticmethod
    def _is_former(old: Peer, new: Peer) -> bool:
        return (old.role, old.name) == (new.role, new.name) and old.incarnation != new.incarnation

    def heartbeat(self, beat: Heartbeat, now: float) -> bool:
        """False when the sender is unknown."""
        known = self._known.get(beat.incarnation)
        if known is None:
            return False
        known.last_seen = now
        if not known.peer.ready and (known.peer.stage, known.peer.fraction) != (
            beat.stage,
            beat.fraction,
        ):
            known.peer = replace(known.peer, stage=beat.stage, fraction=beat.fraction)
            self._roster = None
        return True

    def remove(self, incarnation: int) -> Known | None:
        known = self._known.pop(incarnation, None)
        if known is not None:
            self._roster = None
        return known

    def expired(self, now: float) -> list[int]:
        limit = {True: SILENCE_S, False: LOADING_SILENCE_S}
        return [
            k.peer.incarnation
            for k in self._known.values()
            if now - k.last_seen > limit[k.peer.ready]
        ]

    def forgive(self, seconds: float) -> None:
        """The scheduler itself stood still for `seconds`: nobody is blamed for a silence it could
        not hear."""
        for known in self._known.values():
            known.last_seen += seconds

    def at(self, inbox: str) -> list[int]:
        return [k.peer.incarnation for k in self._known.values() if k.peer.inbox == inbox]

    def inboxes(self, role: Role | None = None) -> list[str]:
        return [k.peer.inbox for k in self._known.values() if role is None or k.peer.role is role]

    def loading(self) -> bool:
        """A worker is on its way."""
        return any(k.peer.role is Role.WORKER and not k.peer.ready for k in self._known.values())

    @property
    def changed(self) -> bool:
        """The roster differs from the last one built."""
        return self._roster is None

    def roster(self, epoch: int, stats: dict[str, float]) -> Roster:
        if self._roster is None:
            self._roster = self._build(epoch)
        return replace(self._roster, stats=stats) if stats else self._roster

    def _build(self, epoch: int) -> Roster:
        ready = [k for k in self._known.values() if k.peer.ready]
        workers = [k.worker for k in ready if k.worker is not None]
        tokenizers = [k.tokenizer for k in ready if k.tokenizer is not None]
        return Roster(
            epoch,
            tuple(k.peer for k in self._known.values())[:1024],
            max_model_len=min((w.max_model_len for w in workers), default=0),
            vocab_size=min((w.vocab_size for w in workers), default=0),
            eos_token_ids=workers[0].eos_token_ids if workers else (),
            has_text=any(t.has_text for t in tokenizers),
            has_chat_template=any(t.has_chat_template for t in tokenizers),
        )


class Owners:
    """Inboxes that results go to, by number. One whose process never said Hello is given up after
    SILENCE_S."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._inbox: dict[int, str] = {}
        self._strangers: dict[str, float] = {}
        self._next = 0

    def number(self, inbox: str, known: bool, now: float) -> int:
        number = self._number.get(inbox)
        if number is None:
            number = self._number[inbox] = self._next
            self._inbox[number] = inbox
            self._next += 1
            if not known:
                self._strangers[inbox] = now
        return number

    def introduced(self, inbox: str) -> None:
        self._strangers.pop(inbox, None)

    def overdue(self, now: float) -> list[str]:
        return [inbox for inbox, since in self._strangers.items() if now - since > SILENCE_S]

    def inbox(self, number: int) -> str | None:
        return self._inbox.get(number)

    def remove(self, inbox: str) -> int | None:
        """The number that `inbox` had; it is never given again."""
        self._strangers.pop(inbox, None)
        number = self._number.pop(inbox, None)
        if number is not None:
            del self._inbox[number]
        return number
