"""The process that compiles grammars and computes masks, for the service that started it. It ends
with that service, or when the socket does.

Native code that reads what clients send runs here alone: when it crashes or hangs, the service
makes a new process and opens its requests again.
"""

import contextlib
import os
import queue
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from pagewire.process.parent import die_with_parent
from pagewire.process.timers import sleep_precisely, wake_as_usual

from .compiler import Compiler
from .errors import GrammarError
from .matchers import Matchers
from .messages import (
    Check,
    Checked,
    Close,
    Failed,
    FromMatcher,
    Look,
    Open,
    Ready,
    Start,
    ToMatcher,
    decode_to_matcher,
    framed,
    mask_words,
)
from .pace import Pace
from .shared import Places, SharedMasks
from .stream import FrameReader
from .vocabulary import load_vocabulary

NICE: Final = 1
"""Those that serve everybody go before."""
COMPILING: Final = 2
"""Threads that compile, so that a costly grammar holds up no other's masks."""

LOOK_S: Final = 0.0001
"""Between two looks at what is told while masks are computed."""
HEAR_S: Final = 0.002
"""The same at what the service says: where masks take longer than its steps, there is always one to
be computed."""
SLEEP_S: Final = 0.002
"""A longer wait ends with the first message. Shorter ones are not a whole number of milliseconds, as
`poll` has them."""
PATIENCE: Final = 4.0
"""How many times its own duration a mask waits behind those that were wanted after it."""
COMPILER_STACK: Final = 256 << 20
"""Bytes, of which only those used take memory: llguidance follows rules that refer to each other by
recursion, and a grammar may have some 16,000 of them in a row."""


def main() -> None:
    """`argv`: the descriptors of the socket, and of the memory for masks if it is to compute
    any."""
    die_with_parent()
    os.nice(NICE)
    wake_as_usual()
    threading.stack_size(COMPILER_STACK)
    with socket.socket(fileno=int(sys.argv[1])) as service:
        Process(service, *map(int, sys.argv[2:])).serve()


class Process:
    """One process, for one service."""

    def __init__(self, service: socket.socket, memory: int | None = None) -> None:
        self._service = service
        self._memory = memory
        self._reader = FrameReader(service)
        self._compiler: Compiler | None = None
        self._matchers: Matchers | None = None
        self._places: Places | None = None
        self._unusable = ""
        """Why this model's texts cannot be held to a grammar."""
        self._compiling: dict[int, Check | Open] = {}
        """What waits for its grammar to be compiled, by key."""
        self._compiled: queue.SimpleQueue[Check | Open] = queue.SimpleQueue()
        self._opened: list[int] = []
        """Streams that wait for their first masks, by key."""
        self._pace: Pace | None = None
        """Where a device tells tokens."""
        self._pool = ThreadPoolExecutor(COMPILING, thread_name_prefix="compile")
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._poll = select.poll()  # it takes any descriptor, and this one's is its parent's
        self._poll.register(service, select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)

    def serve(self) -> None:
        """Until the socket ends."""
        while True:
            self._hear(self._pause_s())
            if self._matchers is not None and self._places is not None:
                self._write(self._matchers, self._places)

    def _pause_s(self) -> float | None:
        """Until something may have been told of which no message tells."""
        if self._pace is None or self._places is None or not self._places.any:
            return None
        return self._pace.pause_s(time.perf_counter())

    def _hear(self, wait_s: float | None) -> None:
        """Take what the service says and what has been compiled; wait so long until there is some,
        or, None, for as long as it takes."""
        if wait_s is not None and 0 < wait_s < SLEEP_S:
            time.sleep(wait_s)
            wait_s = 0.0
        limit = None if wait_s is None else int(1000 * wait_s)
        ready = [fileno for fileno, _ in self._poll.poll(limit)]
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
            self._take_compiled()
        if self._service.fileno() in ready:
            frames = self._reader.read()
            if frames is None:
                os._exit(0)
            self._handle(list(map(decode_to_matcher, frames)))

    def _send(self, message: FromMatcher) -> None:
        self._service.sendall(framed(message))

    def _handle(self, messages: list[ToMatcher]) -> None:
        for message in messages:
            match message:
                case Start():
                    self._start(message)
                case Check() | Open():
                    self._compile(message)
                case Close():
                    for key in message.keys:
                        self._compiling.pop(key, None)
                        if self._matchers is not None:
                            self._close(self._matchers, key)
                case Look():
                    pass  # `_write` does, before anything else

    def _close(self, matchers: Matchers, key: int) -> None:
        place = matchers.close(key)
        if place is not None and self._places is not None:
            self._places.close(key, place)

    def _start(self, start: Start) -> None:
        try:
            vocabulary = load_vocabulary(start.model, start.vocab_size, start.eos)
        except GrammarError as error:
            self._unusable = str(error)
            self._send(Ready())
            return
        self._compiler = Compiler(vocabulary)
        if self._memory is not None:
            words = mask_words(start.vocab_size)
            shape = start.places, words, start.processes, start.max_forced
            self._places = Places(SharedMasks(*shape, self._memory), start.index)
            if start.device_tells:
                self._pace = Pace()
                sleep_precisely()
            self._matchers = Matchers(
                vocabulary, self._compiler, self._places.masks, start.max_forced
            )
        self._send(Ready())

    def _compile(self, message: Check | Open) -> None:
        if self._unusable:
            self._refuse(message, self._unusable)
            return
        self._compiling[message.key] = message
        self._pool.submit(self._compile_in_thread, message)

    def _compile_in_thread(self, message: Check | Open) -> None:
        assert self._compiler is not None
        with contextlib.suppress(GrammarError):  # kept, and raised again where it is asked for
            self._compiler.compiled(message.grammar)
        self._compiled.put(message)
        self._waker.send(b"x")

    def _take_compiled(self) -> None:
        assert self._compiler is not None
        while not self._compiled.empty():
            message = self._compiled.get()
            if self._compiling.get(message.key) is not message:
                continue  # closed or opened again meanwhile
            del self._compiling[message.key]
            try:
                if isinstance(message, Check):
                    ignored = self._compiler.compiled(message.grammar).ignored
                    self._send(Checked(message.key, "", ignored))
                elif self._matchers is not None and self._places is not None:
                    output = np.frombuffer(message.output, np.int32).tolist()
                    self._matchers.open(message.key, message.place, message.grammar, output)
                    self._places.open(message.key, message.place)
                    self._opened.append(message.key)
                    if self._pace is not None:
                        self._pace.begin(time.perf_counter())
            except GrammarError as error:
                self._refuse(message, str(error))

    def _refuse(self, message: Check | Open, why: str) -> None:
        answer = Checked if isinstance(message, Check) else Failed
        self._send(answer(message.key, why))

    def _write(self, matchers: Matchers, places: Places) -> None:
        """The masks of the streams that have been opened and of those whose tokens are told, now or
        meanwhile. Each is there for its stream as soon as it is written, and those that are likely
        to take long come last: a step goes without the few that are late."""
        waiting: list[tuple[float, int]] = []
        heard = time.perf_counter()
        while True:
            now = time.perf_counter()
            if now - heard >= HEAR_S:
                self._hear(0.0)
                heard = now
            keys = [key for key in self._opened if key in matchers]  # some may have been closed
            told = places.told()
            if self._pace is not None and told[0]:
                self._pace.told(now)
            keys += matchers.advance(*told)
            self._opened = []
            if keys:
                waiting += [(now + PATIENCE * matchers.cost(key), key) for key in keys]
                waiting.sort(reverse=True)
            if not waiting:
                return
            looked = now
            while waiting and time.perf_counter() - looked < LOOK_S:
                key = waiting.pop()[1]
                if key in matchers:
                    self._write_one(matchers, places, key)

    def _write_one(self, matchers: Matchers, places: Places, key: int) -> None:
        place = matchers.place(key)
        why = matchers.write(key)
        if why:
            places.close(key, place)
            self._send(Failed(key, why))
        else:
            places.write(key, place, matchers.position(key), matchers.forced(key))


if __name__ == "__main__":
    main()
