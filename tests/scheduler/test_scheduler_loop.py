"""The scheduler as a process: real sockets, the lock, signals and the exit."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from pagewire.config import SchedulerConfig
from pagewire.process.node import Node
from pagewire.scheduler import loop
from pagewire.scheduler.state import Tick
from pagewire_protocol.channels import NO_INCARNATION, Inbox, Outbox, inbox_address, take_epoch
from pagewire_protocol.messages import (
    Cancel,
    Hello,
    Role,
    Roster,
    Step,
    Submit,
    TokenizerFacts,
    Tokens,
    WorkerFacts,
    pack,
)
from pagewire_protocol.sampling import Sampling
from scheduler.scheduler_sim import VOCAB, SimWorker, expected_output, ints

PROGRAM = """
import sys
from pagewire.config import ModelConfig, RunConfig, SchedulerConfig
from pagewire.scheduler.loop import run
sys.exit(run(RunConfig(run_dir=sys.argv[1]), ModelConfig(), SchedulerConfig()))
"""


class Process:
    """One peer of the scheduler, driven by the test."""

    def __init__(self, role, run_dir):
        node = Node(run_dir, role, f"{role.name}-1")
        self.incarnation, self.inbox, self.outbox = node.incarnation, node.inbox, node.outbox
        self.membership = node.membership

    def drain(self, wait_s=0.02):
        self.membership.tick(time.monotonic())
        self.inbox.wait(wait_s)
        for message in self.inbox.drain():
            if isinstance(message, Roster):
                self.membership.on_roster(message)
            else:
                yield message

    def close(self):
        self.outbox.close()
        self.inbox.close()


@pytest.fixture
def run_dir():
    path = Path(tempfile.mkdtemp(prefix="pw-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(run_dir):
    """Starts schedulers in the run directory; all are gone after the test."""
    started = []

    def run():
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(run_dir)], stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def join(run_dir):
    """Makes peers; their sockets are closed after the test."""
    made = []

    def run(role):
        made.append(Process(role, run_dir))
        return made[-1]

    yield run
    for one in made:
        one.close()


def until(condition, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"


def stop(process):
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=5)
    return process.returncode, errors


def ready_worker(join):
    worker, sim = join(Role.WORKER), SimWorker(1)
    sim.incarnation = worker.incarnation
    worker.membership.ready(worker=WorkerFacts(32, 4, 8, 64, VOCAB, (), "sim"))
    return worker, sim


def work(worker, sim):
    for step in worker.drain():
        assert isinstance(step, Step)
        sim.inbox.append(step)
        sim.execute()
        worker.outbox.send(worker.membership.scheduler, sim.results.popleft())


def test_a_request_passes_through_real_sockets(run_dir, start, join):
    process = start()
    worker, sim = ready_worker(join)
    tokenizer = join(Role.TOKENIZER)
    tokenizer.membership.ready(tokenizer=TokenizerFacts(True, False, VOCAB))
    got, ends = [], []

    def serve():
        work(worker, sim)
        for message in tokenizer.drain():
            assert isinstance(message, Tokens)
            got.extend(ints(message.tokens))
            ends.extend(message.ended)
        return (
            tokenizer.membership.roster is not None
            and tokenizer.membership.roster.max_model_len == 64
        )

    until(serve, "roster with the worker's facts")
    sampling = Sampling(seed=0, max_tokens=20)
    submit = Submit(b"r" * 16, 1, 5, tokenizer.inbox.address, pack("i", [1, 2, 3]), b"", sampling)
    tokenizer.outbox.send(tokenizer.membership.scheduler, submit)
    until(lambda: serve() and ends, "end of the request")
    assert got == expected_output([1, 2, 3], sampling) and [end.handle for end in ends] == [5]
    hostile = Submit(b"s" * 16, 1, 6, "ipc://" + "x" * 200, pack("i", [1]), b"", sampling)
    tokenizer.outbox.send(tokenizer.membership.scheduler, hostile)
    tokenizer.outbox.send(
        tokenizer.membership.scheduler,
        Submit(b"t" * 16, 1, 7, "tcp://1.2.3.4:5", pack("i", [1]), b"", sampling),
    )
    tokenizer.outbox.send(
        tokenizer.membership.scheduler,
        Submit(b"u" * 16, 1, 8, tokenizer.inbox.address, pack("i", [4]), b"", sampling),
    )
    until(lambda: serve() and len(ends) == 2, "end of a request after hostile ones")
    began = time.monotonic()
    code, errors = stop(process)
    assert code == 0 and time.monotonic() - began < 2, errors
    assert not Path(inbox_address(run_dir, Role.SCHEDULER, 0).removeprefix("ipc://")).exists()


def test_peers_find_a_new_scheduler_with_a_higher_epoch(start, join):
    worker, sim = ready_worker(join)
    epochs = []
    for _ in range(2):
        process = start()

        def joined(process=process):
            work(worker, sim)
            roster = worker.membership.roster
            return roster is not None and roster.epoch not in epochs and roster.max_model_len == 64

        until(joined, "roster")
        epochs.append(worker.membership.roster.epoch)
        process.kill()
        process.wait()
    assert epochs == [1, 2]


def test_a_second_scheduler_says_why_it_does_not_start(run_dir, start):
    first = start()
    until(
        lambda: Path(inbox_address(run_dir, Role.SCHEDULER, 0).removeprefix("ipc://")).exists(),
        "socket",
    )
    second = start()
    _, errors = second.communicate(timeout=20)
    assert second.returncode == 1 and "already running" in errors.splitlines()[-1]
    assert stop(first)[0] == 0


class FullOutbox(Outbox):
    """An outbox whose queue to one inbox is full."""

    def __init__(self, full):
        super().__init__()
        self.full, self.sent, self.forgotten = full, [], []

    def send(self, address, message):
        if address == self.full:
            return False
        self.sent.append((address, message))
        return True

    def forget(self, address):
        self.forgotten.append(address)


def test_a_peer_that_takes_nothing_is_dropped_after_the_event():
    outbox = FullOutbox("ipc:///w1")
    made = loop.Loop(1, SchedulerConfig(), None, outbox)
    worker, healthy = SimWorker(1), SimWorker(2)
    for event in (
        Hello(worker.peer, worker.facts),
        Hello(healthy.peer, healthy.facts),
        Tick(1.0),
    ):
        made.handle(event)
    assert list(made.state.engine.workers) == [healthy.incarnation]
    assert set(outbox.forgotten) == {"ipc:///w1"}
    assert {address for address, _ in outbox.sent} == {"ipc:///w2"}
    assert not made._unreachable


def test_a_process_that_hears_no_scheduler_says_so_once(run_dir, caplog):
    alone = Process(Role.WORKER, run_dir)
    alone.membership.ready()
    for now in range(100, 130):
        alone.membership.tick(float(now))
    alone.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(run_dir) in line and "--run-dir" in line


def test_results_go_before_new_requests_which_are_taken_in_slices(run_dir):
    """The clock goes forward by a millisecond each time it is read: a request takes that long."""
    epoch, lock = take_epoch(run_dir)
    inbox = Inbox(run_dir, Role.SCHEDULER, NO_INCARNATION)
    made = loop.Loop(epoch, SchedulerConfig(), inbox, Outbox())
    try:
        made.handle(Tick(0.0))
        for number in range(100):
            rid = number.to_bytes(16, "big")
            made._arrivals.append(
                Submit(rid, 1, number, "ipc:///nowhere", pack("i", [5]), b"", Sampling(1, 4))
            )
            made._arrivals.append(Cancel(((rid, 1),)))
        milliseconds = itertools.count()
        while made._arrivals:
            before = len(made._arrivals)
            made.take_arrivals(lambda: next(milliseconds) / 1000)
            assert 1 <= before - len(made._arrivals) <= 1000 * loop.SLICE_S + 1
        assert not made.state.engine.live, "each cancellation found its request"
    finally:
        made.outbox.close()
        inbox.close()
        os.close(lock)
