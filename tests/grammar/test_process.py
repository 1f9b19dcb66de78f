"""The matcher process as a worker's end of it speaks to it: by messages, and in the memory that both
have."""

import os
import resource
import time
from collections.abc import Iterator

import numpy as np
import pytest
from pagewire.config import ModelConfig
from pagewire.grammar.child import MatcherProcess
from pagewire.grammar.messages import Close, Open, Start, ToMatcher, mask_words
from pagewire.grammar.shared import SharedMasks, tag_of
from pagewire.hub.huggingface import demo_gguf
from pagewire_protocol.grammar import Grammar, GrammarKind

VOCAB, EOS = 49152, (2, 0)
A, B, C = 81, 82, 83
"""The tokens of these letters."""
WAIT_S = 60.0
FD_SETSIZE = 1024
"""Of the C library: `select` takes no descriptors from here on."""


class Worker:
    """What a worker knows of its matcher process."""

    def __init__(self, device_tells: bool = False) -> None:
        self.shared = SharedMasks(2, mask_words(VOCAB), 1, 0)
        model = ModelConfig(model=str(demo_gguf()))
        start = Start(model, VOCAB, EOS, 2, device_tells=device_tells)
        self.process = MatcherProcess(start, self.shared)

    def send(self, *messages: ToMatcher) -> None:
        """All of them before the process can answer any."""
        for message in messages:
            self.process.send(message)

    def tell(self, place: int, key: int, position: int, token: int, says_so: bool = True) -> None:
        """The next token of the stream `key`."""
        places, keys = np.array([place]), np.array([key], np.uint64)
        self.shared.tell(places, keys, np.array([position]), np.array([token], np.int32))
        if says_so:
            self.process.look()

    def mask(self, place: int, key: int, position: int) -> list[int]:
        """The tokens that the mask of `place` allows, once it is that of this stream and
        position."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            assert not self.process.receive(), "something failed"
            if self.shared.tags[place] == tag_of(key, position):
                bits = np.unpackbits(self.shared.masks[place].view(np.uint8), bitorder="little")
                return np.flatnonzero(bits).tolist()
            time.sleep(0.0001)
        raise AssertionError(f"no mask of {key} for position {position} within {WAIT_S} s")


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.process.close()


def column(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


GRAMMAR = regex("abc[xyz]")


def test_each_token_that_is_told_brings_the_next_mask(worker: Worker) -> None:
    worker.send(Open(1, 0, GRAMMAR, b""))
    assert A in worker.mask(0, 1, 0)
    worker.tell(0, 1, 0, A)
    assert B in worker.mask(0, 1, 1)
    worker.tell(0, 1, 1, B)
    assert C in worker.mask(0, 1, 2)


def test_a_stream_that_is_opened_again_is_as_the_newest_word_says(worker: Worker) -> None:
    """And goes on as one that was there from the beginning. What is told of the earlier opening is
    for nobody."""
    worker.send(Open(1, 0, GRAMMAR, b""))
    assert A in worker.mask(0, 1, 0)
    worker.send(Close((1,)), Open(2, 0, GRAMMAR, column(A)))
    worker.tell(0, 1, 0, C)
    assert B in worker.mask(0, 2, 1)
    worker.tell(0, 2, 1, B)
    assert C in worker.mask(0, 2, 2)


def test_a_place_has_one_stream_after_the_other(worker: Worker) -> None:
    worker.send(Open(1, 0, GRAMMAR, b""), Close((1,)))
    worker.send(Open(2, 1, GRAMMAR, column(A)), Open(3, 0, GRAMMAR, b""))
    assert A in worker.mask(0, 3, 0) and B in worker.mask(1, 2, 1)
    worker.tell(1, 2, 1, B)
    assert C in worker.mask(1, 2, 2)
    assert worker.shared.tags[0] == tag_of(3, 0)


def test_a_token_for_another_position_or_stream_changes_nothing(worker: Worker) -> None:
    worker.send(Open(1, 0, GRAMMAR, b""), Open(2, 1, GRAMMAR, b""))
    assert A in worker.mask(0, 1, 0) and A in worker.mask(1, 2, 0)
    worker.tell(0, 1, 1, B)  # a position too far
    worker.tell(0, 7, 0, A)  # nobody's
    worker.tell(1, 2, 0, A)
    assert B in worker.mask(1, 2, 1)
    assert worker.shared.tags[0] == tag_of(1, 0)


def test_what_a_device_tells_is_found_without_a_message(worker: Worker) -> None:
    """Right away and after a while, in which messages are heard too."""
    worker.process.close()
    worker = Worker(device_tells=True)
    try:
        worker.send(Open(1, 0, GRAMMAR, b""))
        assert A in worker.mask(0, 1, 0)
        worker.tell(0, 1, 0, A, says_so=False)
        assert B in worker.mask(0, 1, 1)
        time.sleep(0.3)
        worker.send(Open(2, 1, GRAMMAR, b""))
        assert A in worker.mask(1, 2, 0)
        worker.tell(0, 1, 1, B, says_so=False)
        worker.tell(1, 2, 0, A, says_so=False)
        assert C in worker.mask(0, 1, 2) and B in worker.mask(1, 2, 1)
        worker.send(Close((1, 2)))
        worker.send(Open(3, 0, GRAMMAR, b""))
        assert A in worker.mask(0, 3, 0)
    finally:
        worker.process.close()


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * FD_SETSIZE, reason="few files may be open"
)
def test_a_service_may_have_many_files_open() -> None:
    """Descriptors of sockets are then larger than select takes, on both sides."""
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(FD_SETSIZE)]
    try:
        worker = Worker()
    finally:
        for file in files:
            os.close(file)
    try:
        assert worker.process.fileno() >= FD_SETSIZE
        worker.send(Open(1, 0, GRAMMAR, b""))
        while not worker.process.is_ready:
            assert worker.process.wait(WAIT_S)
            worker.process.receive()
        assert A in worker.mask(0, 1, 0)
        worker.tell(0, 1, 0, A)
        assert B in worker.mask(0, 1, 1)
    finally:
        worker.process.close()
