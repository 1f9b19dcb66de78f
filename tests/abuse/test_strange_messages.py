"""Messages of the right types that say nonsense, to each service: none ends it, and a good request
afterwards is served. Whoever can write to the run directory's sockets can send them."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from api.conftest import Server, serve
from hypothesis import HealthCheck, given, settings
from msgspec import inspect as wire
from pagewire.config import ModelConfig, RunConfig, SchedulerConfig, TokenizerConfig
from pagewire.scheduler.loop import Loop
from pagewire.scheduler.state import Tick
from pagewire.tokenizer.service import Service, Text
from pagewire_protocol.channels import (
    NO_INCARNATION,
    Inbox,
    Outbox,
    prepare_run_dir,
    take_epoch,
)
from pagewire_protocol.messages import (
    Deltas,
    Generate,
    Hello,
    Message,
    Peer,
    Placed,
    Prompt,
    Role,
    Roster,
    Step,
    StepResult,
    Submit,
    Tokenize,
    Tokenized,
    Tokens,
    ToScheduler,
    ToTokenizer,
    WorkerFacts,
    pack,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from protocol.test_wire_types import values

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
FRONTEND = "ipc:///tmp/pw-none/frontend.sock"
X = 1 << 43


def anything_to(union: Any) -> Any:
    return values(wire.type_info(union))


@contextlib.contextmanager
def run_directory() -> Iterator[Any]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        yield prepare_run_dir(folder)


# --- the scheduler


class SchedulerStand:
    """A scheduler with a worker and a tokenizer, whose messages are kept."""

    def __init__(self, run_dir: Any) -> None:
        epoch, self._lock = take_epoch(run_dir)
        inbox: Inbox[ToScheduler] = Inbox(run_dir, Role.SCHEDULER, NO_INCARNATION)
        self.loop = Loop(epoch, SchedulerConfig(), inbox, Outbox())
        self.sent: list[Message] = []
        self.loop.state._send = lambda inbox, message: self.sent.append(message)
        self._now = itertools.count()
        self._handles = itertools.count(1)
        self._incarnations = itertools.count(100)
        self.loop.handle(Tick(0.0))

    def close(self) -> None:
        self.loop.outbox.close()
        self.loop.inbox.close()
        os.close(self._lock)

    def serves(self) -> bool:
        """Whether a new worker and a new request of a new tokenizer come together."""
        incarnation = next(self._incarnations)
        worker = Peer(
            Role.WORKER, f"w{incarnation}", f"ipc:///tmp/w{incarnation}", incarnation, True
        )
        facts = WorkerFacts(64, 16, 8, 512, 1000, (), "fake")
        self.loop.handle(Hello(worker, facts))
        handle = next(self._handles)
        rid = handle.to_bytes(16, "big")
        reply_to = f"ipc:///tmp/t{incarnation}"
        column = pack("i", [5, 6])
        self.loop.handle(
            Submit(rid, 1, handle, reply_to, column, b"", Sampling(1, 4), priority=-(2**31))
        )
        self.sent.clear()
        for _ in range(3):
            self.loop.handle(Tick(1.0 + next(self._now) / 1000))
        return any(isinstance(message, Step) for message in self.sent)


@pytest.fixture
def scheduler() -> Iterator[SchedulerStand]:
    with run_directory() as run_dir:
        stand = SchedulerStand(run_dir)
        yield stand
        stand.close()


@FUZZ
@given(anything_to(ToScheduler))
def test_no_message_ends_the_scheduler(scheduler: SchedulerStand, message: ToScheduler):
    scheduler.loop.handle(message)
    scheduler.loop.handle(Tick(0.5))


def test_a_result_with_odd_columns_costs_its_worker_alone(scheduler: SchedulerStand):
    for column in (b"abc", b"", pack("i", [9] * 3)):
        assert scheduler.serves()
        step = next(message for message in scheduler.sent if isinstance(message, Step))
        for incarnation in list(scheduler.loop.state.engine.workers):
            scheduler.loop.handle(
                StepResult(1, incarnation, step.n, column, column, column, counts=column)
            )
    assert scheduler.serves()


# --- the tokenizer


class TokenizerStand:
    def __init__(self, run_dir: Any) -> None:
        self.service = Service(RunConfig(str(run_dir)), ModelConfig(), TokenizerConfig())
        self.service._loaded.put(Text(None))
        self.service._finish_loading()
        self.roster = Roster(
            1, (Peer(Role.FRONTEND, "f", FRONTEND, 5, True),), 512, 1000, (), False, False
        )
        self._handles = itertools.count()

    def take(self, *messages: ToTokenizer) -> None:
        self.service.inbox.drain = lambda limit=0: iter(messages)  # type: ignore[method-assign]
        self.service._drain()
        self.service._send()

    def serves(self) -> bool:
        """Whether a request becomes a Submit, and tokens become text for the frontend."""
        handle = next(self._handles)
        request = Generate(
            os.urandom(16),
            1,
            handle,
            FRONTEND,
            Prompt(ids=pack("i", [5, 6])),
            b"",
            Sampling(1, 4),
            TextOptions(),
        )
        requests = self.service.requests
        assert requests is not None
        requests.on_roster(self.roster, False)
        sent: list[Message] = []
        self.service.outbox.send = lambda _, message: sent.append(message) or True  # type: ignore
        self.take(request)
        (submit,) = [message for message in sent if isinstance(message, Submit)]
        columns = pack("I", [submit.handle]), pack("I", [1]), pack("Q", [X]), pack("i", [0])
        placed = (Placed(submit.handle, 1, 0),)
        self.take(Tokens(*columns, pack("i", [7]), placed))
        del self.service.outbox.send
        return sent[-1].tokens == pack("i", [7])  # type: ignore[attr-defined]


@pytest.fixture
def tokenizer() -> Iterator[TokenizerStand]:
    with run_directory() as run_dir:
        stand = TokenizerStand(run_dir)
        yield stand
        stand.service.close()


@FUZZ
@given(anything_to(ToTokenizer))
def test_no_message_ends_the_tokenizer(tokenizer: TokenizerStand, message: ToTokenizer):
    if isinstance(message, Roster):
        message = tokenizer.roster  # one of a later epoch would be heeded from then on
    tokenizer.take(message)


def test_an_address_that_is_none_costs_its_sender_alone(tokenizer: TokenizerStand):
    assert tokenizer.serves()
    for reply_to in ("x", "tcp://127.0.0.1:1", "ipc://" + "y" * 200):
        prompt = Prompt(ids=pack("i", [5]))
        request = Generate(
            os.urandom(16), 1, 1, reply_to, prompt, b"", Sampling(1, 4), TextOptions()
        )
        tokenizer.take(request, Tokenize(1, reply_to, prompt))
        assert tokenizer.serves()


def test_a_fault_of_the_tokenizer_costs_one_request_alone(
    tokenizer: TokenizerStand, monkeypatch: pytest.MonkeyPatch
):
    requests = tokenizer.service.requests
    assert requests is not None
    requests.roster = tokenizer.roster

    def broken(*_: object) -> None:
        raise RuntimeError("a fault")

    sent: list[Any] = []
    prompt = Prompt(ids=pack("i", [5]))
    request = Generate(os.urandom(16), 1, 77, FRONTEND, prompt, b"", Sampling(1, 4), TextOptions())
    with monkeypatch.context() as patch:
        patch.setattr(requests, "generate", broken)
        patch.setattr(tokenizer.service.outbox, "send", lambda _, m: sent.append(m) or True)
        tokenizer.take(request)
    (end,) = next(message for message in sent if isinstance(message, Deltas)).ended
    assert (end.handle, end.status) == (77, 500)
    assert tokenizer.serves()


# --- the frontend


@pytest.fixture(scope="module")
def frontend() -> Iterator[Server]:
    with serve() as server:
        yield server


def test_no_message_ends_a_frontend(frontend: Server):
    service = frontend.frontend.service

    @FUZZ
    @given(anything_to(Deltas | Tokenized))
    def check(message: Deltas | Tokenized) -> None:
        with contextlib.suppress(Exception):  # what its loop logs
            service._handle(message)

    check()
    assert frontend.complete("hi").status_code == 200


def test_addresses_are_judged_as_they_are_decoded():
    good = Hello(Peer(Role.WORKER, "w", "ipc:///tmp/x.sock", 1, False))
    frame = msgspec.msgpack.encode(good)
    decode: Callable[..., Any] = msgspec.msgpack.decode
    assert decode(frame, type=ToScheduler) == good
    for address in (b"tcp:///tmp/x.sock", b"ipc:/\x00/tmp/x.sock", b"ipc://@tmp/x.sock"):
        with pytest.raises(msgspec.ValidationError):
            decode(frame.replace(b"ipc:///tmp/x.sock", address), type=ToScheduler)
