"""A whole stack in one thread and in virtual time: the real owner, tokenizers, scheduler and
memberships, simulated workers and network, and faults drawn from a seed.

A process may be killed (announced by whoever starts processes, or not), stopped until it is killed,
paused for longer than the others wait for it, or started again. Messages arrive in order from each
sender and late; what a killed process sent last may be lost; and, which ZeroMQ does not do but the
acceptance rules are made for, some of them come twice, or are lost in the middle of a stream. Who
gives a process up drops its connection to it and makes another one when it comes back: what the old
one had brought and was not read arrives between what the new one brings, or after it.

A worker's token is a hash of all tokens before it and of its execution, so two executions never say
the same. An owner's output is right when each of its tokens was said by some worker after exactly
the tokens before it.
"""

import heapq
import logging
import random
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from pagewire.config import SchedulerConfig
from pagewire.process.membership import Membership
from pagewire.requests import request as owned_request
from pagewire.requests.counters import Counters
from pagewire.requests.errors import RequestError
from pagewire.requests.owner import RequestOwner
from pagewire.requests.request import Job
from pagewire.scheduler.state import Scheduler, Tick
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import Encoder
from pagewire.tokenizer.requests import Requests
from pagewire.worker.fake import draw, extend
from pagewire.worker.loop import _Server
from pagewire_protocol.channels import inbox_address
from pagewire_protocol.columns import unpack
from pagewire_protocol.messages import Death as DeathMessage
from pagewire_protocol.messages import (
    Deltas,
    Message,
    Prompt,
    Role,
    Roster,
    Shutdown,
    Step,
    StepResult,
    Submit,
    Tokens,
    WorkerFacts,
    pack,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import TokenizerFacts

from .connections import Connection, Inbox

VOCAB: Final = 50
EOS: Final = 3
MODEL_LEN: Final = 64
RUN_DIR: Final = Path("/run/simulated")
SCHEDULER: Final = inbox_address(RUN_DIR, Role.SCHEDULER, 0)
FACTS: Final = WorkerFacts(9, 4, 4, MODEL_LEN, VOCAB, (EOS,), "simulated")
CONFIG: Final = SchedulerConfig(max_num_batched_tokens=16, disable_log_stats=True)
TURN_S: Final = 1.0
"""Time between two turns of a process that hears nothing. All have them at about the same time, so
that little is computed for what arrives together."""
WAKE_S: Final = {Role.SCHEDULER: 0.001}
"""How long a process takes to look at what has arrived: so does what arrives meanwhile."""
STEP_S: Final = (*(0.002,) * 7, 0.6)
"""One in eight stacks is so slow that a stream outlives a process that is given up."""
LATE_S: Final = 0.005
"""Between two messages of a connection that was dropped, about; for a worker, a step's time."""
PATIENCE_S: Final = 150.0
"""After which a request that has not ended never will. The longest wait that the services allow
themselves is 60 s."""
QUIET_S: Final = 2.1
"""From the last end on until nothing is held any more."""


class Violation(AssertionError):
    """A promise is broken."""


class Process:
    """One life of a service."""

    def __init__(self, world: "World", role: Role, name: str, life: int) -> None:
        self.world, self.role, self.name, self.life = world, role, name, life
        self.incarnation: Any = next(world.incarnations)
        self.address = inbox_address(RUN_DIR, role, self.incarnation)
        self.inbox = Inbox()
        self.lives = True
        self.paused_until = 0.0
        self.lost_from = float("inf")
        """What it sent later did not leave it."""
        self.is_ready = False
        self._wakes = False
        world.bound[self.address] = self
        world.later(0.0, self._turn)

    def send(self, address: str, message: Message) -> bool:
        """As an Outbox does."""
        self.world.post(self, address, message)
        return True

    def forget(self, address: str) -> None:
        """As an Outbox does."""
        self.world.drop_connection(self, address)

    def pause_until(self, when: float) -> None:
        """It does nothing until then."""
        self.paused_until = max(self.paused_until, when)

    def wake(self) -> None:
        """Something has arrived."""
        if not self._wakes:
            self._wakes = True
            self.world.later(WAKE_S.get(self.role, 0.0001), self._run)

    def _run(self) -> None:
        if not self.lives:
            return
        if self.paused_until > self.world.now:
            self.world.at(self.paused_until, self._run)
            return
        self._wakes = False
        self.work(self.inbox.take())

    def _turn(self) -> None:
        if self.lives:
            self.wake()
            now = self.world.now
            self.world.at(now - now % TURN_S + TURN_S, self._turn)

    def work(self, messages: deque[Message]) -> None:
        """All that has arrived, and what the time brings."""
        raise NotImplementedError


class Member(Process):
    """A process that says Hello; ready after `load_s` seconds."""

    def __init__(self, world: "World", role: Role, name: str, life: int, load_s: float) -> None:
        super().__init__(world, role, name, life)
        self.members = Membership(
            role,
            name,
            self.incarnation,
            SimpleNamespace(address=self.address),  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            RUN_DIR,
        )
        self.members.hello()
        world.later(load_s, self._become_ready)

    def _become_ready(self) -> None:
        if self.lives:
            self.is_ready = True
            self.get_ready()
            self.wake()

    def get_ready(self) -> None:
        """Say so."""
        raise NotImplementedError


class SchedulerProcess(Process):
    def __init__(self, world: "World", name: str, life: int, load_s: float) -> None:
        super().__init__(world, Role.SCHEDULER, name, life)
        world.epoch += 1
        self.state = Scheduler(world.epoch, CONFIG, self.send, self.forget)  # type: ignore
        self.state.send_roster_to([address for address in world.bound if address != self.address])
        world.bound[SCHEDULER] = self
        self.is_ready = True

    def work(self, messages: deque[Message]) -> None:
        for message in messages:
            self.state.handle(message)  # type: ignore[arg-type]
        self.state.handle(Tick(self.world.now))


class TokenizerProcess(Member):
    requests: Requests | None = None

    def get_ready(self) -> None:
        world = self.world
        self.requests = Requests(
            world.encoder, world.decoding, self.address, lambda task: None, clock=lambda: world.now
        )
        if self.members.roster is not None:
            self.requests.on_roster(self.members.roster, False)
        self.members.ready(tokenizer=TokenizerFacts(False, False, VOCAB))

    def work(self, messages: deque[Message]) -> None:
        """As in tokenizer/service.py: tokens and rosters go first."""
        self.members.tick(self.world.now)
        requests = self.requests
        steps: list[Tokens] = []
        arrivals: list[Any] = []
        for message in messages:
            if isinstance(message, Tokens):
                steps.append(message)
            elif isinstance(message, Roster):
                self._on_roster(message)
            else:
                arrivals.append(message)
        if requests is None:
            return
        if steps:
            requests.tokens(steps)
        for arrival in arrivals:
            match type(arrival).__name__:
                case "Generate":
                    requests.generate(arrival)
                case "Cancel":
                    requests.cancel(arrival)
                case _:
                    requests.to_scheduler.append(arrival)
        for inbox, outgoing in list(requests.outgoing.items()):
            for deltas in outgoing.messages() if outgoing else ():
                self.send(inbox, deltas)
        submits, requests.to_scheduler = requests.to_scheduler, []
        for submit in submits:
            self.send(SCHEDULER, submit)

    def _on_roster(self, roster: Roster) -> None:
        new_epoch = self.members.on_roster(roster)
        if self.requests is not None and self.members.was_forgotten:
            self.requests.lose_all("given up")
        if self.requests is not None and self.members.roster is roster:
            for inbox in self.requests.on_roster(roster, new_epoch):
                self.forget(inbox)


class Slot:
    """A running request as a worker has it."""

    def __init__(self, tokens: list[int], computed: int, execution: int) -> None:
        self.state = 0
        for token in tokens:
            self.state = extend(self.state, token)
        self.known, self.computed, self.execution = len(tokens), computed, execution


class WorkerProcess(Member):
    """Which steps it takes is decided by the real loop's methods, which use these attributes."""

    _epoch = 0
    _newest_step = 0
    _leader = None

    def get_ready(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.last: list[int] = []
        self.steps: deque[Step] = deque()
        self.members.ready(worker=FACTS)

    def work(self, messages: deque[Message]) -> None:
        """As in worker/loop.py."""
        self.members.tick(self.world.now)
        for message in messages:
            epoch = message.epoch  # type: ignore[union-attr]
            if epoch > self._epoch:
                _Server._follow(self, epoch)  # type: ignore[arg-type]
            match message:
                case Roster():
                    self.members.on_roster(message)
                case Shutdown() if epoch == self._epoch:
                    raise Violation(f"a worker is distrusted: {message.reason}")
                case Step() if epoch == self._epoch:
                    _Server._take(self, message, b"")  # type: ignore[arg-type]
                case _:
                    pass

    def _forget_requests(self) -> None:
        if self.is_ready:
            self.slots.clear()
            self.steps.clear()

    def _launch(self, step: Step) -> None:
        self.steps.append(step)
        if len(self.steps) == 1:
            self.world.later(self.world.step_s, self._execute)

    def _send_results(self) -> None:
        """They go when their time has come."""

    def _execute(self) -> None:
        if not self.lives or not self.steps:
            return
        if self.paused_until > self.world.now:
            self.world.at(self.paused_until, self._execute)
            return
        self.send(SCHEDULER, self._result(self.steps.popleft()))
        if self.steps:
            self.world.later(self.world.step_s, self._execute)

    def _result(self, step: Step) -> StepResult:
        for slot in unpack("i", step.retire):
            if self.slots.pop(slot, None) is None:
                raise Violation(f"slot {slot} is retired, and holds no request")
        for admission in step.admit:
            if admission.slot in self.slots:
                raise Violation(f"slot {admission.slot} is admitted to twice")
            tokens = [*unpack("i", admission.prompt), *unpack("i", admission.output)]
            self.slots[admission.slot] = Slot(tokens, admission.computed, admission.execution)
        if step.repeat:
            counts = [1] * len(self.last)
        else:
            self.last = unpack("i", step.run_slots).tolist()
            counts = unpack("i", step.run_counts).tolist()
        slots: list[int] = []
        tokens = []
        for number, tokens_run in zip(self.last, counts, strict=True):
            slot = self.slots[number]
            slot.computed += tokens_run
            if slot.computed < slot.known:
                continue
            token = draw(extend(slot.state, slot.execution), VOCAB)
            self.world.said.add((slot.state, token))
            slot.state = extend(slot.state, token)
            slot.known += 1
            slots.append(number)
            tokens.append(token)
        flags = bytes(len(slots))
        return StepResult(
            step.epoch, self.incarnation, step.n, pack("i", slots), pack("i", tokens), flags
        )


class FrontendProcess(Member):
    def __init__(self, world: "World", name: str, life: int, load_s: float) -> None:
        super().__init__(world, Role.FRONTEND, name, life, load_s)
        self.owner = RequestOwner(
            self.address, self.send, lambda: self.world.now, Counters(), life > 0
        )

        self._tokenizer_inboxes: set[str] = set()

    def get_ready(self) -> None:
        self.members.ready()

    def work(self, messages: deque[Message]) -> None:
        """As in frontend/service.py."""
        self.members.tick(self.world.now)
        for message in messages:
            if isinstance(message, Deltas):
                self.owner.on_deltas(message)
            elif isinstance(message, Roster):
                self._on_roster(message)
        self.owner.tick()

    def _on_roster(self, roster: Roster) -> None:
        self.members.on_roster(roster)
        self.owner.on_roster(roster)
        inboxes = {peer.inbox for peer in roster.peers if peer.role is Role.TOKENIZER}
        for inbox in self._tokenizer_inboxes - inboxes:
            self.forget(inbox)
        self._tokenizer_inboxes = inboxes


class Client:
    """The sink of one request: judges what it gets. It may not raise."""

    wants_tokens = True

    def __init__(self, world: "World", prompt: list[int], max_tokens: int) -> None:
        self.world, self.prompt, self.max_tokens = world, prompt, max_tokens
        self.count = 0
        self.last = -1
        self.end = ""
        self.frontend: FrontendProcess | None = None
        self._state = 0
        for token in prompt:
            self._state = extend(self._state, token)

    def started(self, started: object) -> None:
        """Nothing to judge."""

    def text(self, text: str) -> None:
        """There is none."""

    def tokens(self, text: str, tokens: list[int], logprobs: object) -> None:
        if self.end:
            self.world.broken = "tokens after the end"
        for token in tokens:
            if (self._state, token) not in self.world.said:
                self.world.broken = f"token {self.count} was said by nobody after those before it"
            self._state = extend(self._state, token)
            self.count += 1
            self.last = token

    def finished(
        self, reason: str, stop_reason: object, completion_tokens: int, reasoning_tokens: int = 0
    ) -> None:
        self._ended(reason)
        whole = self.last == EOS if reason == "stop" else self.count == self.max_tokens
        if not whole or completion_tokens != self.count:
            self.world.broken = f"ended by {reason} after {self.count} of {self.max_tokens} tokens"

    def failed(self, error: RequestError) -> None:
        self._ended(f"failed: {error}")
        if error.type == "request_poisoned" and self.world.kills[Role.WORKER] >= 3:
            return
        self.world.broken = self.end

    def _ended(self, reason: str) -> None:
        if self.end:
            self.world.broken = f"ended twice: {self.end}, {reason}"
        self.end = reason
        self.world.under_way -= 1


class World:
    """One stack and its faults."""

    def __init__(self, seed: int) -> None:
        self.make = random.Random(seed)
        self.now = 100.0
        self.epoch = 0
        self.incarnations = count(1)
        self.bound: dict[str, Process] = {}
        self.present: dict[str, Process] = {}
        """The latest life of each service, by name."""
        self.said: set[tuple[int, int]] = set()
        self.step_s = self.make.choice(STEP_S)
        self.kills = dict.fromkeys(Role, 0)
        self.disturbed = False
        self.decoding = Decoding(None)
        self.encoder = Encoder(None, None, self.decoding)
        self.clients: list[Client] = []
        self.broken = ""
        """What a client saw that it should not see."""
        self.under_way = 0
        """Requests that have not ended, of all that will ever come."""
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()
        self._connections: dict[tuple[Process, str], Connection] = {}
        self._lives: dict[str, int] = {}

    # --- time and messages ---

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what, arguments))

    def later(self, seconds: float, what: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + seconds, what, *arguments)

    def run_until(self, end: float, done: Callable[[], bool] = lambda: False) -> None:
        events = self._events
        while events and events[0][0] <= end and not done():
            self.now, _, what, arguments = heapq.heappop(events)
            what(*arguments)
            if self.broken:
                raise Violation(self.broken)
        if not done():
            self.now = max(self.now, end)

    def post(self, sender: Process, address: str, message: Message) -> None:
        """To arrive after what the same connection has been given before."""
        connection = self._connections.setdefault((sender, address), Connection(sender, address))
        make = self.make
        chance = make.random()
        delay = 0.0001 + 0.0003 * chance
        if self.disturbed and chance < 0.06:
            if chance < 0.03:
                delay += 0.1 * make.random()
            elif chance < 0.05:
                if isinstance(message, Deltas | Tokens | Submit):
                    self.later(delay + 0.4 * make.random(), self._arrive, address, message)
            elif _is_in_the_middle(message):
                return
        connection.last_arrival = max(connection.last_arrival, self.now + delay)
        connection.messages.append((self.now, message))
        self.at(connection.last_arrival, self._pump, connection)

    def _pump(self, connection: Connection) -> None:
        sender, address = connection.sender, connection.address
        if not connection.messages:  # it was dropped meanwhile
            return
        if address == SCHEDULER and address not in self.bound and sender.lives:
            self.later(0.05, self._pump, connection)
            return
        sent_at, message = connection.messages.popleft()
        if sent_at <= sender.lost_from:
            self._arrive(address, message, connection)

    def _arrive(self, address: str, message: Message, connection: Connection | None = None) -> None:
        process = self.bound.get(address)
        if process is not None:
            process.inbox.put(connection, message)
            process.wake()

    def drop_connection(self, sender: Process, address: str) -> None:
        """What it has brought comes late, whatever the sender's next connection brings; of what is
        on its way, the last messages may be lost."""
        connection = self._connections.pop((sender, address), None)
        process = self.bound.get(address)
        if connection is None or process is None:
            return
        under_way = [message for _, message in connection.messages]
        connection.messages.clear()
        kept = self.make.randrange(len(under_way) + 1)
        late = deque([*process.inbox.take_from(connection), *under_way[:kept]])
        self._bring_late(process, late)

    def _bring_late(self, process: Process, late: deque[Message]) -> None:
        """One of them, once the process reads again; the next ones a little later."""
        if not late or not process.lives:
            return
        if process.paused_until > self.now:
            self.at(process.paused_until, self._bring_late, process, late)
            return
        process.inbox.put(None, late.popleft())
        process.wake()
        pause_s = self.step_s if process.role is Role.WORKER else LATE_S
        self.later(2 * pause_s * self.make.random(), self._bring_late, process, late)

    # --- services ---

    def start(self, role: Role, name: str, load_s: float) -> None:
        """The next life of the service `name`."""
        life = self._lives.get(name, -1) + 1
        self._lives[name] = life
        if role is Role.SCHEDULER:
            self.present[name] = SchedulerProcess(self, name, life, load_s)
        elif role is Role.FRONTEND:
            self.present[name] = FrontendProcess(self, name, life, load_s)
        else:
            made = TokenizerProcess if role is Role.TOKENIZER else WorkerProcess
            self.present[name] = made(self, role, name, life, load_s)

    def kill(self, process: Process) -> None:
        """It ends here and now, and is started again; whoever starts it may say so."""
        if not process.lives:
            return
        process.lives = False
        self.kills[process.role] += 1
        if self.make.random() < 0.5:
            process.lost_from = self.now - 0.001 * self.make.random()
        for address in (process.address, SCHEDULER):
            if self.bound.get(address) is process:
                del self.bound[address]
        name = process.name
        pause = self.make.choice((0.0, 0.0, 0.5))
        if process.role is not Role.SCHEDULER and self.make.random() < 0.8:
            incarnation = int(process.incarnation)
            death = DeathMessage(process.role, name, incarnation, "was killed", 1, pause)
            self.later(0.05 * self.make.random(), self._arrive, SCHEDULER, death)
        again = 0.05 + pause + 0.2 * self.make.random()
        self.later(again, self.start, process.role, name, 0.05 + 0.2 * self.make.random())

    def fault(self) -> None:
        """One, to one process."""
        make = self.make
        names = [name for name in self.present if name != "frontend-0" or make.random() < 0.5]
        process = self.present[make.choice(names)]
        kind = make.choice(("kill", "kill", "kill", "stop", "pause", "freeze"))
        if process.role is Role.FRONTEND and kind in ("kill", "stop"):
            kind = make.choice(("pause", "freeze"))  # its clients would go with it
        match kind:
            case "kill":
                self.kill(process)
            case "stop":
                process.pause_until(self.now + 1e9)
                self.later(2.0 + 0.25 * make.random(), self.kill, process)
            case "pause":
                process.pause_until(self.now + 0.5 * make.random())
            case _:
                process.pause_until(self.now + 9.0 + 5.0 * make.random())

    # --- requests ---

    def submit(self, client: Client) -> None:
        """At a frontend that lives."""
        frontend = self.present[self.make.choice(("frontend-0", "frontend-1"))]
        assert isinstance(frontend, FrontendProcess)
        client.frontend = frontend
        job = Job(
            Prompt(ids=pack("i", client.prompt)),
            Sampling(seed=1, max_tokens=client.max_tokens),
            TextOptions(detokenize=False),
        )
        try:
            frontend.owner.submit(job, client)
        except RequestError as error:
            raise Violation(f"refused: {error}") from error

    def is_complete(self) -> bool:
        """All services are ready, and each frontend knows."""
        return all(process.is_ready for process in self.present.values()) and all(
            process.owner.is_complete
            for process in self.present.values()
            if isinstance(process, FrontendProcess)
        )

    def check_nothing_is_left(self) -> None:
        """Raises Violation for what any service still holds."""
        for process in self.present.values():
            if isinstance(process, SchedulerProcess):
                engine = process.state.engine
                engine.check()
                if engine.live or engine.queue.count or engine.parked:
                    raise Violation(f"{len(engine.live)} requests are left in the scheduler")
                for worker in engine.workers.values():
                    pool = worker.kv_cache.pool
                    if pool.available != pool.total:
                        raise Violation(f"{pool.total - pool.available} blocks are lost")
            elif isinstance(process, TokenizerProcess) and len(process.requests or ()):
                raise Violation(f"{len(process.requests or ())} streams are left in a tokenizer")
            elif isinstance(process, FrontendProcess) and len(process.owner):
                raise Violation(f"{len(process.owner)} requests are left in a frontend")


def _is_in_the_middle(message: Message) -> bool:
    """Rows that others must follow, so that their loss is seen, and nothing else."""
    if not isinstance(message, Deltas | Tokens) or message.ended or not message.tokens:
        return False
    if isinstance(message, Tokens) and message.placed:
        return False
    positions = unpack("i", message.positions)
    return max(positions) < 2 and EOS not in unpack("i", message.tokens).tolist()


@contextmanager
def _as_drawn(make: random.Random) -> Any:
    """Ids of requests come from the seed too, and nothing is logged."""
    ids = SimpleNamespace(token_bytes=make.randbytes)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with mock.patch.object(owned_request, "secrets", ids):
            yield
    finally:
        logging.disable(disabled)


def simulate(seed: int) -> World:
    """One stack, a few requests, a few faults at about the same time. Raises Violation, and what
    any service raises."""
    world = World(seed)
    make = world.make
    with _as_drawn(make):
        world.start(Role.SCHEDULER, "scheduler-0", 0.0)
        for number in range(make.choice((1, 1, 2))):
            world.start(Role.WORKER, f"worker-{number}", 0.02)
        for number in range(make.choice((1, 2))):
            world.start(Role.TOKENIZER, f"tokenizer-{number}", 0.02)
        for number in range(2):
            world.start(Role.FRONTEND, f"frontend-{number}", 0.02)
        world.run_until(world.now + 5.0, world.is_complete)
        if not world.is_complete():
            raise Violation("the stack does not start")
        world.disturbed = True
        at = world.now
        for _ in range(make.randrange(1, 4)):
            at += 0.02 * make.random()
            prompt = [make.randrange(VOCAB) for _ in range(make.randrange(1, 14))]
            client = Client(world, prompt, make.randrange(2, 16))
            world.clients.append(client)
            world.under_way += 1
            world.at(at, world.submit, client)
        for _ in range(make.randrange(1, 5)):
            at += 0.03 * make.random() if make.random() < 0.8 else 0.5 * make.random()
            world.at(at - 0.02, world.fault)
        world.run_until(at + 0.5)
        world.disturbed = False
        world.run_until(world.now + PATIENCE_S, lambda: not world.under_way)
        if world.under_way:
            raise Violation(f"{world.under_way} requests never end")
        while any(process.paused_until > world.now for process in world.present.values()):
            world.run_until(world.now + 1.0)
        world.run_until(world.now + QUIET_S)
        world.check_nothing_is_left()
    return world
