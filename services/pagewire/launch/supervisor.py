"""Starts the services of one stack as operating-system processes, restarts those that die or hang,
and ends them all.

It knows command lines, exit codes and output lines; what the services say to each other is not its
business. It runs in the main thread of `pagewire serve` and in a thread of a program that uses
`LLM`. Beside that only the standard library is imported here.
"""

import contextlib
import math
import mmap
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..process import liveness
from ..process.group import PLACE_VARIABLE, GroupMemory
from ..process.parent import FAILURES_VARIABLE, PARENT_VARIABLE, how_it_ended

ORDERLY_EXIT_S = 3.5
GIVE_UP_STARTS = 5
"""Lives in a row that ended before the service was ready, after which it is taken for one that
cannot run here."""
STABLE_S = 1.0
"""A service that was ready for so long has worked: its next end is the first of a new count."""
LONGEST_PAUSE_S = 30.0
TICK_S = 0.1
LOOK_S = 0.15
"""How often it is looked whether services make progress."""


@dataclass(frozen=True)
class Service:
    """What to start: `python -m pagewire` with `arguments`, under a `name` that stays the same over
    restarts."""

    name: str
    arguments: tuple[str, ...]
    pass_fds: tuple[int, ...] = ()
    drain_s: float | None = None
    """How long it may finish its work at the end, while those without such a time still serve
    it."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables beside those that it inherits."""
    group: str = ""
    """Services of one group run one model together: when one of them ends, the others are ended,
    and all are started again. Empty: alone."""
    rank: int = 0
    """Its number in the group."""

    @property
    def kind(self) -> str:
        """What its replicas have in common: the name without the number."""
        return self.name.rpartition("-")[0]


@dataclass(frozen=True)
class ServiceDeath:
    """The end of a service that nobody asked for."""

    service: Service
    incarnation: int
    """Under which the stack knew it; 0: it did not."""
    cause: str
    """In words, such as "was killed by SIGSEGV"."""
    failures: int
    """Ends in a row, this one included, before which it did not work for long."""
    pause_s: float
    """After which it is started again."""


@dataclass
class Failures:
    """How often a service, or a group of them, has ended lately."""

    in_a_row: int = 0
    """Ends before which it was not ready for STABLE_S."""
    starts: list[float] = field(default_factory=list[float])
    """Those of them before which it was not ready at all: monotonic seconds."""

    @property
    def is_hopeless(self) -> bool:
        """Nothing says that it can run."""
        return len(self.starts) >= GIVE_UP_STARTS

    def count(self, now: float, ready_at: float | None) -> None:
        """One more end, of a service that was ready since `ready_at`; None: not at all."""
        if ready_at is None:
            self.starts.append(now)
        else:
            self.starts.clear()
            if now - ready_at >= STABLE_S:
                self.in_a_row = 0
        self.in_a_row += 1


@dataclass
class Group:
    """Services that run one model together."""

    size: int = 0
    failures: Failures = field(default_factory=Failures)
    memory: GroupMemory | None = None
    """Of the present life."""

    def end_life(self) -> None:
        """One of them has ended: what they shared is of no use to the next ones."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None


@dataclass
class Child:
    """A service and its present process, if any. Times are monotonic seconds."""

    service: Service
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0.0
    kill_at: float = math.inf
    """It was asked to end with its group, and gets until then."""
    failures: Failures = field(default_factory=Failures)
    """Of the service; shared by a group."""
    lives: int = 0
    """Processes that were started for it."""
    watched: liveness.Watched | None = None
    """The progress of the present process."""
    ready_at: float | None = None
    """Since when the present process is ready, as far as was seen."""
    is_hung: bool = False
    """It was killed because it made no progress."""
    last_line: str = ""
    partial: bytes = b""

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end and has not yet."""
        return self.process is not None and self.kill_at < math.inf


def command_of(service: Service) -> list[str]:
    """The command line of its process."""
    return [sys.executable, "-m", "pagewire", *service.arguments]


def backoff_s(failures: int) -> float:
    """At once after the first end, then 0.5, 1, 2, ... seconds."""
    return 0.0 if failures <= 1 else min(LONGEST_PAUSE_S, 0.5 * 2.0 ** (min(failures, 30) - 2))


class Supervisor:
    """`run` blocks until `stop` is called or a service cannot be kept alive; no child survives its
    return.

    Before `mark_ready`, a service that exits with an error ends the stack (`failure` holds its last
    line): its settings are wrong, and trying again would not help. A killed one is started again,
    and afterwards so is every one that ends, with growing pauses while it does not work. The stack
    ends when all services of a kind have failed to start 5 times in a row. The services of a group
    count as one: they are started together, the end of one ends all, and its failures are theirs.
    """

    def __init__(
        self,
        services: list[Service],
        on_line: Callable[[str, str], None],
        on_death: Callable[[ServiceDeath], None] = lambda death: None,
    ) -> None:
        """`on_line` gets each line that a service writes, with its name; `on_death` each end that
        nobody asked for, before the service is started again. Raises OSError on another system than
        Linux."""
        if platform.system() != "Linux":
            raise OSError(
                f"Pagewire runs on Linux, and this is {platform.system()}: use its container there, or WSL2 on Windows"
            )
        self.failure: str | None = None
        self._groups: dict[str, Group] = {}
        self._children = [self._child(service) for service in services]
        self._on_line = on_line
        self._announce = on_death
        self._next_look = 0.0
        self._ready = False
        self._stops = 0
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def add(self, service: Service) -> None:
        """Start one more service, before any other that is still to be started; call from
        `tick`."""
        self._children.insert(0, self._child(service))

    def _child(self, service: Service) -> Child:
        if not service.group:
            return Child(service)
        group = self._groups.setdefault(service.group, Group())
        group.size = max(group.size, service.rank + 1)
        return Child(service, failures=group.failures)

    def _others_of_group(self, child: Child) -> list[Child]:
        group = child.service.group
        return [
            member
            for member in self._children
            if group and member.service.group == group and member is not child
        ]

    def mark_ready(self) -> None:
        """The stack serves: from now on a service that ends is started again."""
        self._ready = True

    @property
    def all_ready(self) -> bool:
        """Each service has a process that has got as far as serving."""
        return all(child.ready_at is not None for child in self._children)

    def stop(self) -> None:
        """End everything; a second call ends it without waiting. Safe from signal handlers and
        other threads."""
        self._stops += 1
        os.eventfd_write(self._wake, 1)

    def pids(self) -> dict[str, int]:
        """Process ids by service name."""
        return {c.service.name: c.process.pid for c in self._children if c.process is not None}

    def run(self, tick: Callable[[], None] = lambda: None) -> int:
        """0 after `stop`, 1 when the stack could not be kept alive. `tick` is called about ten
        times a second."""
        try:
            while not self._stops and self.failure is None:
                self._start_due()
                tick()
                self._wait(TICK_S)
                self._reap()
                self._look()
                self._kill_overdue()
        finally:
            self._end_all()
        return 0 if self.failure is None else 1

    def fail(self, reason: str) -> None:
        """End the stack because of `reason`, if nothing else has ended it before."""
        self.failure = self.failure or reason

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.process is not None or child.start_at > now:
                continue
            if any(member.is_ending for member in self._others_of_group(child)):
                continue
            self._start(child)

    def _start(self, child: Child) -> None:
        page_fd = liveness.new_page()
        page = mmap.mmap(page_fd, liveness.PAGE_BYTES)
        variables = {
            PARENT_VARIABLE: str(os.getpid()),
            liveness.PAGE_VARIABLE: str(page_fd),
            FAILURES_VARIABLE: str(child.lives and max(1, child.failures.in_a_row)),
            "PYTHONSAFEPATH": "1",
            **dict(child.service.environment),
        }
        pass_fds = (*child.service.pass_fds, page_fd)
        if child.service.group:
            place = self._memory_of(child.service.group).place(child.service.rank)
            variables[PLACE_VARIABLE] = place.as_variable()
            pass_fds += place.fds
        child.process = subprocess.Popen(
            command_of(child.service),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            pass_fds=pass_fds,
            process_group=0,
        )
        child.lives += 1
        os.close(page_fd)
        child.watched = liveness.Watched(page, child.process.pid, time.monotonic())
        child.ready_at = None
        child.is_hung = False
        assert child.process.stdout is not None
        os.set_blocking(child.process.stdout.fileno(), False)
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)

    def _memory_of(self, name: str) -> GroupMemory:
        group = self._groups[name]
        if group.memory is None:
            group.memory = GroupMemory(name, group.size)
        return group.memory

    def _wait(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                self._read(key.data)

    def _read(self, child: Child) -> None:
        """Forward what the child wrote, line by line. Its death shows as the end of its output."""
        process = child.process
        assert process is not None and process.stdout is not None
        try:
            data = os.read(process.stdout.fileno(), 65536)
        except BlockingIOError:
            return
        *lines, child.partial = (child.partial + data).split(b"\n")
        for line in lines:
            self._say(child, line)
        if not data:
            self._selector.unregister(process.stdout)
            process.stdout.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)

    def _say(self, child: Child, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            child.last_line = text
            self._on_line(child.service.name, text)

    def _reap(self) -> None:
        for child in self._alive():
            if child.process is not None and child.process.poll() is not None:
                was_asked = child.is_ending
                self._note_ready(child, time.monotonic())
                incarnation = child.watched.incarnation if child.watched else 0
                code = self._close(child)
                if was_asked:
                    child.kill_at = math.inf
                else:
                    self._on_death(child, incarnation, code)

    def _look(self) -> None:
        """Kill what makes no progress."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        for child in self._alive():
            self._note_ready(child, now)
            if child.watched is None or child.is_hung or not child.watched.look(now):
                continue
            child.is_hung = True
            silent_s = child.watched.silent_s
            self._on_line(
                "supervisor", f"{child.service.name} made no progress for {silent_s:.1f} s: killed"
            )
            _signal([child], signal.SIGKILL)

    @staticmethod
    def _note_ready(child: Child, now: float) -> None:
        if child.ready_at is None and child.watched is not None and child.watched.was_ready:
            child.ready_at = now

    def _kill_overdue(self) -> None:
        """A rank may hang in a collective whose other ranks are gone: SIGTERM does not reach it
        there."""
        overdue = [child for child in self._alive() if time.monotonic() >= child.kill_at]
        _signal(overdue, signal.SIGKILL)

    def _close(self, child: Child) -> int:
        """Take the rest of a dead child's output and let go of it; its exit code."""
        assert child.process is not None and child.process.stdout is not None
        stdout = child.process.stdout
        if not stdout.closed:
            self._read(child)
        if not stdout.closed:
            self._selector.unregister(stdout)
            stdout.close()
        self._say(child, child.partial)
        code = child.process.wait()
        child.process, child.partial = None, b""
        if child.watched is not None:
            child.watched.close()
            child.watched = None
        return code

    def _on_death(self, child: Child, incarnation: int, code: int) -> None:
        """A child has ended that was not asked to: start it again, with the others of its group,
        unless there is no hope for it."""
        now = time.monotonic()
        # An end in order, which somebody asked for, is no failure.
        was_in_order = code == 0 and child.ready_at is not None
        if not was_in_order:
            child.failures.count(now, child.ready_at)
        reason = self._reason_to_give_up(child, code, now)
        if reason:
            return self.fail(reason)
        pause_s = 0.0 if was_in_order else backoff_s(child.failures.in_a_row)
        child.start_at = now + pause_s
        in_a_row = max(1, child.failures.in_a_row)
        cause = _cause_of_death(child, code)
        self._announce(ServiceDeath(child.service, incarnation, cause, in_a_row, pause_s))
        others = self._end_group_of(child, now)
        again = f"its group {child.service.group}" if others else "it"
        when = f" in {pause_s:g} s" if pause_s else ""
        self._on_line(
            "supervisor",
            f"{child.service.name} {how_it_ended(code)}; starting {again} again{when}",
        )

    def _reason_to_give_up(self, child: Child, code: int, now: float) -> str:
        """Empty where the child is worth another start."""
        name = child.service.name
        if code > 0 and not self._ready:
            own_words = child.last_line.removeprefix("pagewire ")
            return own_words or f"{name} {how_it_ended(code)} without a word"
        if code == -signal.SIGILL and not self._ready:
            return f"{name} {how_it_ended(code)}"  # it would be the next time, too
        if self._is_hopeless(child.service.kind):
            starts = child.failures.starts
            last = f"; its last line: {child.last_line}" if child.last_line else ""
            return f"{name} died {len(starts)} times in {now - starts[0]:.0f} s before it was ready, giving up{last}"
        return ""

    def _end_group_of(self, child: Child, now: float) -> list[Child]:
        """End the other ranks of a dead child's group, which start again when it does; returns
        them."""
        others = self._others_of_group(child)
        if child.service.group:
            self._groups[child.service.group].end_life()
        for other in others:
            other.start_at = child.start_at
            if other.process is not None and not other.is_ending:
                other.kill_at = now + ORDERLY_EXIT_S
                _signal([other], signal.SIGTERM)
        return others

    def _is_hopeless(self, kind: str) -> bool:
        """No service of this kind is left of which anything says that it can run."""
        return all(
            child.failures.is_hopeless for child in self._children if child.service.kind == kind
        )

    def _end_all(self) -> None:
        self._end([child for child in self._alive() if child.service.drain_s is not None])
        self._end(self._alive())
        for group in self._groups.values():
            group.end_life()
        self._selector.close()

    def _end(self, children: list[Child]) -> None:
        deadline = (
            time.monotonic()
            + ORDERLY_EXIT_S
            + max((child.service.drain_s or 0.0 for child in children), default=0.0)
        )
        _signal(children, signal.SIGTERM)
        while _alive(children) and time.monotonic() < deadline and self._stops < 2:
            self._wait(TICK_S / 2)
            self._close_ended()
        _signal(children, signal.SIGKILL)
        while _alive(children):
            self._wait(TICK_S / 10)
            self._close_ended()

    def _alive(self) -> list[Child]:
        return _alive(self._children)

    def _close_ended(self) -> None:
        for child in self._alive():
            if child.process is not None and child.process.poll() is not None:
                self._close(child)


def _alive(children: list[Child]) -> list[Child]:
    return [child for child in children if child.process is not None]


def _signal(children: list[Child], number: signal.Signals) -> None:
    for child in _alive(children):
        assert child.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)


def _cause_of_death(child: Child, code: int) -> str:
    """In words for clients of `/ready` and the scheduler's log."""
    if code > 0 and child.last_line.startswith("pagewire "):
        return child.last_line.removeprefix("pagewire ")  # a service's last line says why
    return "made no progress" if child.is_hung else how_it_ended(code)
