"""A service's end of its matcher process: starts it, sends, receives, ends it. Knows neither
requests nor llguidance.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from pagewire.process.parent import PARENT_VARIABLE, how_it_ended

from .messages import (
    FromMatcher,
    Look,
    Ready,
    Start,
    ToMatcher,
    decode_from_matcher,
    framed,
)
from .shared import SharedMasks
from .stream import FrameReader

_MODULE: Final = "pagewire.grammar.process"
SOCKET_BYTES: Final = 1 << 20
LOOK: Final = framed(Look())


class MatcherGone(Exception):
    """The process has ended; the text says how."""


class MatcherProcess:
    """One process. Nothing here waits, but for `wait`."""

    def __init__(self, start: Start, shared: SharedMasks | None = None) -> None:
        """shared: where it writes masks; None: it only checks grammars."""
        self.is_ready = False
        """Its vocabulary is loaded."""
        self.ready_at = 0.0
        """When it was, in monotonic seconds."""
        self._socket, theirs = socket.socketpair()
        memory = () if shared is None else (shared.fileno,)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno()), *map(str, memory)],
                pass_fds=(theirs.fileno(), *memory),
                stdin=subprocess.DEVNULL,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            )
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self._reader = FrameReader(self._socket)
        self._unsent = bytearray()
        self.send(start)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def fileno(self) -> int:
        """Of the socket: readable when there is something to `receive`."""
        return self._socket.fileno()

    def send(self, message: ToMatcher) -> None:
        """As much as the socket takes now; the rest goes with the next call of any method."""
        self._unsent += framed(message)
        self.flush()

    def look(self) -> None:
        """`send` of Look, which is said in every step: packed before."""
        self._unsent += LOOK
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                try:
                    sent = self._socket.send(self._unsent)
                except ConnectionError:
                    return  # `receive` says so
                del self._unsent[:sent]

    @property
    def sends(self) -> bool:
        """Something is left to be sent, once the socket takes it."""
        return bool(self._unsent)

    def wait(self, seconds: float) -> bool:
        """Until something is there to be received, or so long; whether something is."""
        return bool(wait_for_any([self], seconds))

    def receive(self) -> list[FromMatcher]:
        """What has arrived. Raises MatcherGone."""
        self.flush()
        received: list[FromMatcher] = []
        while True:
            try:
                frames = self._reader.read()
            except BlockingIOError:
                return received
            if frames is None:
                raise MatcherGone(self._how_it_ended())
            for message in map(decode_from_matcher, frames):
                if isinstance(message, Ready):
                    self.is_ready = True
                    self.ready_at = time.monotonic()
                else:
                    received.append(message)
            if not self._reader.may_have_more:
                return received

    def _how_it_ended(self) -> str:
        try:
            return how_it_ended(self._process.wait(timeout=1))
        except subprocess.TimeoutExpired:
            return "closed its socket"

    def close(self) -> None:
        """Kill it, if it lives, and forget it."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


def wait_for_any(processes: Sequence[MatcherProcess], seconds: float) -> list[MatcherProcess]:
    """Until one of them has something to be received, or so long; those that have."""
    writes = [process for process in processes if process.sends]
    try:
        readable, writable, _ = select.select(processes, writes, [], max(0.0, seconds))
    except ValueError:  # some descriptor is too large for it
        return _polled(processes, seconds)
    for process in writable:
        process.flush()
    return readable


def _polled(processes: Sequence[MatcherProcess], seconds: float) -> list[MatcherProcess]:
    """Where `select` cannot be asked, whose waits are more precise: poll knows milliseconds."""
    poll = select.poll()
    for process in processes:
        poll.register(process, select.POLLIN | (select.POLLOUT if process.sends else 0))
    events = dict(poll.poll(1000 * max(0.0, seconds)))
    happened = [(process, events.get(process.fileno(), 0)) for process in processes]
    for process, event in happened:
        if event & select.POLLOUT:
            process.flush()
    return [process for process, event in happened if event & ~select.POLLOUT]
