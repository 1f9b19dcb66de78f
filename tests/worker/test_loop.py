"""The worker as a process, with this test for a scheduler: hello, loading, ready, steps, epochs, an
orderly end."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from pagewire.config import DEMO_MODEL, ModelConfig, RunConfig, SchedulerConfig
from pagewire.process.errors import error_line
from pagewire.worker.loop import Stopped, _Server
from pagewire.worker.step_watch import FACTOR, SAMPLES, StepWatch, Stuck
from pagewire_protocol.channels import Inbox, Outbox, new_incarnation, prepare_run_dir
from pagewire_protocol.messages import (
    Admission,
    Goodbye,
    Heartbeat,
    Hello,
    Role,
    Roster,
    Shutdown,
    Step,
    StepResult,
    pack,
    unpack,
)
from pagewire_protocol.sampling import Sampling

PROGRAM = """
import sys, msgspec
from pagewire.config import ModelConfig, RunConfig, SchedulerConfig, WorkerConfig
from pagewire.worker.loop import run
parts = msgspec.json.decode(sys.argv[1])
kinds = (RunConfig, ModelConfig, SchedulerConfig, WorkerConfig)
sys.exit(run(*(msgspec.convert(part, kind) for part, kind in zip(parts, kinds))))
"""


class Worker:
    def __init__(self, run_dir, model: str, **settings) -> None:
        import msgspec

        parts = (
            RunConfig(run_dir=str(run_dir)),
            ModelConfig(model=model),
            SchedulerConfig(max_num_seqs=4),
            settings,
        )
        self.directory = prepare_run_dir(str(run_dir))
        self.inbox = Inbox(self.directory, Role.SCHEDULER, new_incarnation())
        self.outbox = Outbox()
        arguments = [sys.executable, "-c", PROGRAM, msgspec.json.encode(parts).decode()]
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        self.address = ""
        self.seen: list = []

    def wait_for(self, wanted, seconds: float = 60.0):
        """The first message, old or new, that `wanted` accepts."""
        checked, until = 0, time.monotonic() + seconds
        while time.monotonic() < until:
            for message in self.seen[checked:]:
                checked += 1
                if wanted(message):
                    self.seen = self.seen[checked:]
                    return message
            if self.process.poll() is not None and not self.inbox.wait(0):
                raise AssertionError(
                    f"the worker ended with {self.process.returncode}: {self.process.stderr.read()}"
                )
            self.inbox.wait(0.1)
            self.seen += self.inbox.drain()
        raise AssertionError("the worker did not send what was awaited")

    def send(self, message) -> None:
        assert self.outbox.send(self.address, message)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.inbox.close()
        self.outbox.close()


@pytest.fixture
def start(tmp_path_factory):
    started = []

    def make(model: str = DEMO_MODEL, **settings) -> Worker:
        started.append(Worker(tmp_path_factory.mktemp("run"), model, **settings))
        return started[-1]

    yield make
    for worker in started:
        worker.close()


def roster(epoch: int) -> Roster:
    return Roster(epoch, (), 0, 0, (), False, False)


def step(epoch: int, n: int, prompt: list[int]) -> Step:
    admission = Admission(
        0,
        n,
        pack("i", prompt),
        b"",
        pack("i", [3]),
        0,
        Sampling(seed=0, max_tokens=5, temperature=0.0),
    )
    return Step(
        epoch, n, admit=(admission,), run_slots=pack("i", [0]), run_counts=pack("i", [len(prompt)])
    )


def test_life_of_a_worker(start, tiny, numbers):
    reference, prompt = tiny("llama"), numbers(5)
    worker = start(str(reference.path), device="cpu", dtype="float32", num_kv_blocks=64, threads=1)
    first = worker.wait_for(lambda m: isinstance(m, Hello))
    assert (
        first.peer.role is Role.WORKER
        and not first.peer.ready
        and first.peer.name == f"worker-{worker.process.pid}"
    )
    stages = worker.wait_for(lambda m: isinstance(m, Hello) and m.peer.stage == "importing torch")
    assert stages.worker is None
    ready = worker.wait_for(lambda m: isinstance(m, Hello) and m.peer.ready)
    assert ready.worker.num_blocks == 64 and ready.worker.max_num_seqs == 4
    worker.address = ready.peer.inbox
    worker.send(roster(3))
    worker.send(step(3, 1, prompt))
    result = worker.wait_for(lambda m: isinstance(m, StepResult))
    wanted = int(reference.logits(prompt)[-1].argmax())
    assert (result.epoch, result.n, result.incarnation, list(unpack("i", result.tokens))) == (
        3,
        1,
        ready.peer.incarnation,
        [wanted],
    )
    worker.send(step(2, 2, prompt))
    worker.send(step(4, 3, prompt))
    result = worker.wait_for(lambda m: isinstance(m, StepResult))
    assert (result.epoch, result.n) == (4, 3), (
        "an older epoch's step is ignored, a newer one clears slot 0"
    )
    worker.send(roster(5))
    worker.send(step(5, 4, prompt))
    assert worker.wait_for(lambda m: isinstance(m, StepResult)).n == 4
    assert worker.wait_for(lambda m: isinstance(m, Heartbeat) and m.progress == 3)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(5) == 0
    assert worker.wait_for(lambda m: isinstance(m, Goodbye)).incarnation == ready.peer.incarnation
    assert not list(worker.directory.glob("worker-*.sock"))


def test_fake_device_needs_no_torch(start):
    worker = start(device="fake", fake_vocab_size=50)
    ready = worker.wait_for(lambda m: isinstance(m, Hello) and m.peer.ready, 20)
    assert (ready.worker.device, ready.worker.vocab_size) == ("fake", 50)
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait(5) == 0


def test_stopping_while_loading(start, tiny):
    worker = start(str(tiny("llama").path), device="cpu")
    worker.wait_for(lambda m: isinstance(m, Hello) and m.peer.stage == "importing torch")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(10) == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_kv_blocks": 10**9}, "the model needs"),
        ({"dtype": "float32", "cpu_kv_cache_gb": 1e-9}, "a context of 1 tokens needs 1 KV blocks"),
    ],
)
def test_failure_names_its_reason_on_the_last_line(settings, reason, start, tiny):
    worker = start(str(tiny("llama").path), device="cpu", threads=1, **settings)
    assert worker.process.wait(60) == 1
    assert (
        worker.process.stderr.read()
        .strip()
        .splitlines()[-1]
        .startswith(f"pagewire worker: {reason}")
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too small; raise it"), "too small; raise it"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (KeyError("name"), "KeyError: 'name'"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (ValueError(), "ValueError: "),
    ],
)
def test_only_defects_name_their_kind(error, line):
    assert error_line(error) == line


def run_steps(watch, count, seconds, prefill_tokens=0, now=0.0):
    for _ in range(count):
        watch.launched(prefill_tokens, now)
        now += seconds
        watch.ended(now)
    return now


def overdue(watch, now):
    """After how many seconds from `now` on the watch complains, looking ten times a second."""
    for tenths in range(100_000):
        try:
            watch.look(now + tenths / 10)
        except Stuck:
            return tenths / 10
    raise AssertionError("it never complains")


def test_a_step_that_never_ends_is_noticed_by_what_its_like_take():
    watch = StepWatch(least_s=5.0, unknown_s=60.0)
    watch.launched(0, 0.0)
    assert overdue(watch, 0.0) == pytest.approx(60, abs=0.2), "nothing is known yet"
    watch.clear()
    now = run_steps(watch, SAMPLES, 0.01)
    watch.launched(0, now)
    watch.launched(0, now)
    assert overdue(watch, now) == pytest.approx(5, abs=0.2)
    watch.clear()
    now = run_steps(watch, 1, 2.0, now=now)
    watch.launched(0, now)
    assert overdue(watch, now) == pytest.approx(2 * FACTOR, abs=0.2)


def test_steps_with_prefill_are_compared_by_the_token():
    watch = StepWatch(least_s=5.0, unknown_s=60.0)
    now = run_steps(watch, SAMPLES, 1.0, prefill_tokens=100)
    watch.launched(1000, now)
    assert overdue(watch, now) == pytest.approx(FACTOR * 10, abs=0.5)
    watch.clear()
    watch.launched(10, now)
    assert overdue(watch, now) == pytest.approx(25, abs=0.2)


def test_a_pause_of_the_machine_is_no_fault_of_the_step():
    watch = StepWatch(least_s=5.0, unknown_s=60.0)
    watch.launched(0, 0.0)
    watch.look(1.0)
    watch.look(1000.0)
    assert overdue(watch, 1000.0) == pytest.approx(59, abs=0.2)


STAND_IN = """
import sys
from pagewire.config import *
from pagewire.worker import loop
class Flight:
    def done(self): {done}
class Broken:
    def __init__(self, inner): self.facts, self.clear = inner.facts, inner.clear
    def notify(self, wake, meanwhile): pass
    def idle(self): pass
    def launch(self, step): return Flight()
load = loop._load
loop._load = lambda *given: Broken(load(*given))
loop.GPU_STUCK_S = (1.0, 1.0)
import atexit, time
atexit.register(time.sleep, 100)
run_dir = __import__('json').loads(sys.argv[1])[0]['run_dir']
sys.exit(loop.run(RunConfig(run_dir=run_dir), ModelConfig(), SchedulerConfig(max_num_seqs=4), WorkerConfig(device="fake")))
"""


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        ("return False", "no step has ended for"),
        (
            "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
            "RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
    ],
)
def test_a_worker_whose_device_hangs_or_fails_ends_at_once(done, reason, start, monkeypatch):
    """It does not wait for what an orderly exit would do: with a failed device that may hang."""
    monkeypatch.setitem(globals(), "PROGRAM", STAND_IN.format(done=done))
    worker = start(device="fake")
    ready = worker.wait_for(lambda m: isinstance(m, Hello) and m.peer.ready, 20)
    worker.address = ready.peer.inbox
    worker.send(roster(1))
    worker.send(step(1, 1, [5, 6]))
    goodbye = worker.wait_for(lambda m: isinstance(m, Goodbye), 20)
    assert goodbye == Goodbye(ready.peer.incarnation, failed=True)
    assert worker.process.wait(10) == 1
    assert reason in worker.process.stderr.read().strip().splitlines()[-1]


def test_a_distrusted_worker_ends_when_it_is_told_to(start):
    worker = start(device="fake")
    ready = worker.wait_for(lambda m: isinstance(m, Hello) and m.peer.ready, 20)
    worker.address = ready.peer.inbox
    worker.send(roster(2))
    worker.send(Shutdown(1, "a former scheduler"))
    worker.send(step(2, 1, [5, 6]))
    worker.wait_for(lambda m: isinstance(m, StepResult))
    worker.send(Shutdown(2, "it answered step 9"))
    assert worker.process.wait(10) == 1
    last = worker.process.stderr.read().strip().splitlines()[-1]
    assert last == "pagewire worker: ended by the scheduler: it answered step 9"


class AlwaysMore:
    """The inbox of a worker under load: there is always another message."""

    frame = b""

    def __init__(self, messages):
        self.messages = messages

    def wake(self): ...

    def wait(self, timeout_s):
        return True

    def drain(self):
        yield from self.messages
        raise Stopped


def test_a_step_that_comes_after_newer_ones_is_void():
    """A worker that was frozen, given up and taken back finds steps of two connections in its inbox.
    An old one between the new ones moved its slots on behind the scheduler's back: each stream lost
    a token."""
    numbers = [(1, 1), (1, 2), (1, 5), (1, 3), (1, 4), (1, 6), (2, 1), (2, 1), (2, 2)]
    launched = []

    def launch(step):
        launched.append((step.epoch, step.n))
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    membership = SimpleNamespace(busy=False, progress=0, scheduler="", tick=lambda now: None)
    outbox = SimpleNamespace(send=lambda address, message: True)
    inbox = AlwaysMore([Step(epoch, n) for epoch, n in numbers])
    node = SimpleNamespace(inbox=inbox, outbox=outbox, membership=membership)
    runner = SimpleNamespace(
        notify=lambda *calls: None, clear=lambda: None, catch_up=lambda: None, launch=launch
    )
    with pytest.raises(Stopped):
        _Server(runner, node).serve()
    assert launched == [(1, 1), (1, 2), (1, 5), (1, 6), (2, 1), (2, 2)]


def test_a_step_may_clear_all_slots_first():
    """Of a worker that was given up and taken back, steps that retired or admitted may have been
    void: the requests of before are forgotten, also by the other ranks, and so are their results."""
    calls = []
    never = SimpleNamespace(done=lambda: False)

    def launch(step):
        calls.append(step.n)
        return never

    membership = SimpleNamespace(busy=False, progress=0, scheduler="", tick=lambda now: None)
    inbox = AlwaysMore([Step(1, 1), Step(1, 2), Step(1, 3, clear=True), Step(1, 4)])
    inbox.frame = b""
    node = SimpleNamespace(inbox=inbox, outbox=None, membership=membership)
    runner = SimpleNamespace(
        notify=lambda *calls: None, clear=lambda: calls.append("clear"), launch=launch
    )
    leader = SimpleNamespace(step=lambda frame: None, clear=lambda: calls.append("all ranks"))
    server = _Server(runner, node, watched=False, leader=leader)
    with pytest.raises(Stopped):
        server.serve()
    assert calls == ["all ranks", "clear", 1, 2, "all ranks", "clear", 3, 4]
    assert len(server._steps) == 2


def test_the_heart_beats_between_messages():
    """However many are waiting: looked at in one go, a thousand steps take longer than the patience
    of whoever listens for the heart."""
    ticks = []
    membership = SimpleNamespace(busy=False, progress=0, scheduler="", tick=ticks.append)
    outbox = SimpleNamespace(send=lambda address, message: True)
    node = SimpleNamespace(
        inbox=AlwaysMore([Step(1, n) for n in range(1, 1001)]), outbox=outbox, membership=membership
    )
    done = SimpleNamespace(done=lambda: True, result=lambda: None)
    runner = SimpleNamespace(
        notify=lambda *calls: None,
        clear=lambda: None,
        catch_up=lambda: None,
        launch=lambda step: done,
    )
    with pytest.raises(Stopped):
        _Server(runner, node).serve()
    assert membership.progress == 1000 and len(ticks) >= 1000


def test_results_leave_while_the_next_step_is_launched():
    """It may wait for masks, and its tokens come later than all others."""
    sent: list[int] = []
    meanwhile = []
    membership = SimpleNamespace(busy=False, progress=0, scheduler="", tick=lambda now: None)
    outbox = SimpleNamespace(send=lambda address, result: sent.append(result) or True)
    inbox = AlwaysMore([Step(1, n) for n in range(1, 5)])
    node = SimpleNamespace(inbox=inbox, outbox=outbox, membership=membership)
    ended = 0

    def launch(step):
        nonlocal ended
        ended = step.n - 1
        meanwhile[0]()
        assert sent == list(range(1, step.n))
        return SimpleNamespace(done=lambda: step.n <= ended, result=lambda: step.n)

    runner = SimpleNamespace(
        notify=lambda wake, call: meanwhile.append(call),
        clear=lambda: None,
        catch_up=lambda: None,
        launch=launch,
    )
    with pytest.raises(Stopped):
        _Server(runner, node).serve()
    assert sent == [1, 2, 3]


def test_results_leave_before_the_next_step_is_launched_and_what_can_wait_comes_behind():
    happened = []
    membership = SimpleNamespace(busy=False, progress=0, scheduler="", tick=lambda now: None)
    full = [True]
    outbox = SimpleNamespace(
        send=lambda address, result: not full.pop() if full else happened.append(result) or True
    )
    inbox = AlwaysMore([Step(1, n) for n in range(1, 4)])
    node = SimpleNamespace(inbox=inbox, outbox=outbox, membership=membership)

    def launch(step):
        happened.append(f"launch {step.n}")
        looks = iter([False])  # done at the second look, which comes with the next step
        return SimpleNamespace(done=lambda: next(looks, True), result=lambda: f"result {step.n}")

    runner = SimpleNamespace(
        notify=lambda *calls: None,
        clear=lambda: None,
        launch=launch,
        catch_up=lambda: happened.append("catch up"),
    )
    with pytest.raises(Stopped):
        _Server(runner, node).serve()
    assert happened == [
        "launch 1",
        "launch 2",  # the scheduler's queue was full
        "result 1",
        "catch up",
        "result 2",
        "catch up",
        "launch 3",
    ]


class Quiet:
    """An inbox with what came, by turns: a message, a mere wake, or nothing for as long as was
    waited."""

    frame = b""

    def __init__(self, turns):
        self.turns = list(turns)
        self.waits = []
        self.message = None

    def wake(self): ...

    def wait(self, timeout_s):
        if not self.turns:
            raise Stopped
        self.waits.append(timeout_s)
        self.message = self.turns.pop(0)
        return self.message is not None

    def drain(self):
        if isinstance(self.message, Step):
            yield self.message


def test_what_was_put_off_is_done_when_nothing_has_come_for_a_while():
    """Not between two steps, nor while one is under way: a capture holds up what comes next, and
    another thread may wait for the GPU just then."""
    membership = SimpleNamespace(busy=False, progress=0, scheduler="", tick=lambda now: None)
    outbox = SimpleNamespace(send=lambda address, message: True)
    wake = object()
    inbox = Quiet([None, None, Step(1, 1), wake, None, wake, wake, None, None, None])
    node = SimpleNamespace(inbox=inbox, outbox=outbox, membership=membership)
    put_off = [False, True, True]
    idle_at = []

    def idle():
        idle_at.append(len(inbox.waits))
        return put_off.pop() if put_off else False

    # The step ends with the second wake.
    step_handle = SimpleNamespace(done=lambda: len(inbox.waits) >= 6, result=lambda: None)
    runner = SimpleNamespace(
        notify=lambda *calls: None,
        clear=lambda: None,
        catch_up=lambda: None,
        launch=lambda step: step_handle,
        idle=idle,
    )
    with pytest.raises(Stopped):
        _Server(runner, node).serve()
    assert idle_at == [1, 2, 8, 9, 10]
    briefly = [wait < 0.1 for wait in inbox.waits]
    assert briefly == [False, True, True, False, False, False, False, False, False, False]
