"""The requests that match grammars, and the masks for their next tokens. No sockets, no clock.

A request's state is a function of its grammar and its output so far, so that it can be made again
anywhere: by `open` with that output.
"""

import time

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray
from pagewire_protocol.grammar import Grammar

from .compiler import Compiler, explained
from .vocabulary import Vocabulary

Words = NDArray[np.uint32]


class Stream:
    """One request."""

    __slots__ = ("after", "cost", "forced", "matcher", "num_output", "place", "tail")

    def __init__(self, matcher: LLMatcher, after: bytes, place: int) -> None:
        self.matcher = matcher
        self.after = after
        """What must come before the constrained part; empty once it has come."""
        self.tail = b""
        """The end of the free output, as far as `after` may have begun in it."""
        self.num_output = 0
        """The forced tokens are counted."""
        self.forced: list[int] = []
        """The forced run before the position that the mask is for."""
        self.place = place
        self.cost = 0.0
        """Seconds that its last mask took."""


class Matchers:
    """All requests of one service, by their keys. `masks` [places, words]: mask i is written for
    the request whose place that is. `max_forced`: where a grammar leaves a single token, that many
    in a row at most are taken as if they had been sampled, and the mask is for what follows
    them."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        compiler: Compiler,
        masks: Words,
        max_forced: int = 0,
    ) -> None:
        self._vocabulary = vocabulary
        self._compiler = compiler
        self._masks = masks
        self._address = int(masks.ctypes.data)
        self._stride = masks.strides[0]
        self._mask_bytes = masks[:1].nbytes
        self._max_forced = max_forced
        self._streams: dict[int, Stream] = {}
        self._free_mask = self._all_but_endings()

    def _all_but_endings(self) -> Words:
        """Of free output: a text must not end before its constrained part."""
        bits = np.ones(self._masks.shape[1] * 32, np.uint8)
        bits[self._vocabulary.size :] = 0
        bits[list(self._vocabulary.eos)] = 0
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def __contains__(self, key: int) -> bool:
        return key in self._streams

    def open(self, key: int, place: int, grammar: Grammar, output: list[int]) -> None:
        """A request with the output so far. Raises GrammarError."""
        stream = Stream(self._compiler.matcher(grammar), grammar.after.encode(), place)
        self._streams[key] = stream
        for token in output:
            self._consume(stream, token)

    def close(self, key: int) -> int | None:
        """The request is over. Returns its place; None for a key that is not open."""
        stream = self._streams.pop(key, None)
        return None if stream is None else stream.place

    def place(self, key: int) -> int:
        """Of a request that is open."""
        return self._streams[key].place

    def advance(self, keys: list[int], tokens: list[int]) -> list[int]:
        """The next token of each; returns the keys that are open."""
        present: list[int] = []
        for key, token in zip(keys, tokens, strict=True):
            stream = self._streams.get(key)
            if stream is not None:
                self._consume(stream, token)
                present.append(key)
        return present

    def _consume(self, stream: Stream, token: int) -> None:
        stream.num_output += 1
        if stream.after:
            data = self._vocabulary.raw[token] if token < self._vocabulary.size else b""
            stream.tail += data
            if stream.after in stream.tail:
                stream.after = b""
                stream.tail = b""
            else:
                stream.tail = (
                    stream.tail[-(len(stream.after) - 1) :] if len(stream.after) > 1 else b""
                )
        else:
            stream.matcher.consume_token(token)

    def write(self, key: int) -> str:
        """The mask of this open request. Returns why there is none, and it is open no longer then;
        empty: there is one."""
        stream = self._streams[key]
        if stream.after:
            self._masks[stream.place] = self._free_mask
            return ""
        began = time.perf_counter()
        self._compute(stream)
        if self._max_forced:
            self._run_ahead(stream)
        stream.cost = time.perf_counter() - began
        why = _why_none(stream.matcher, bool(self._masks[stream.place].any()))
        if why:
            self.close(key)
        return why

    def position(self, key: int) -> int:
        """The output position that the mask of this request is for."""
        return self._streams[key].num_output

    def cost(self, key: int) -> float:
        """Seconds that its last mask took; the next one is likely to take as long."""
        return self._streams[key].cost

    def _compute(self, stream: Stream) -> None:
        """Its mask."""
        address = self._address + stream.place * self._stride
        stream.matcher.unsafe_compute_mask_ptr(address, self._mask_bytes)

    def _run_ahead(self, stream: Stream) -> None:
        """Take the tokens that are the only ones allowed. Those that end a text are sampled."""
        stream.forced = []
        while len(stream.forced) < self._max_forced:
            token = only_token(self._masks[stream.place])
            if token is None or token in self._vocabulary.eos:
                return
            self._consume(stream, token)
            stream.forced.append(token)
            self._compute(stream)

    def forced(self, key: int) -> list[int]:
        """The forced run of this request, before the position of its mask."""
        return self._streams[key].forced


def _why_none(matcher: LLMatcher, some_token: bool) -> str:
    """Why there is no mask, where `some_token` says whether it allows any; empty: there is one."""
    if matcher.is_error():
        return explained(matcher.get_error())
    return "" if some_token else "no token of the model continues the text"


def only_token(mask: Words) -> int | None:
    """The token that `mask` [words] allows, where it allows exactly one."""
    if np.count_nonzero(mask) != 1:
        return None
    word = int(mask.argmax())
    bits = int(mask[word])
    return 32 * word + bits.bit_length() - 1 if bits & (bits - 1) == 0 else None
