"""The worker's process: introduces itself, loads, then turns Steps into StepResults until it is
told to stop. Knows no tensors.

torch is imported while loading, after the first Hello, so that /health can say what is going on.
"""

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

from pagewire_kernels import cpu_native
from pagewire_protocol.messages import Role, Roster, Step, ToWorker

from ..checkpoint import quantization
from ..checkpoint.json_files import read_object
from ..config import ModelConfig, RunConfig, SchedulerConfig, WorkerConfig
from ..process.errors import EXPECTED, error_line
from ..process.imports import imported
from ..process.membership import HEARTBEAT_S, Membership
from ..process.node import Node, settle_gc
from .device import driver
from .runners import AsyncFromSync, AsyncRunner, StepHandle

log = logging.getLogger("pagewire.worker")
REPORT_EVERY_S = 0.2
LINGER_S = 0.5
"""The last messages leave by another thread, which an exit that is not orderly does not wait
for."""
STUCK_S = 60.0
"""Far beyond any step: those that compile or capture something do so before they are under way."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of mallopt(3)."""
SPIN_COUNT = "10000"
"""How long OpenMP threads spin for each other (the GNU run-time reads it when torch loads). By
default they spin for milliseconds: a few percent faster where cores are idle, tens of times slower
where another process wants one."""


class Stuck(Exception):
    """A step does not end: the GPU hangs in a kernel."""


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


def _stop(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def run(
    run: RunConfig, model: ModelConfig, scheduler: SchedulerConfig, config: WorkerConfig
) -> int:
    """Serve until SIGTERM or SIGINT. 0 after an orderly stop, 1 when the model cannot be loaded or
    run: stderr's last line says why."""
    node: Node[ToWorker] = Node(run.run_dir, Role.WORKER, run.name)
    membership = node.membership
    status, stuck = 0, False
    try:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        membership.hello()
        began = time.monotonic()
        runner = _load(node, model, scheduler, config)
        membership.ready(worker=runner.facts())
        settle_gc()
        log.info("ready after %.1f s", time.monotonic() - began)
        _serve(runner, node)
    except Stopped:
        log.info("stopped")
    except Exception as error:
        status = 1
        log.debug("the worker failed", exc_info=True)
        print(
            f"pagewire worker: {error_line(error, (*EXPECTED, Stuck))}", file=sys.stderr, flush=True
        )
        stuck = isinstance(error, Stuck)
    membership.goodbye()
    node.close(linger_ms=500)
    if stuck:
        time.sleep(LINGER_S)
        os._exit(status)  # an orderly exit would wait for the GPU
    return status


def _load(
    node: Node[ToWorker], model: ModelConfig, scheduler: SchedulerConfig, config: WorkerConfig
) -> AsyncRunner:
    incarnation = node.incarnation
    membership = node.membership
    if config.device == "fake":
        from .fake import FakeRunner

        return AsyncFromSync(
            FakeRunner(model, scheduler, config, incarnation), _Narrator(membership).alive
        )
    from ..hub.huggingface import resolve

    path = resolve(model, lambda line: membership.loading(line[:256]))
    imported("worker.load.early").check(path, model)
    if _may_stay_quantized(path, model, config):
        from .device import kernel_cache

        kernel_cache.keep_native()
        cpu_native.compile_in_background()
    membership.loading("importing torch")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    _keep_memory()
    loader = imported("worker.load.loader")
    gc.freeze()
    narrate = _Narrator(membership)
    from .load.in_thread import ticking

    if loader.choose_device(config.device) == "cuda":
        from .device import kernel_cache

        with (
            kernel_cache.kept(node.run_dir),
            ticking(narrate.alive),
        ):  # a kernel may take minutes to compile
            from .gpu.runner import start

            return start(path, model, scheduler, config, incarnation, narrate)
    from .cpu.runner import Runner

    with ticking(narrate.alive):  # compiling may take as long here
        return AsyncFromSync(
            Runner(
                path,
                model,
                scheduler,
                config,
                incarnation,
                narrate,
                lambda: membership.tick(time.monotonic()),
            ),
            narrate.alive,
        )


def _may_stay_quantized(path: Path, model: ModelConfig, config: WorkerConfig) -> bool:
    """As far as can be told without torch."""
    on_cpu = config.device == "cpu" or (config.device == "auto" and not driver.has_device())
    return on_cpu and (
        path.suffix == ".gguf"
        or bool(model.quantization)
        or any(path.glob("*.gguf"))
        or quantization.of_checkpoint(path, read_object(path / "config.json")) is not None
    )


def _keep_memory() -> None:
    """Have glibc keep freed memory: by default each large activation is mapped anew and faulted in
    page by page, a tenth of a prefill."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)


class _Narrator:
    """Passes progress on, but not more often than anyone can read. One thread may report while
    another says that the process lives: sockets are not for two at once."""

    def __init__(self, membership: Membership) -> None:
        self._membership, self._stage, self._next = membership, "", 0.0
        self._lock = threading.Lock()

    def __call__(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        with self._lock:
            if stage != self._stage or now >= self._next:
                self._stage, self._next = stage, now + REPORT_EVERY_S
                self._membership.loading(stage, fraction)

    def alive(self) -> None:
        with self._lock:
            self._membership.tick(time.monotonic())


class Watch:
    """Notices that steps are under way and none ends."""

    def __init__(self, limit_s: float = STUCK_S) -> None:
        self._limit_s = limit_s
        self._steps = 0
        self._progress = 0
        self._since = 0.0

    def look(self, steps: int, progress: int, now: float) -> None:
        """now: monotonic seconds. Raises Stuck."""
        if not steps or not self._steps or progress != self._progress:
            self._progress, self._since = progress, now
        elif now - self._since > self._limit_s:
            raise Stuck(
                f"no step has ended for {now - self._since:.0f} s while {steps} are under way: the GPU hangs; starting anew"
            )
        self._steps = steps


def _serve(runner: AsyncRunner, node: Node[ToWorker]) -> None:
    """Until Stopped. Steps run in the order they came; those of an older scheduler than the newest
    one heard of are ignored."""
    inbox = node.inbox
    membership = node.membership
    epoch = 0
    steps: deque[StepHandle] = deque()
    runner.notify(inbox.wake)
    watch = Watch()
    while True:
        membership.busy = inbox.wait(HEARTBEAT_S / 2) or bool(steps)
        membership.tick(time.monotonic())
        for message in inbox.drain():
            if message.epoch > epoch:
                epoch = message.epoch
                runner.clear()
                steps.clear()
            match message:
                case Roster():
                    membership.on_roster(message)
                case Step() if message.epoch == epoch:
                    steps.append(runner.launch(message))
                    _send_results(steps, node)
                case Step():
                    log.warning(
                        "a step of epoch %d came after epoch %d: ignored", message.epoch, epoch
                    )
        _send_results(steps, node)
        watch.look(len(steps), membership.progress, time.monotonic())


def _send_results(steps: deque[StepHandle], node: Node[ToWorker]) -> None:
    """Send the results that are there, oldest first."""
    while steps and steps[0].done():
        result = steps.popleft().result()
        if not node.outbox.send(node.membership.scheduler, result):
            log.error("the result of step %d is lost: the scheduler's queue is full", result.n)
        node.membership.progress += 1
