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
import threading
import time
from collections import deque
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
from pagewire_kernels import cpu_native
from pagewire_protocol.messages import Role, Roster, Shutdown, Step, ToWorker

from ..checkpoint import quantization
from ..checkpoint.json_files import read_object
from ..config import ModelConfig, RunConfig, SchedulerConfig, WorkerConfig
from ..process import last_words
from ..process.errors import EXPECTED, error_line
from ..process.group import Place, RingReader, RingWriter
from ..process.imports import imported
from ..process.membership import HEARTBEAT_S, Membership
from ..process.node import Node, settle_gc
from ..process.stream_node import Stream, StreamInbox, StreamNode
from .device import driver
from .load.in_thread import Ticker
from .rank_link import Follower, Leader, Link, RecordKind
from .runners import AsyncFromSync, AsyncRunner, OnCpu, StepHandle
from .step import rank_masks
from .step_watch import StepWatch, Stuck

log = logging.getLogger("pagewire.worker")
REPORT_EVERY_S = 0.2
LINGER_S = 0.5
"""The last messages leave by another thread, which an exit that is not orderly does not wait
for."""
BEAT_S = 0.5
"""How often a step that computes while it is launched is interrupted for a sign of life."""
GPU_STUCK_S = (5.0, 60.0)
"""Far beyond any step, in seconds: at least, and while it is not known how long they take. Those
that compile or capture something do so before they are under way."""
CPU_STUCK_S = (30.0, 3600.0)
"""The same of a CPU, where others may want its cores, and where the first long prompt of a large
model takes minutes."""
AFTER_OTHERS_S = 1.0
"""How long a rank that was left alone waits for the end of its group before it ends itself."""
FOLLOWER_BEAT_S = 0.25
"""How often a rank without work shows that it lives."""
BUSY_BEAT_S = 0.002
"""How often it looks whether steps under way have ended."""
BETWEEN_IDLE_WORK_S = 0.01
"""How long a message is waited for between two pieces of what was put off."""
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""Options of mallopt(3)."""
SPIN_COUNT = "10000"
"""How long OpenMP threads spin for each other (the GNU run-time reads it when torch loads). By
default they spin for milliseconds: a few percent faster where cores are idle, tens of times slower
where another process wants one."""


WorkerNode = Node[ToWorker] | StreamNode
"""The latter is of a rank on another host than the rest of its stack."""


class Distrusted(Exception):
    """The scheduler can use this worker no longer, and says why."""


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
    place = Place.inherited()
    node = _node(run, place)
    membership = node.membership
    status = 0
    try:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        membership.hello()
        began = time.monotonic()
        link = _link(place)
        runner = _load(node, model, scheduler, config, place, link)
        membership.ready(worker=None if isinstance(link, Follower) else runner.facts())
        settle_gc()
        log.info("ready after %.1f s", time.monotonic() - began)
        _serve(runner, node, link, watched=bool(run.watchdog_timeout))
    except Stopped:
        log.info("stopped")
    except Exception as error:
        if place is not None and isinstance(error, ConnectionError):
            _wait_to_be_ended()
        if membership.is_ready:
            _end_at_once(node, error)
        status = 1
        log.debug("the worker failed", exc_info=True)
        _say_why(node, error)
    membership.goodbye(failed=status != 0)
    node.close(linger_ms=500)
    return status


def _node(run: RunConfig, place: Place | None) -> WorkerNode:
    if place is None:
        return Node(run.run_dir, Role.WORKER, run.name)
    stream = Stream.inherited()
    if stream is not None:
        return StreamNode(stream, run.run_dir, run.name, place.group, place.rank, place.size)
    return Node(run.run_dir, Role.WORKER, run.name, place.group, place.rank, place.size)


def _link(place: Place | None) -> Link | None:
    """To the other ranks of the group; None where there are none."""
    if place is None or place.size == 1:
        return None
    return Leader(RingWriter(place)) if place.rank == 0 else Follower(RingReader(place))


def _wait_to_be_ended() -> None:
    """Another rank is gone. How that one ended says more than what this one can say, and whoever
    started the group ends all of it; this rank speaks only if nobody does."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    time.sleep(AFTER_OTHERS_S)


def _say_why(node: WorkerNode, error: Exception) -> None:
    line = error_line(error, (*EXPECTED, Stuck, Distrusted))
    where = f"{node.where}: " if isinstance(node, StreamNode) else ""
    last_words.say("worker", where + line)


def _end_at_once(node: WorkerNode, error: Exception) -> NoReturn:
    """End a worker that has served. An orderly exit would wait for a device that may have failed
    for good or hang: after a sticky CUDA error every call fails, and some do not return."""
    log.debug("the worker failed", exc_info=error)
    with contextlib.suppress(ValueError):  # in another thread than the main one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _say_why(node, error)
    with contextlib.suppress(Exception):
        node.membership.goodbye(failed=True)
        node.close(linger_ms=int(1000 * LINGER_S))
        time.sleep(LINGER_S)
    os._exit(1)


def _load(
    node: WorkerNode,
    model: ModelConfig,
    scheduler: SchedulerConfig,
    config: WorkerConfig,
    place: Place | None,
    link: Link | None,
) -> AsyncRunner:
    incarnation = node.incarnation
    membership = node.membership
    make_masks = rank_masks.maker(link)
    if config.device == "fake":
        from .fake import FakeRunner

        return AsyncFromSync(FakeRunner(model, scheduler, config, incarnation, make_masks))
    path = _find_model(membership, model, config)
    device = _import_torch(membership, config)
    narrate = _Narrator(membership)
    from .load.in_thread import ticking

    with ticking(narrate.alive):
        ranks = imported("worker.communicators").connect(
            place, node.run_dir, device, config.pipeline_parallel_size
        )
    if device == "cuda":
        from .device import kernel_cache

        # A kernel may take minutes to compile.
        with kernel_cache.kept(node.run_dir), ticking(narrate.alive):
            from .gpu.stages import start

            return start(
                path,
                model,
                scheduler,
                config,
                incarnation,
                narrate,
                ranks=ranks,
                make_masks=make_masks,
            )
    from .cpu.stages import start as start_on_cpu

    with ticking(narrate.alive):  # compiling may take as long here
        return start_on_cpu(
            path,
            model,
            scheduler,
            config,
            incarnation,
            narrate,
            lambda: membership.tick(time.monotonic()),
            ranks=ranks,
            make_masks=make_masks,
        )


def _find_model(membership: Membership, model: ModelConfig, config: WorkerConfig) -> Path:
    """Where its files are, downloaded if need be. Raises before torch is imported what can be said
    without it, and begins to compile what needs no torch."""
    from ..hub.huggingface import resolve

    path = resolve(model, lambda line: membership.loading(line[:256]))
    imported("worker.load.early").check(
        path, model, config.tensor_parallel_size, config.pipeline_parallel_size
    )
    if _may_stay_quantized(path, model, config):
        from .device import kernel_cache

        kernel_cache.keep_native()
        cpu_native.compile_in_background()
    return path


def _import_torch(membership: Membership, config: WorkerConfig) -> str:
    """With what must be set before it is. Returns the device: cpu or cuda."""
    membership.loading("importing torch")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    _keep_memory()
    loader = imported("worker.load.loader")
    gc.freeze()
    return loader.choose_device(config.device)


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
        self._membership = membership
        self._stage = ""
        self._next = 0.0
        self._lock = threading.Lock()

    def __call__(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        with self._lock:
            if stage != self._stage or now >= self._next:
                self._stage = stage
                self._next = now + REPORT_EVERY_S
                self._membership.loading(stage, fraction)

    def alive(self) -> None:
        with self._lock:
            self._membership.tick(time.monotonic())


def _serve(runner: AsyncRunner, node: WorkerNode, link: Link | None, watched: bool) -> None:
    if isinstance(link, Follower):
        _FollowingServer(runner, node, link, watched).serve()
    else:
        _Server(runner, node, watched, link).serve()


class _Server:
    """The loop of a worker that is ready, or of its rank 0."""

    def __init__(
        self,
        runner: AsyncRunner,
        node: WorkerNode,
        watched: bool = True,
        leader: Leader | None = None,
    ) -> None:
        """watched: it ends itself when a step does not. leader: hands steps to the other ranks, if
        there are any."""
        self._leader = leader
        self._runner = runner
        self._node = node
        self._membership = node.membership
        self._epoch = 0
        self._newest_step = 0
        """The number of the newest step of this epoch."""
        self._steps: deque[StepHandle] = deque()
        self._beat_lock = threading.Lock()
        limits = CPU_STUCK_S if isinstance(runner, OnCpu) else GPU_STUCK_S
        self._watch = StepWatch(*limits) if watched else None
        self._ticker = Ticker(self._beat_or_end, BEAT_S)

    def serve(self) -> None:
        """Until Stopped. Steps run in the order they came; those of an older scheduler than the
        newest one heard of are ignored. Raises Stuck, Distrusted, and what the runner raises."""
        inbox = self._node.inbox
        assert not isinstance(inbox, StreamInbox)
        self._runner.notify(inbox.wake, self._send_results_meanwhile)
        has_used_idle_time = False
        while True:
            has_come = inbox.wait(BETWEEN_IDLE_WORK_S if has_used_idle_time else HEARTBEAT_S / 2)
            self._membership.busy = has_come or bool(self._steps)
            has_beaten = False
            for message in inbox.drain():
                if message.epoch > self._epoch:
                    self._follow(message.epoch)
                match message:
                    case Roster():
                        self._membership.on_roster(message)
                    case Shutdown() if message.epoch == self._epoch:
                        raise Distrusted(f"ended by the scheduler: {message.reason}")
                    case Step() if message.epoch == self._epoch:
                        self._take(message, inbox.frame)
                    case Step() | Shutdown():
                        log.warning(
                            "a %s of epoch %d came after epoch %d: ignored",
                            type(message).__name__,
                            message.epoch,
                            self._epoch,
                        )
                # Under load there is always a next message: the heart beats between them.
                self._beat()
                has_beaten = True
            if not has_beaten:
                self._beat()
            # A moment without steps between two is no idle time.
            has_used_idle_time = not has_come and self._use_idle_time()
            self._send_results()

    def _use_idle_time(self) -> bool:
        """Whether there was something that could be done. The other ranks of a group would not know
        of it."""
        if self._steps or self._leader is not None:
            return False
        with self._ticker:
            return self._runner.idle()

    def _take(self, step: Step, frame: bytes) -> None:
        """A step that a newer one has overtaken is void: a scheduler that gave this worker up and
        takes it back has a new connection to it, and what was left in the old one comes between.
        Since such steps may have been void, the first one after them forgets what they left. Its
        number need not be the next one."""
        if step.n <= self._newest_step:
            log.warning("step %d came after step %d: ignored", step.n, self._newest_step)
            return
        self._newest_step = step.n
        if step.clear:
            self._forget_requests()
        if self._leader is not None:
            self._leader.step(frame)
        self._send_results()  # those that are there need not wait for the launch
        self._launch(step)
        self._send_results()

    def _follow(self, epoch: int) -> None:
        """There is a new scheduler, which knows nothing of the steps under way."""
        self._epoch = epoch
        self._newest_step = 0
        self._forget_requests()

    def _forget_requests(self) -> None:
        """On all ranks."""
        if self._leader is not None:
            self._leader.clear()
        self._clear()

    def _clear(self) -> None:
        self._runner.clear()
        self._steps.clear()
        if self._watch is not None:
            self._watch.clear()

    def _launch(self, step: Step) -> None:
        if self._watch is not None:
            self._watch.launched(_prefill_tokens(step), time.monotonic())
        with self._ticker:
            self._steps.append(self._runner.launch(step))

    def _send_results(self) -> None:
        """Send the results that are there, oldest first. One that the scheduler's queue has no room
        for stays: a lost one would cost this worker the scheduler's trust."""
        node = self._node
        sent = False
        while self._steps and self._steps[0].done():
            if not node.outbox.send(self._membership.scheduler, self._steps[0].result()):
                log.warning("the scheduler's queue is full; results wait")
                break
            self._steps.popleft()
            if self._watch is not None:
                self._watch.ended(time.monotonic())
            self._membership.progress += 1
            sent = True
        if sent:
            self._runner.catch_up()

    def _send_results_meanwhile(self) -> None:
        """While a step is launched: the heart may beat in another thread."""
        with self._beat_lock:
            self._send_results()

    def _beat(self) -> None:
        """Raises Stuck."""
        now = time.monotonic()
        with self._beat_lock:
            if self._watch is not None:
                self._watch.look(now)
            self._membership.tick(now)

    def _beat_or_end(self) -> None:
        """In a thread, while a step is launched."""
        try:
            self._beat()
        except Stuck as error:
            _end_at_once(self._node, error)


class _FollowingServer(_Server):
    """The loop of any other rank: it runs the steps that rank 0 hands on, in their order, and
    answers nobody."""

    def __init__(
        self, runner: AsyncRunner, node: WorkerNode, follower: Follower, watched: bool
    ) -> None:
        super().__init__(runner, node, watched)
        self._follower = follower
        self._decoder = msgspec.msgpack.Decoder(ToWorker)

    def serve(self) -> None:
        """Until Stopped. Raises Stuck, Distrusted, RankSilent, and what the runner raises."""
        self._runner.notify(lambda: None, lambda: None)
        while True:
            record = self._follower.read(FOLLOWER_BEAT_S if not self._steps else BUSY_BEAT_S)
            self._membership.busy = record is not None or bool(self._steps)
            self._beat()
            if record is not None and record.kind is RecordKind.CLEAR:
                self._clear()
            elif record is not None:
                step = self._decoder.decode(record.data)
                assert isinstance(step, Step)
                self._launch(step)
            self._drop_results()
            self._listen()

    def _drop_results(self) -> None:
        """Rank 0 sends the same."""
        while self._steps and self._steps[0].done():
            self._steps.popleft()
            if self._watch is not None:
                self._watch.ended(time.monotonic())
            self._membership.progress += 1

    def _listen(self) -> None:
        """To the scheduler, which has nothing to say to this rank but who is there."""
        for message in self._node.inbox.drain():
            match message:
                case Roster():
                    self._membership.on_roster(message)
                case Shutdown():
                    raise Distrusted(f"ended by the scheduler: {message.reason}")
                case Step():
                    log.warning("a step came to a rank that is not the first: ignored")


def _prefill_tokens(step: Step) -> int:
    """All tokens of a step with prefill, 0 of one that computes one token a row."""
    if step.repeat:
        return 0
    tokens = int(np.frombuffer(step.run_counts, np.int32).sum())
    return tokens if 4 * tokens > len(step.run_counts) else 0
