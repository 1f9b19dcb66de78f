"""A matcher process that is none: masks are a function of the grammar's source and the output, come
late or never, and it dies when a test says so."""

import os
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from pagewire.config import ModelConfig
from pagewire.grammar.child import MatcherGone
from pagewire.grammar.messages import Close, Failed, FromMatcher, Open, Start, ToMatcher
from pagewire.grammar.shared import Places, SharedMasks
from pagewire.worker.step.grammar_masks import GrammarMasks
from pagewire_protocol.grammar import Grammar, GrammarKind

ALWAYS_READABLE = os.open(os.devnull, os.O_RDONLY)


def grammar(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


def allowed(source: str, output: list[int], vocab_size: int) -> list[int]:
    """Three tokens or so, which no other source or output shares; two times out of three a single
    one, where the source is in capitals."""
    make = Random(zlib.crc32(repr((source, output)).encode()))
    tokens = sorted(make.sample(range(3, vocab_size), 3))
    return tokens[:1] if source.isupper() and make.random() < 2 / 3 else tokens


class StandIn:
    """One process. `late`: how likely each answer is not there yet when it is asked for."""

    def __init__(
        self, start: Start, shared: SharedMasks, late: float = 0.0, random: Random | None = None
    ) -> None:
        self.is_ready = True
        self.ready_at = 0.0
        self.dead = False
        self.places = Places(shared, start.index)
        self.looked = 0
        """How often it was told something."""
        self._late = late
        self._random = random or Random(0)
        self._vocab_size = start.vocab_size
        self._max_forced = start.max_forced
        self._streams: dict[int, tuple[Open, list[int]]] = {}
        self._due: list[int] = []

    def send(self, message: ToMatcher) -> None:
        match message:
            case Open():
                output = np.frombuffer(message.output, np.int32).tolist()
                self._streams[message.key] = message, output
                self.places.open(message.key, message.place)
                self._due.append(message.key)
            case Close():
                for key in message.keys:
                    opened, _ = self._streams.pop(key, (None, None))
                    if opened is not None:
                        self.places.close(key, opened.place)
            case _:
                raise AssertionError(message)

    def look(self) -> None:
        self.looked += 1

    def receive(self) -> list[FromMatcher]:
        if self.dead:
            raise MatcherGone("was killed by a test")
        for key, token in zip(*self.places.told(), strict=True):
            self._streams[key][1].append(token)
            self._due.append(key)
        waiting = [key for key in self._due if self._random.random() < self._late]
        answers: list[FromMatcher] = []
        for key in self._due:
            if key in waiting or key not in self._streams:
                continue
            opened, output = self._streams[key]
            if opened.grammar.source == "impossible":
                self._streams.pop(key)
                self.places.close(key, opened.place)
                answers.append(Failed(key, "no token continues it"))
                continue
            run: list[int] = []
            while len(run) < self._max_forced:
                tokens = allowed(opened.grammar.source, output, self._vocab_size)
                if len(tokens) > 1:
                    break
                run += tokens
                output += tokens
            self._write(opened, output)
            self.places.write(key, opened.place, len(output), run)
        self._due = waiting
        return answers

    def _write(self, opened: Open, output: list[int]) -> None:
        masks = self.places.masks
        bits = np.zeros(32 * masks.shape[1], np.uint8)
        bits[allowed(opened.grammar.source, output, self._vocab_size)] = 1
        masks[opened.place] = np.packbits(bits, bitorder="little").view(np.uint32)

    sends = False

    def fileno(self) -> int:
        """Of a file that can always be read."""
        return ALWAYS_READABLE

    def close(self) -> None:
        self.dead = True


class Clock:
    """Each look at it takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Room:
    """GrammarMasks over stand-ins."""

    def __init__(
        self,
        count: int,
        vocab_size: int,
        late: float = 0.0,
        seed: int = 0,
        kind: Callable[..., GrammarMasks] = GrammarMasks,
    ) -> None:
        self.processes: list[StandIn] = []
        self._random = Random(seed)
        self._late = late
        self.clock = Clock()
        self.masks = kind(
            count,
            ModelConfig(),
            vocab_size,
            (),
            clock=self.clock,
            sleep=self.clock.sleep,
            start_process=self._start,  # pyright: ignore[reportArgumentType]
        )

    def _start(self, start: Start, shared: SharedMasks) -> StandIn:
        self.processes.append(StandIn(start, shared, self._late, self._random))
        return self.processes[-1]

    def kill(self) -> None:
        """One of those that live."""
        living = [process for process in self.processes if not process.dead]
        if living:
            self._random.choice(living).dead = True
