"""Bodies that take long to read are read in processes of their own: decoding holds the interpreter
whatever thread it runs in, and a body of 30 MB that is nothing but keys takes seconds and
gigabytes. Knows no HTTP.

Most bodies are light, and are read where they arrive. For the others there are up to two processes,
made when they are needed and ended when they have been idle: what a body took comes back to the
system. One of the two is kept from the largest bodies, so that they hold up nobody but each other.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from os import environ, getpid
from typing import Any, Final

import msgspec

from pagewire.process.parent import PARENT_VARIABLE

from .errors import ApiError
from .reading import KINDS, BodyType, Served, read

log = logging.getLogger("pagewire.frontend")
SMALL: Final = 4096
"""Bytes of a body that is light whatever is in it."""
LIGHT_BYTES: Final = 256 << 10
"""Bytes from which on no body is light."""
LIGHT_NS: Final = 5_000_000
"""Nanoseconds that reading a light body takes at most, as estimated by what it is made of."""
NS_OF: Final = ((b'"', 1000), (b",", 130), (b"{", 3000), (b"[", 1000))
"""Nanoseconds for each occurrence of a byte, text included: measured at their most expensive."""
LARGE_BYTES: Final = 4 << 20
"""Bytes from which on a body is read in one of the processes only, which then ends."""
PROCESSES: Final = 2
READ_S: Final = 20.0
"""How long reading one body may take."""
IDLE_S: Final = 30.0
"""After which an idle process ends."""
MEMORY: Final = 3 << 30
"""Bytes of address space that a process may have."""
REQUEST: Final = struct.Struct("<IQ")
"""Before each body: the bytes of its header and of itself."""
ANSWER: Final = struct.Struct("<?Q")
"""Before each answer: whether it is a plan (else an error), and its bytes."""
_MODULE: Final = "pagewire.frontend.body_process"


class BodyHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a process is told of a body."""

    body_type: BodyType
    served: Served


class BodyError(msgspec.Struct, frozen=True, array_like=True):
    """Why there is no plan: the fields of an ApiError."""

    status: int
    message: str
    param: str | None
    type: str


encode_header: Final = msgspec.msgpack.Encoder().encode
_decode_error: Final = msgspec.msgpack.Decoder(BodyError).decode
_decoders: Final[dict[BodyType, msgspec.msgpack.Decoder[Any]]] = {
    body_type: msgspec.msgpack.Decoder(kind.plan) for body_type, kind in KINDS.items()
}


def is_light(body: bytes) -> bool:
    """Whether a body of at most LIGHT_BYTES is read so quickly that nobody notices."""
    return len(body) <= SMALL or sum(ns * body.count(byte) for byte, ns in NS_OF) <= LIGHT_NS


class BodyReaders:
    """Reads the bodies of one frontend."""

    def __init__(self) -> None:
        self._idle: list[BodyProcess] = []
        self._processes: set[BodyProcess] = set()
        self._places = asyncio.Semaphore(PROCESSES)
        self._large = asyncio.Semaphore(PROCESSES - 1)

    async def read(self, body_type: BodyType, pieces: list[bytes], served: Served) -> Any:
        """The plan in a body, which is given in pieces. Raises RequestError or ApiError."""
        size = sum(map(len, pieces))
        if size <= LIGHT_BYTES:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if is_light(body):
                return read(body_type, body, served)
            pieces = [body]
        large = size > LARGE_BYTES
        async with (
            self._large if large else contextlib.nullcontext(),
            self._places,
            self._process(large) as process,
        ):
            is_plan, answer = await process.ask(BodyHeader(body_type, served), pieces, size)
        if is_plan:
            return _decoders[body_type].decode(answer)
        error = _decode_error(answer)
        raise ApiError(error.status, error.message, param=error.param, type=error.type)

    def close(self) -> None:
        """End all processes."""
        for process in list(self._processes):
            process.end()

    @contextlib.asynccontextmanager
    async def _process(self, large: bool) -> "AsyncGenerator[BodyProcess]":
        """An idle process or a new one. One that has failed, or has read a large body, ends."""
        process = self._idle.pop() if self._idle else await BodyProcess.start(self._processes)
        process.stop_idling()
        try:
            async with asyncio.timeout(READ_S):
                yield process
        except BaseException as error:
            process.end()
            if isinstance(error, TimeoutError):
                text = f"Reading the request body takes longer than {READ_S:.0f} s."
                raise ApiError(413, text) from None
            if isinstance(error, (OSError, EOFError)):
                log.warning("a process that read a request body has ended: %s", error)
                raise ApiError(413, "Reading the request body takes too much memory.") from None
            raise
        if large:
            process.end()
        else:
            self._idle.append(process)
            process.idle(lambda: self._idle.remove(process))


class BodyProcess:
    """One process that reads bodies, one at a time."""

    def __init__(
        self,
        processes: "set[BodyProcess]",
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._processes = processes
        self._process = process
        self._reader = reader
        self._writer = writer
        self._timer: asyncio.TimerHandle | None = None
        processes.add(self)

    @classmethod
    async def start(cls, processes: "set[BodyProcess]") -> "BodyProcess":
        """A new one, entered into `processes` until it has ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**environ, PARENT_VARIABLE: str(getpid())},
            )
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(processes, process, reader, writer)

    async def ask(self, header: BodyHeader, pieces: list[bytes], size: int) -> tuple[bool, bytes]:
        """The answer to a body of `size` bytes, and whether it is a plan. Leaves `pieces` empty:
        each goes when it was sent. Raises OSError or EOFError when the process is gone."""
        head = encode_header(header)
        self._writer.write(REQUEST.pack(len(head), size) + head)
        pieces.reverse()
        while pieces:
            self._writer.write(pieces.pop())
            await self._writer.drain()
        is_plan, size = ANSWER.unpack(await self._reader.readexactly(ANSWER.size))
        return is_plan, await self._reader.readexactly(size)

    def idle(self, forget: Callable[[], None]) -> None:
        """Ends after IDLE_S, having called `forget`."""

        def end() -> None:
            forget()
            self.end()

        self._timer = asyncio.get_running_loop().call_later(IDLE_S, end)

    def stop_idling(self) -> None:
        """It has work."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def end(self) -> None:
        """Kill it. The system takes a while to clear away a large process: it is waited for
        later."""
        self.stop_idling()
        self._process.kill()
        self._writer.transport.abort()
        self._reap()

    def _reap(self) -> None:
        if self._process.poll() is None:
            asyncio.get_running_loop().call_later(0.1, self._reap)
        else:
            self._processes.discard(self)
