"""The worker's process: introduces itself, loads, then turns Steps into StepResults until it is told to stop. Knows no tensors.

torch is imported while loading, after the first Hello, so that /health can say what is going on.
"""

import gc
import logging
import os
import signal
import sys
import time
from typing import Protocol

from pagewire_protocol.channels import Inbox, Outbox, new_incarnation, prepare_run_dir
from pagewire_protocol.messages import Role, Roster, Step, StepResult, ToWorker, WorkerFacts

from ..config import ModelConfig, RunConfig, SchedulerConfig, WorkerConfig
from ..membership import HEARTBEAT_S, Membership

log = logging.getLogger("pagewire.worker")
SAY_EVERY_S = 0.2


class Runs(Protocol):
    """What the loop wants of a runner."""

    def facts(self) -> WorkerFacts: ...
    def execute(self, step: Step) -> StepResult: ...
    def clear(self) -> None: ...


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


def _stop(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def run(run: RunConfig, model: ModelConfig, scheduler: SchedulerConfig, config: WorkerConfig) -> int:
    """Serve until SIGTERM or SIGINT. 0 after an orderly stop, 1 when the model cannot be loaded or run: stderr's last line says why."""
    run_dir, incarnation = prepare_run_dir(run.run_dir), new_incarnation()
    inbox: Inbox[ToWorker] = Inbox(run_dir, Role.WORKER, incarnation)
    outbox = Outbox()
    membership = Membership(Role.WORKER, run.name or f"worker-{os.getpid()}", incarnation, inbox, outbox, run_dir)
    status = 0
    try:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        membership.hello()
        began = time.monotonic()
        runner = _load(model, scheduler, config, incarnation, membership)
        membership.ready(worker=runner.facts())
        gc.collect()
        gc.freeze()
        log.info("ready after %.1f s", time.monotonic() - began)
        _serve(runner, inbox, outbox, membership)
    except Stopped:
        log.info("stopped")
    except Exception as error:
        status = 1
        log.debug("the worker failed", exc_info=True)
        print(f"pagewire worker: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    membership.goodbye()
    inbox.close()
    outbox.close(linger_ms=500)
    return status


def _load(model: ModelConfig, scheduler: SchedulerConfig, config: WorkerConfig, incarnation: int, membership: Membership) -> Runs:
    if config.device == "fake":
        from .fake import FakeRunner

        return FakeRunner(model, scheduler, config, incarnation)
    from ..hub import resolve

    path = resolve(model, lambda line: membership.loading(line[:256]))
    membership.loading("importing torch")
    from .runner import Runner

    return Runner(path, model, scheduler, config, incarnation, _Narrator(membership), lambda: membership.tick(time.monotonic()))


class _Narrator:
    """Passes progress on, but not more often than people can read."""

    def __init__(self, membership: Membership) -> None:
        self._membership, self._stage, self._next = membership, "", 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        if stage != self._stage or now >= self._next:
            self._stage, self._next = stage, now + SAY_EVERY_S
            self._membership.loading(stage, fraction)


def _serve(runner: Runs, inbox: Inbox[ToWorker], outbox: Outbox, membership: Membership) -> None:
    """Until Stopped. Steps run in the order they came; those of an older scheduler than the newest one heard of are ignored."""
    epoch = 0
    while True:
        membership.busy = inbox.wait(HEARTBEAT_S / 2)
        membership.tick(time.monotonic())
        for message in inbox.drain():
            if message.epoch > epoch:
                epoch = message.epoch
                runner.clear()
            match message:
                case Roster():
                    membership.on_roster(message)
                case Step() if message.epoch == epoch:
                    if not outbox.send(membership.scheduler, runner.execute(message)):
                        log.error("the result of step %d is lost: the scheduler's queue is full", message.n)
                    membership.progress += 1
                case Step():
                    log.warning("a step of epoch %d came after epoch %d: ignored", message.epoch, epoch)
