"""How processes reach each other: one bound inbox a process, a PUSH socket for each peer. The only
module that knows ZeroMQ.

The scheduler's inbox has a well-known address, and a lock file decides which process may bind it:
two live processes can bind the same `ipc://` path without an error, so the name alone protects
nothing. Every other inbox has a fresh address for each incarnation.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec
import zmq

from .columns import Epoch, Incarnation
from .messages import Message, Role, ToFrontend, ToScheduler, ToTokenizer, ToWorker

TOPOLOGY: Final = {
    # role: (the union it receives, the roles it sends to)
    Role.FRONTEND: (ToFrontend, (Role.TOKENIZER, Role.SCHEDULER)),
    Role.TOKENIZER: (ToTokenizer, (Role.SCHEDULER, Role.FRONTEND)),
    Role.SCHEDULER: (ToScheduler, (Role.FRONTEND, Role.TOKENIZER, Role.WORKER)),
    Role.WORKER: (ToWorker, (Role.SCHEDULER,)),
}
MAX_FRAME: Final = 64 * 1024 * 1024
NO_INCARNATION: Final = Incarnation(0)
"""In the place of the scheduler's, whose address does not depend on it."""
NEW_S: Final = 10.0
QUEUE_LENGTH: Final = 100_000
READABLE: Final = int(zmq.POLLIN)
DECODE_ERRORS: Final = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""All three can come out of a msgspec decode of hostile bytes."""

log: Final = logging.getLogger("pagewire.channels")
M = TypeVar("M")
_encoder: Final = msgspec.msgpack.Encoder()


def _socket(kind: int) -> "zmq.Socket[bytes]":
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context[zmq.Socket[bytes]].instance()
    return context.socket(kind)


class AlreadyRunning(OSError):
    """Another scheduler holds the run directory's lock."""


def prepare_run_dir(run_dir: str) -> Path:
    """The directory of the sockets, made private (0700). Raises PermissionError when it belongs to
    someone else, ValueError when its path is too long for a Unix socket."""
    path = Path(run_dir).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"run directory {path} cannot be made: {error.strerror}; choose another with --run-dir"
        ) from None
    if path.stat().st_uid != os.getuid():
        raise PermissionError(
            f"run directory {path} belongs to another user (uid {path.stat().st_uid}); choose another with --run-dir"
        )
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o700)
    if len(str(path)) > 60:
        raise ValueError(
            f"run directory {path} has {len(str(path))} characters; socket paths allow at most 60 here, choose a shorter --run-dir"
        )
    return path


def new_incarnation() -> Incarnation:
    """A random one, for a process that starts."""
    return Incarnation(secrets.randbits(62) | 1)


def inbox_address(run_dir: Path, role: Role, incarnation: Incarnation) -> str:
    """Where a process is reached; the scheduler everywhere at the same address."""
    name = "scheduler" if role is Role.SCHEDULER else f"{role.name.lower()}-{incarnation:016x}"
    return f"ipc://{run_dir}/{name}.sock"


def living_inboxes(run_dir: Path) -> list[str]:
    """The addresses of all inboxes in the run directory but the scheduler's at which a process
    listens. The files of dead ones are removed, unless they are so new that their processes may be
    about to listen."""
    living: list[str] = []
    oldest_new = time.time() - NEW_S
    for path in run_dir.glob("*-*.sock"):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except FileNotFoundError:
                continue
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < oldest_new:
                        path.unlink()
                continue
            except OSError:
                pass  # its queue is full: it lives
            living.append(f"ipc://{path}")
    return living


def _already_running(run_dir: Path) -> AlreadyRunning:
    return AlreadyRunning(
        f"a scheduler is already running in {run_dir}; stop it, or choose another --run-dir"
    )


def check_unused(run_dir: Path) -> None:
    """Raises AlreadyRunning when a live scheduler holds the directory. Takes nothing: the scheduler
    to come must do that itself."""
    with contextlib.suppress(FileNotFoundError), (run_dir / "scheduler.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_running(run_dir) from None


def take_epoch(run_dir: Path) -> tuple[Epoch, int]:
    """The next epoch and the descriptor that holds the scheduler's lock for this process's life.
    Raises AlreadyRunning."""
    fd = os.open(run_dir / "scheduler.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise _already_running(run_dir) from None
    epoch = int(os.pread(fd, 32, 0) or b"0") + 1
    os.pwrite(fd, str(epoch).encode(), 0)
    return Epoch(epoch), fd


class Inbox(Generic[M]):
    """The bound PULL socket of one process, decoding into the union of its role."""

    def __init__(self, run_dir: Path, role: Role, incarnation: Incarnation) -> None:
        self.address = inbox_address(run_dir, role, incarnation)
        self.undecodable = 0
        self.frame = b""
        """The bytes of the message that `drain` has given last."""
        self._path = self.address.removeprefix("ipc://")
        self._decoder = msgspec.msgpack.Decoder(TOPOLOGY[role][0])
        self._socket = _socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, QUEUE_LENGTH)
        self._socket.set(zmq.MAXMSGSIZE, MAX_FRAME)
        self._lock = (
            threading.RLock()
        )  # signal handlers wake as well, perhaps in the middle of `close`
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        old = os.umask(0o077)
        try:
            self._socket.bind(self.address)
        finally:
            os.umask(old)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def fileno(self) -> int:
        """A descriptor for an event loop. It is edge-triggered: after each wake-up `drain` must run
        until it yields nothing."""
        return int(self._socket.get(zmq.FD))

    def wake(self) -> None:
        """End a `wait` in progress; safe from any thread, also after `close`, when it does
        nothing."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def wait(self, timeout_s: float | None) -> bool:
        """Block until a message or a `wake` is there. True when one is, False after `timeout_s`."""
        events = self._poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000)))
        if any(source == self._wake for source, _ in events):
            os.eventfd_read(self._wake)
        return bool(events)

    def watch(self, fileno: int) -> None:
        """From now on `wait` ends when this descriptor is readable, too."""
        self._poller.register(fileno, zmq.POLLIN)

    def unwatch(self, fileno: int) -> None:
        """No longer: before the descriptor is closed."""
        self._poller.unregister(fileno)

    def drain(self, limit: int = 1024) -> Iterator[M]:
        """The messages that have arrived, up to `limit`; none once the inbox is closed. Undecodable
        ones are counted and dropped: no sender can stop a service."""
        for frame in self.frames(limit):
            self.frame = frame
            try:
                yield self._decoder.decode(frame)
            except DECODE_ERRORS as error:
                self._count_undecodable(f"{type(error).__name__}: {error}")

    def frames(self, limit: int = 1024) -> Iterator[bytes]:
        """The same as bytes, for whoever passes them on; any sender may have sent them."""
        for taken in range(limit):
            if self._socket.closed:
                # a loop may still have been asked to look here when its service closed
                return
            if (
                taken and not int(self._socket.get(zmq.EVENTS)) & READABLE
            ):  # cheaper than the exception, and mostly there is one message
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if self._socket.get(zmq.RCVMORE):
                self._drop_rest()
                continue
            yield frame

    def _drop_rest(self) -> None:
        """MAXMSGSIZE is per frame, so a message here is one frame; more are refused."""
        self._count_undecodable("it has several frames")
        while self._socket.get(zmq.RCVMORE):
            self._socket.recv(zmq.NOBLOCK)

    def _count_undecodable(self, why: str) -> None:
        """The log has the first one, the second, the fourth and so on: senders may be many."""
        self.undecodable += 1
        if self.undecodable.bit_count() == 1:
            log.warning(
                "dropped a message that cannot be decoded, number %d: %s", self.undecodable, why
            )

    def close(self) -> None:
        """Unbind and remove the socket's file; what has not been received is lost."""
        self._socket.close(linger=0)
        with self._lock:
            wake = self._wake
            self._wake = -1
        if wake >= 0:
            os.close(wake)
        Path(self._path).unlink(missing_ok=True)


class Outbox:
    """PUSH sockets by address, made on first use. `send` never blocks: a full or vanished peer is
    an answer, not a wait."""

    def __init__(self) -> None:
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def reach(self, address: str) -> None:
        """Connect now, so that the first message need not wait for it: two strangers exchange
        several messages before it. It is for `send` to complain of what is no address."""
        with contextlib.suppress(ValueError, zmq.ZMQError):
            if address not in self._sockets:
                self._sockets[address] = self._connect(address)

    def send(self, address: str, message: Message) -> bool:
        """True when the message is queued. False when the peer's queue is full, or the address is
        none, as one that came with a message may be: its loss must be handled by the caller."""
        try:
            frame = _encoder.encode(message)
        except (ValueError, OverflowError):
            return False
        return self.send_frame(address, frame)

    def send_frame(self, address: str, frame: bytes) -> bool:
        """The same of a message that is encoded already."""
        socket = self._sockets.get(address)
        try:
            if socket is None:
                socket = self._sockets[address] = self._connect(address)
            socket.send(frame, zmq.NOBLOCK, copy=True)
        except (zmq.ZMQError, ValueError):
            return False
        return True

    def _connect(self, address: str) -> "zmq.Socket[bytes]":
        if not address.startswith("ipc://"):
            raise ValueError(f"peer address {address!r} is not an ipc:// address")
        socket = _socket(zmq.PUSH)
        socket.set(zmq.SNDHWM, QUEUE_LENGTH)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RECONNECT_IVL, 20)
        socket.set(zmq.RECONNECT_IVL_MAX, 100)
        try:
            socket.connect(address)
        except zmq.ZMQError:
            socket.close()
            raise
        return socket

    def forget(self, address: str) -> None:
        """Drop a peer that is gone, with whatever is queued for it."""
        socket = self._sockets.pop(address, None)
        if socket is not None:
            socket.close(linger=0)

    def close(self, linger_ms: int = 0) -> None:
        """Close all sockets; what is queued gets `linger_ms` milliseconds to leave. Peers that have
        ended in order, whose inboxes are gone, are not waited for: where a whole stack ends, each
        of its processes would wait for those that were faster."""
        for address, connection in self._sockets.items():
            listens = Path(address.removeprefix("ipc://")).exists()
            connection.close(linger=linger_ms if listens else 0)
        self._sockets.clear()
