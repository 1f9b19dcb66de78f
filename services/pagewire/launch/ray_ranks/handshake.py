"""How the actor of a rank on another host reaches the rank's proxy: TCP, and a secret that both
have from Ray's driver. Only the standard library is imported here.

Each side shows that it has the secret, which does not go over the network, before anything else is
said. What comes without it is dropped, and keeps nobody else waiting.
"""

import contextlib
import hmac
import json
import queue
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Final

from ...process.frames import FrameStream

GONE_S: Final = 10
"""After so long without an answer from the other host a connection is taken for broken."""
KEEPALIVE_S: Final = 2
HANDSHAKE_S: Final = 5.0
"""How long one that has connected may take to show that it has the secret."""
MOST_PENDING: Final = 64
"""So many may be about to show it at a time; more are dropped."""
CONNECT_S: Final = 30.0
"""How long Ray's actor or driver tries to reach the proxy of a rank."""
RETRY_S: Final = 0.1
NONCE_BYTES: Final = 16
PROOF_BYTES: Final = 32
OFFER_BYTES: Final = 4096


class NoProxy(ConnectionError):
    """The proxy of the rank cannot be reached from the actor's process; the message says why."""


def listen(address: str) -> socket.socket:
    """At a free port of this host's `address`. Raises OSError with the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=MOST_PENDING)
    except OSError as error:
        raise OSError(
            f"ranks on other hosts cannot reach this one: listening at {address}, by which Ray "
            f"knows it, failed ({error.strerror}); `ray start --node-ip-address` names another"
        ) from None


def listener_path(path: str | Path) -> Path:
    """Where the proxy that listens at `path` is told that its rank is on another host."""
    return Path(f"{path}.tcp")


def hand_listener(path: str | Path, listener: socket.socket, secret: bytes) -> None:
    """Tell that proxy, by whom `listener` is served from now on; it was started at the same time as
    the one of rank 0. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        deadline = time.monotonic() + CONNECT_S
        while connection.connect_ex(str(listener_path(path))):
            if time.monotonic() > deadline:
                raise NoProxy(f"the proxy of a rank does not listen at {listener_path(path)}")
            time.sleep(RETRY_S)
        text = json.dumps({"secret": secret.hex()}).encode()
        socket.send_fds(connection, [text], [listener.fileno()])


def take_listener(connection: socket.socket) -> "AuthenticatedListener":
    """What the driver has offered. Raises ConnectionError when it has gone."""
    with connection:
        text, fds, _, _ = socket.recv_fds(connection, OFFER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise ConnectionError("the group's driver of Ray has ended")
    return AuthenticatedListener(
        socket.socket(fileno=fds[0]), bytes.fromhex(json.loads(text)["secret"])
    )


class AuthenticatedListener:
    """Lets in the one that has the secret."""

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        """`listener` is this object's from now on."""
        self._listener = listener
        self._secret = secret
        self._room = threading.Semaphore(MOST_PENDING)
        self._accepted: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="handshakes", daemon=True).start()

    def accept(self, timeout_s: float) -> FrameStream | None:
        """The one that had the secret; None when none has come within `timeout_s` seconds."""
        try:
            return FrameStream(self._accepted.get(timeout=timeout_s))
        except queue.Empty:
            return None

    def close(self) -> None:
        """Let nobody else in."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self._accepted.get_nowait().close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError:
                return
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._check, args=(connection,), daemon=True).start()

    def _check(self, connection: socket.socket) -> None:
        try:
            _tune(connection)
            is_right = _verify(connection, self._secret)
        except OSError:
            is_right = False
        finally:
            self._room.release()
        if is_right:
            self._accepted.put(connection)
        else:
            connection.close()


def connect(host: str, port: int, secret: bytes) -> FrameStream:
    """Connect to the proxy that listens there. Raises NoProxy."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return FrameStream(_connect(host, port, secret))
        except NoProxy:
            raise
        except OSError as error:
            if time.monotonic() > deadline:
                raise NoProxy(
                    f"{socket.gethostname()} cannot reach {host} port {port}, where `pagewire "
                    f"serve` runs ({error.strerror or error}): the hosts of a group must reach "
                    "each other at any port"
                ) from None
        time.sleep(RETRY_S)


def _connect(host: str, port: int, secret: bytes) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=HANDSHAKE_S)
    try:
        _tune(connection)
        _authenticate(connection, secret)
    except BaseException:
        connection.close()
        raise
    return connection


def _verify(connection: socket.socket, secret: bytes) -> bool:
    """Of the proxy: whether the other end has the secret; it hears then that this one has it."""
    deadline = time.monotonic() + HANDSHAKE_S
    own = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(own)
    theirs = _exactly(connection, NONCE_BYTES, deadline)
    proof = _exactly(connection, PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _proof(secret, b"actor", own, theirs)):
        return False
    connection.sendall(_proof(secret, b"proxy", own, theirs))
    connection.settimeout(None)
    return True


def _authenticate(connection: socket.socket, secret: bytes) -> None:
    """Of the actor. Raises OSError, and NoProxy when the other end has another secret."""
    deadline = time.monotonic() + HANDSHAKE_S
    theirs = _exactly(connection, NONCE_BYTES, deadline)
    own = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(own + _proof(secret, b"actor", theirs, own))
    answer = _exactly(connection, PROOF_BYTES, deadline)
    if not hmac.compare_digest(answer, _proof(secret, b"proxy", theirs, own)):
        raise NoProxy("what listens in the place of the rank's proxy does not know the secret")
    connection.settimeout(None)


def _proof(secret: bytes, who: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(secret, who + b"".join(nonces), "sha256")


def _exactly(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = b""
    while len(data) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionResetError("it was dropped")
        data += piece
    return data


def _tune(connection: socket.socket) -> None:
    """Small frames leave at once, and a host that is gone is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, GONE_S // KEEPALIVE_S - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * GONE_S)
