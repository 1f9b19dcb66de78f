"""The processes of the stack as the scheduler sees them: who is alive, what they can do, and the
Roster that tells the others.

Time comes with the calls. Knows nothing of requests; where their results go is known by a number
that stands for an inbox.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from msgspec.structs import replace
from pagewire_protocol.messages import (
    Death,
    Epoch,
    Heartbeat,
    Hello,
    Incarnation,
    Peer,
    Role,
    Roster,
    TokenizerFacts,
    WorkerFacts,
)
from pagewire_protocol.sampling import SamplingDefaults
from pagewire_protocol.structs import FAILING, NOT_AWAITED, SILENCE_S

from .request import ReplyRoute

LOADING_SILENCE_S: Final = 60.0
"""`SILENCE_S` for a peer that is loading: an import or a large file may hold its interpreter for
long."""
EXPECTED_BIT: Final = 1 << 62
"""Of the incarnation that stands for a service between two lives; those of processes are
smaller."""
NO_INBOX: Final = ""
REMEMBERED_DEATHS: Final = 1024
"""Processes of which it is remembered that they have ended."""
PAUSE_S: Final = 2.0
"""A gap in the scheduler's own time longer than this says that the scheduler was stopped, not that
its peers were silent."""


@dataclass(slots=True)
class PeerState:
    """What one peer last said of itself, and when it was heard (monotonic seconds)."""

    peer: Peer
    worker: WorkerFacts | None
    tokenizer: TokenizerFacts | None
    last_seen: float
    expected: bool = False
    """It has ended and is started again: there is no process yet."""


class Peers:
    """All live peers, by incarnation."""

    def __init__(self) -> None:
        self._peers: dict[Incarnation, PeerState] = {}
        self._failures: dict[tuple[Role, str], int] = {}
        """Of services that are started again, until they are ready."""
        self._causes: dict[tuple[Role, str], str] = {}
        """Of the last of these ends."""
        self._ended: OrderedDict[int, None] = OrderedDict()
        """Incarnations whose ends were announced. What they sent before may arrive after that."""
        self._roster: Roster | None = None
        self.deaths = 0
        """Announced by those who start services."""

    def hello(self, hello: Hello, now: float) -> list[PeerState]:
        """Note a peer. Returns those that it replaces: an earlier life under the same role and
        name, with the other ranks of its group."""
        peer = self._with_failures(hello.peer)
        former = [state for state in self._peers.values() if self._is_former(state.peer, peer)]
        gone = [lost for state in former for lost in self.remove(state.peer.incarnation)]
        if peer.incarnation not in self._peers or self._peers[peer.incarnation].peer != peer:
            self._roster = None
        self._peers[peer.incarnation] = PeerState(peer, hello.worker, hello.tokenizer, now)
        return gone

    def _with_failures(self, peer: Peer) -> Peer:
        service = (peer.role, peer.name)
        if peer.ready:
            self._failures.pop(service, None)
            self._causes.pop(service, None)
            return replace(peer, failures=0)
        failures = max(peer.failures, self._failures.get(service, 0))
        return replace(peer, failures=failures, stage=self._stage(service, peer.stage))

    def _stage(self, service: tuple[Role, str], stage: str) -> str:
        """What the present life of a service does, and why its former ones ended."""
        cause = self._causes.get(service)
        if not cause:
            return stage
        return f"{stage}; before that: {cause}, {self._failures.get(service, 1)} times"[:256]

    def expect(self, death: Death, now: float) -> None:
        """A service has ended and is started again: until its next life says Hello, the roster
        lists it as one that is not ready."""
        self.deaths += bool(death.failures)
        if death.incarnation:
            self._ended[death.incarnation] = None
            if len(self._ended) > REMEMBERED_DEATHS:
                self._ended.popitem(last=False)
        service = (death.role, death.name)
        living = [s for s in self._peers.values() if (s.peer.role, s.peer.name) == service]
        if any(not state.expected for state in living):
            return  # the next life was faster than the news of the last one's end
        # Who starts containers counts nothing.
        failures = self._failures.get(service, 0) + 1 if death.failures else 1
        failures = self._failures[service] = max(failures, death.failures)
        if death.failures:
            self._causes[service] = death.cause
        stage = f"starting again: {death.cause}"
        if death.restart_in_s:
            stage = f"starting again in {death.restart_in_s:g} s after {failures} failures: {death.cause}"
        elif failures > 1:
            stage = f"{death.cause}, {failures} times"
        incarnation = Incarnation(EXPECTED_BIT | crc32(f"{death.role} {death.name}".encode()))
        peer = Peer(
            death.role,
            death.name,
            NO_INBOX,
            incarnation,
            ready=False,
            stage=stage[:256],
            failures=failures,
        )
        until = now + death.restart_in_s
        self._peers[incarnation] = PeerState(peer, None, None, until, expected=True)
        self._roster = None

    def has_ended(self, incarnation: Incarnation) -> bool:
        """The end of this process was announced: it sends nothing any more, and what arrives of it
        was on its way."""
        return incarnation in self._ended

    @property
    def failing(self) -> int:
        """Services that have failed several times in a row and are tried again with pauses."""
        return sum(failures >= FAILING for failures in self._failures.values())

    @staticmethod
    def _is_former(old: Peer, new: Peer) -> bool:
        return (old.role, old.name) == (new.role, new.name) and old.incarnation != new.incarnation

    def heartbeat(self, beat: Heartbeat, now: float) -> bool:
        """False when the sender is unknown."""
        state = self._peers.get(beat.incarnation)
        if state is None:
            return False
        state.last_seen = now
        stage = self._stage((state.peer.role, state.peer.name), beat.stage)
        if not state.peer.ready and (state.peer.stage, state.peer.fraction) != (
            stage,
            beat.fraction,
        ):
            state.peer = replace(state.peer, stage=stage, fraction=beat.fraction)
            self._roster = None
        return True

    def remove(self, incarnation: Incarnation) -> list[PeerState]:
        """Forget a peer, and with it the other ranks of its group. Returns what was known of them,
        the peer itself first."""
        state = self._peers.pop(incarnation, None)
        if state is None:
            return []
        self._roster = None
        others = self._group(state.peer.group) if state.peer.group else []
        for other in others:
            del self._peers[other.peer.incarnation]
        return [state, *others]

    def expired(self, now: float) -> list[Incarnation]:
        """The incarnations of peers that were silent for too long."""
        limit = {True: SILENCE_S, False: LOADING_SILENCE_S}
        return [
            state.peer.incarnation
            for state in self._peers.values()
            if now - state.last_seen > limit[state.peer.ready]
        ]

    def extend_deadlines(self, seconds: float) -> None:
        """The scheduler itself stood still for `seconds`: no peer is dropped for messages that
        were not read meanwhile."""
        for state in self._peers.values():
            state.last_seen += seconds

    def ready_leader(self, peer: Peer) -> PeerState | None:
        """Rank 0 of `peer`'s group when all its ranks are there and ready; `peer` itself when it is
        alone and ready."""
        if not peer.group:
            return self._peers[peer.incarnation] if peer.ready else None
        ready = {state.peer.rank: state for state in self._group(peer.group) if state.peer.ready}
        return ready.get(0) if len(ready) >= peer.group_size else None

    def _group(self, name: str) -> list[PeerState]:
        return [state for state in self._peers.values() if state.peer.group == name]

    def at(self, inbox: str) -> list[Incarnation]:
        """The incarnations of peers with this inbox."""
        return [
            state.peer.incarnation for state in self._peers.values() if state.peer.inbox == inbox
        ]

    def inboxes(self, role: Role | None = None) -> list[str]:
        """The inboxes of all peers, or those with this role."""
        return [
            state.peer.inbox
            for state in self._peers.values()
            if not state.expected and (role is None or state.peer.role is role)
        ]

    def of_group(self, incarnation: Incarnation) -> list[Peer]:
        """The peer, with the other ranks of its group."""
        state = self._peers.get(incarnation)
        if state is None:
            return []
        group = self._group(state.peer.group) if state.peer.group else [state]
        return [member.peer for member in group]

    def loading(self) -> bool:
        """A worker is on its way, and not known for failing again and again."""
        return any(
            state.peer.role is Role.WORKER
            and not state.peer.ready
            and state.peer.failures < NOT_AWAITED
            for state in self._peers.values()
        )

    @property
    def changed(self) -> bool:
        """The roster differs from the last one built."""
        return self._roster is None

    def roster(self, epoch: Epoch, stats: dict[str, float]) -> Roster:
        """The peers as the others are told of them."""
        if self._roster is None:
            self._roster = self._build(epoch)
        return replace(self._roster, stats=stats) if stats else self._roster

    def _shown(self, peer: Peer) -> Peer:
        """A rank is no more ready than its group."""
        if not peer.ready or not peer.group or self.ready_leader(peer) is not None:
            return peer
        return replace(peer, ready=False, stage="waiting for the other ranks", fraction=1.0)

    def _build(self, epoch: Epoch) -> Roster:
        ready = [state for state in self._peers.values() if state.peer.ready]
        workers = [
            state.worker
            for state in ready
            if state.worker is not None and self.ready_leader(state.peer) is state
        ]
        tokenizers = [state.tokenizer for state in ready if state.tokenizer is not None]
        return Roster(
            epoch,
            tuple(self._shown(state.peer) for state in self._peers.values())[:1024],
            max_model_len=min((w.max_model_len for w in workers), default=0),
            vocab_size=min((w.vocab_size for w in workers), default=0),
            eos_token_ids=workers[0].eos_token_ids if workers else (),
            has_text=any(t.has_text for t in tokenizers),
            has_chat_template=any(t.has_chat_template for t in tokenizers),
            sampling_defaults=tokenizers[0].sampling_defaults if tokenizers else SamplingDefaults(),
            longest_token=tokenizers[0].longest_token if tokenizers else 0,
            has_reasoning=any(t.has_reasoning for t in tokenizers),
            tool_format=tokenizers[0].tool_format if tokenizers else "",
        )


class ReplyRoutes:
    """Inboxes that results go to, by number. One whose process never said Hello is given up after
    SILENCE_S."""

    def __init__(self) -> None:
        self._number: dict[str, ReplyRoute] = {}
        self._inbox: dict[ReplyRoute, str] = {}
        self._unknown_senders: dict[str, float] = {}
        """Since when results are sent to a process that never said Hello, by inbox."""
        self._next = 0

    def number(self, inbox: str, introduced: bool, now: float) -> ReplyRoute:
        """The number of `inbox`, a new one where it has none. `introduced`: its process has said
        Hello."""
        number = self._number.get(inbox)
        if number is None:
            number = self._number[inbox] = ReplyRoute(self._next)
            self._inbox[number] = inbox
            self._next += 1
            if not introduced:
                self._unknown_senders[inbox] = now
        return number

    def introduced(self, inbox: str) -> None:
        """The process of `inbox` has said Hello."""
        self._unknown_senders.pop(inbox, None)

    def overdue(self, now: float) -> list[str]:
        """The inboxes whose processes should have said Hello by now."""
        return [inbox for inbox, since in self._unknown_senders.items() if now - since > SILENCE_S]

    def inbox(self, number: ReplyRoute) -> str | None:
        """The inbox with this number; None when it is gone."""
        return self._inbox.get(number)

    def remove(self, inbox: str) -> ReplyRoute | None:
        """The number that `inbox` had; it is never given again."""
        self._unknown_senders.pop(inbox, None)
        number = self._number.pop(inbox, None)
        if number is not None:
            del self._inbox[number]
        return number
