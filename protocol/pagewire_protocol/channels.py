"""How processes reach each other: one bound inbox a process, a connection to each peer. The only module that other parts need for it.

The scheduler's inbox has a well-known address, and a lock file decides which process may bind it: a path can be bound again while another
process listens there, so the name alone protects nothing. Every other inbox has a fresh address for each incarnation.
"""

import contextlib
import fcntl
import os
import secrets
import select
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from .frames import Receiver, Sender, framed
from .messages import Message, Role, ToFrontend, ToScheduler, ToTokenizer, ToWorker

TOPOLOGY: Final = {
    # role: (the union it receives, the roles it sends to)
    Role.FRONTEND: (ToFrontend, (Role.TOKENIZER, Role.SCHEDULER)),
    Role.TOKENIZER: (ToTokenizer, (Role.SCHEDULER, Role.FRONTEND)),
    Role.SCHEDULER: (ToScheduler, (Role.FRONTEND, Role.TOKENIZER, Role.WORKER)),
    Role.WORKER: (ToWorker, (Role.SCHEDULER,)),
}
SCHEME: Final = "ipc://"
MAX_FRAME: Final = 64 * 1024 * 1024
QUEUE_LENGTH: Final = 100_000
"""Messages that wait for a peer."""
LATE_S: Final = 0.02
"""How often it is tried to deliver what a peer did not take at once."""
DECODE_ERRORS: Final = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""All three can come out of a msgspec decode of hostile bytes."""

M = TypeVar("M")
_encoder: Final = msgspec.msgpack.Encoder()


class AlreadyRunning(OSError):
    """Another scheduler holds the run directory's lock."""


def prepare_run_dir(run_dir: str) -> Path:
    """The directory of the sockets, made private (0700). Raises PermissionError when it belongs to someone else, ValueError when
    its path is too long for a Unix socket."""
    path = Path(run_dir).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"run directory {path} cannot be made: {error.strerror}; choose another with --run-dir") from None
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"run directory {path} belongs to another user (uid {path.stat().st_uid}); choose another with --run-dir")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o700)
    if len(str(path)) > 60:
        raise ValueError(
            f"run directory {path} has {len(str(path))} characters; socket paths allow at most 60 here, choose a shorter --run-dir"
        )
    return path


def new_incarnation() -> int:
    return secrets.randbits(62) | 1


def inbox_address(run_dir: Path, role: Role, incarnation: int) -> str:
    name = "scheduler" if role is Role.SCHEDULER else f"{role.name.lower()}-{incarnation:016x}"
    return f"{SCHEME}{run_dir}/{name}.sock"


def _already_running(run_dir: Path) -> AlreadyRunning:
    return AlreadyRunning(f"a scheduler is already running in {run_dir}; stop it, or choose another --run-dir")


def check_unused(run_dir: Path) -> None:
    """Raises AlreadyRunning when a live scheduler holds the directory. Takes nothing: the scheduler to come must do that itself."""
    with contextlib.suppress(FileNotFoundError), (run_dir / "scheduler.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_running(run_dir) from None


def take_epoch(run_dir: Path) -> tuple[int, int]:
    """The next epoch and the descriptor that holds the scheduler's lock for this process's life. Raises AlreadyRunning."""
    fd = os.open(run_dir / "scheduler.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise _already_running(run_dir) from None
    epoch = int(os.pread(fd, 32, 0) or b"0") + 1
    os.pwrite(fd, str(epoch).encode(), 0)
    return epoch, fd


class Inbox(Generic[M]):
    """The bound socket of one process, decoding into the union of its role."""

    def __init__(self, run_dir: Path, role: Role, incarnation: int) -> None:
        self.address = inbox_address(run_dir, role, incarnation)
        self.undecodable = 0
        self._decoder = msgspec.msgpack.Decoder(TOPOLOGY[role][0])
        self._receiver = Receiver(self.address.removeprefix(SCHEME), MAX_FRAME)
        self._lock = threading.RLock()  # signal handlers wake as well, perhaps in the middle of `close`
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._receiver.watch(self._wake)

    def fileno(self) -> int:
        """A descriptor for an event loop. After each wake-up `drain` must run until it yields nothing: what it has taken from the kernel
        does not show here. A `wake` is for `wait` alone."""
        return self._receiver.fileno()

    def wake(self) -> None:
        """End a `wait` in progress; safe from any thread, also after `close`, when it does nothing."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def wait(self, timeout_s: float | None) -> bool:
        """Block until something comes or a `wake`. True then (a long message comes in pieces: there may be nothing to drain yet), False
        after `timeout_s`."""
        if self._receiver.frames:
            return True
        ready = self._receiver.receive(timeout_s)
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return bool(ready)

    def drain(self, limit: int = 1024) -> Iterator[M]:
        """The messages that have arrived, up to `limit`. Undecodable ones are counted and dropped: no sender can stop a service."""
        frames = self._receiver.frames
        for _ in range(limit):
            if not frames:
                self._receiver.receive(0)
                if not frames:
                    return
            try:
                yield self._decoder.decode(frames.popleft())
            except DECODE_ERRORS:
                self.undecodable += 1

    def close(self) -> None:
        self._receiver.close()
        with self._lock:
            wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)


class Outbox:
    """Connections by address, made on first use. `send` never blocks: a full or vanished peer is an answer, not a wait.

    What a peer does not take at once, because it is not there yet or has fallen behind, is delivered by a thread that is made for it."""

    def __init__(self) -> None:
        self._senders: dict[str, Sender] = {}
        self._late = threading.Condition()
        self._courier: threading.Thread | None = None
        self._closed = False

    def send(self, address: str, message: Message) -> bool:
        """True when the message is on its way or queued. False when the peer's queue is full: its loss must be handled by the caller."""
        frame = framed(_encoder.encode(message))
        with self._late:
            sender = self._senders.get(address)
            if sender is None:
                sender = self._senders[address] = self._sender(address)
            taken = sender.send(frame)
            if sender.waiting:
                self._call_courier()
        return taken

    def _sender(self, address: str) -> Sender:
        if not address.startswith(SCHEME):
            raise ValueError(f"peer address {address!r} is not an {SCHEME} address")
        return Sender(address.removeprefix(SCHEME), QUEUE_LENGTH)

    def _call_courier(self) -> None:
        if self._courier is None:
            self._courier = threading.Thread(target=self._deliver, name="courier", daemon=True)
            self._courier.start()
        self._late.notify()

    def _deliver(self) -> None:
        while True:
            with self._late:
                late = [sender for sender in self._senders.values() if sender.waiting]
                while not late and not self._closed:
                    self._late.wait()
                    late = [sender for sender in self._senders.values() if sender.waiting]
                if self._closed:
                    return
                for sender in late:
                    sender.push()
                blocked = [sender.blocked for sender in late if sender.blocked is not None]
            _writable(blocked, LATE_S)

    def forget(self, address: str) -> None:
        """Drop a peer that is gone, with whatever is queued for it."""
        with self._late:
            sender = self._senders.pop(address, None)
            if sender is not None:
                sender.close()

    def close(self, linger_ms: int = 0) -> None:
        """What waits for peers that are there has so long to go."""
        deadline = time.monotonic() + linger_ms / 1000
        while (blocked := self._blocked()) and time.monotonic() < deadline:
            _writable(blocked, LATE_S)
        with self._late:
            self._closed = True
            for sender in self._senders.values():
                sender.close()
            self._senders.clear()
            self._late.notify()

    def _blocked(self) -> list[int]:
        with self._late:
            for sender in self._senders.values():
                sender.push()
            return [sender.blocked for sender in self._senders.values() if sender.blocked is not None]


def _writable(blocked: list[int], timeout_s: float) -> None:
    """Sleep until one of these sockets takes more. One that was closed meanwhile ends the sleep too."""
    poll = select.poll()
    for fd in blocked:
        poll.register(fd, select.POLLOUT)
    poll.poll(1000 * timeout_s)
