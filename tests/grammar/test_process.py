"""The matcher process as a worker's end of it speaks to it: whatever was said while a grammar was
still being compiled counts."""

from collections.abc import Iterator

import numpy as np
import pytest
from pagewire.config import ModelConfig
from pagewire.grammar.child import MatcherProcess
from pagewire.grammar.messages import Advance, Close, Masks, Open, Start, ToMatcher
from pagewire.hub.huggingface import demo_gguf
from pagewire_protocol.grammar import Grammar, GrammarKind

VOCAB, EOS = 49152, (2, 0)
A, B, C = 81, 82, 83
"""The tokens of these letters."""
WAIT_S = 60.0


class Worker:
    """What a worker knows of its matcher process."""

    def __init__(self) -> None:
        self.process = MatcherProcess(Start(ModelConfig(model=str(demo_gguf())), VOCAB, EOS, 2))

    def send(self, *messages: ToMatcher) -> None:
        """All of them before the process can answer any."""
        for message in messages:
            self.process.send(message)

    def masks(self, wanted: dict[int, int]) -> dict[int, list[int]]:
        """By key, the tokens that the mask allows, once all have come for the output positions
        `wanted`. Masks of earlier ones may come before, of other streams none."""
        found: dict[int, list[int]] = {}
        while len(found) < len(wanted):
            assert self.process.wait(WAIT_S), f"{wanted} wanted, and only {list(found)} have come"
            for message in self.process.receive():
                assert isinstance(message, Masks)
                keys = np.frombuffer(message.keys, np.uint64).tolist()
                positions = np.frombuffer(message.positions, np.int32).tolist()
                for key, position in zip(keys, positions, strict=True):
                    assert position <= wanted[key]
                    if position == wanted[key]:
                        bits = self.process.masks[key - 1].view(np.uint8)
                        unpacked = np.unpackbits(bits, bitorder="little")
                        found[key] = np.flatnonzero(unpacked).tolist()
        return found


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.process.close()


def column(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def advance(**tokens: int) -> Advance:
    """Of the streams k1 and k2."""
    keys = np.array([int(name[1:]) for name in tokens], np.uint64)
    return Advance(keys.tobytes(), column(*tokens.values()))


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


GRAMMAR = regex("abc[xyz]")


def test_a_token_that_comes_before_the_grammar_is_compiled_counts(worker: Worker) -> None:
    """As after the end of a process: the next one is told of all streams as they are, while a step
    of theirs is still under way."""
    worker.send(Open(1, 0, GRAMMAR, b""), Open(2, 1, GRAMMAR, column(A)))
    worker.send(advance(k1=A, k2=B), advance(k1=B))
    found = worker.masks({1: 2, 2: 2})
    assert C in found[1] and A not in found[1] and found[1] == found[2]


def test_a_stream_that_is_opened_again_is_as_the_newest_word_says(worker: Worker) -> None:
    """And goes on as one that was there from the beginning."""
    worker.send(Open(1, 0, GRAMMAR, b""), advance(k1=A))
    worker.send(Open(1, 0, GRAMMAR, column(A)), advance(k1=B))
    assert C in worker.masks({1: 2})[1]
    worker.send(advance(k1=C))
    assert C not in worker.masks({1: 3})[1]


def test_what_came_for_a_stream_that_was_closed_is_of_no_use_to_the_next(worker: Worker) -> None:
    worker.send(Open(1, 0, GRAMMAR, b""), advance(k1=A), Close((1,)))
    worker.send(Open(2, 1, GRAMMAR, column(A)), Open(1, 0, GRAMMAR, b""), advance(k2=B))
    found = worker.masks({1: 0, 2: 2})
    assert A in found[1] and C in found[2]
