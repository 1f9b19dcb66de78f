"""Rows with grammars by the real kernels: those that have nothing else are sampled in one launch,
and get the tokens that they would get eagerly, one operation after the other."""

from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from pagewire.worker.gpu.resample import KERNELS, Kernels
from pagewire.worker.step import matcher_pool
from pagewire_protocol.messages import Admission, Step, pack
from pagewire_protocol.sampling import Sampling
from worker.sampling_reference import bias, words
from worker.special_rows import SLOTS, VOCAB, Device
from worker.stand_in_matcher import Room, allowed, grammar

KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.7, "top_k": 2, "logprobs": 0},
    {"temperature": 1.5, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
    {"temperature": 1.0, **bias({5: 3.0, 9: -4.0}), "bad_words": words([7], [9, 11])},
    {"temperature": 1.0, "min_tokens": 6},
]


class Grammars:
    """A device whose rows come and go; all but the rows of the last slot have grammars, and some of
    these are late. `eager`: nothing is sampled in one launch."""

    def __init__(self, seed: int, late: float, eager: bool, kernels: Kernels = KERNELS) -> None:
        self.room = Room(SLOTS, VOCAB, late, seed)
        self.device = Device(kernels, self.room.masks)
        self._eager = eager
        self._random = Random(seed)
        self.requests: dict[int, tuple[str, list[int]]] = {}
        """By slot: the grammar's source and the output."""
        self.n = 0

    def replace(self, slot: Any, kind: dict[str, Any] | None = None, source: str = "") -> None:
        """A new request, with some output, in `slot`; by default of any kind."""
        kind = self._random.choice(KINDS) if kind is None else kind
        if not source and slot < SLOTS - 1:
            source = f"source {self.n}"
        output = [self._random.randrange(3, VOCAB) for _ in range(self._random.choice([0, 3]))]
        self.n += 1
        admission = Admission(
            slot, self.n, pack("i", [4, 9, 5]), pack("i", output), pack("i", range(20)), 0,
            Sampling(self._random.randrange(2**62), 100, **kind),
            grammar=grammar(source) if source else None,
        )  # fmt: skip
        retired = [slot] if slot in self.requests else []
        if retired:
            self.device.slots.retire(np.array(retired, np.int32))
        self.device.slots.admit(admission)
        if self._eager:
            self.device.slots.grammar_only[:] = False
        self.device.special.admit(np.array([slot]))
        epoch: Any = 1
        step = Step(epoch, self.n, retire=pack("i", retired), admit=(admission,))
        self.room.masks.follow(step)
        self.requests[slot] = source, output

    def step(self, logits: torch.Tensor) -> tuple[list[int], list[int], Any]:
        """One step of all rows: their tokens (-2: none), the slots' last tokens,
        log-probabilities."""
        slots = self._random.sample(sorted(self.requests), len(self.requests))
        which = np.array(slots)
        columns = self.device.slots
        ready = self.room.masks.ready(which, columns.num_output_tokens(which))
        sampled = logits[which].argmax(-1).int()
        self.device.state.last_token[which] = sampled
        logprobs = self.device.special.resample(logits[which], which, sampled, ready=ready)
        tokens = np.where(ready, sampled.numpy(), -2)
        for slot, token in zip(which[ready].tolist(), tokens[ready].tolist(), strict=True):
            source, output = self.requests[slot]
            assert not source or token in allowed(source, output, VOCAB)
            output.append(token)
        columns.append_tokens(which[ready], tokens[ready].astype(np.int32))
        keys = self.room.masks.keys(which[ready])
        self.room.masks.append(keys, tokens[ready].astype(np.int32))
        by_slot = np.full(SLOTS, -3)
        by_slot[which] = tokens
        told = logprobs and logprobs.columns(sampled.numpy(), ready)
        last = np.where(by_slot >= 0, self.device.state.last_token.numpy(), -3)
        return by_slot.tolist(), last.tolist(), told


@pytest.mark.parametrize(("late", "deaths"), [(0.0, False), (0.4, False), (0.2, True)])
def test_one_launch_gives_what_eager_sampling_gives(
    late: float, deaths: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties, biases, bad words, least numbers of tokens, filters, seeds, log-probabilities;
    slots that pass from one request to the next; masks that are late; several matchers, some of
    which end."""
    monkeypatch.setattr(matcher_pool, "CROWDED", 2)
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 3)
    calls: Counter[str] = Counter()

    def counted(logits: Any, *others: Any) -> None:
        calls["masked"] += 1
        KERNELS.sample_masked(logits, *others)

    one = Grammars(3, late, eager=False, kernels=KERNELS._replace(sample_masked=counted))
    other = Grammars(3, late, eager=True)
    random = Random(1)
    torch.manual_seed(5)
    missing = 0
    for slot in range(SLOTS):
        one.replace(slot)
        other.replace(slot)
    for _ in range(24):
        if random.random() < 0.4:
            slot = random.randrange(SLOTS)
            one.replace(slot)
            other.replace(slot)
        if deaths and random.random() < 0.2:
            for rows in (one, other):
                rows.room.kill()
                rows.room.clock.now += 6
        logits = (torch.randn(SLOTS, VOCAB) * 2).bfloat16()
        tokens, last, logprobs = one.step(logits)
        assert (tokens, last, logprobs) == other.step(logits)
        missing += tokens.count(-2)
    assert calls["masked"] >= 20 and bool(missing) == bool(late)


def test_rows_that_have_a_grammar_and_nothing_else_launch_nothing_else() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("an eager operation for a row that needs none")

    kernels = KERNELS._replace(sample=never, apply_token_masks=never, apply_penalties=never)
    rows = Grammars(1, 0.0, eager=False, kernels=kernels)
    for slot in range(SLOTS - 1):
        rows.replace(slot, KINDS[slot % 4])
    for _ in range(3):
        tokens, _, _ = rows.step(torch.randn(SLOTS, VOCAB))
        assert min(tokens[:-1]) >= 0


def test_a_row_whose_grammar_has_failed_keeps_the_steps_token() -> None:
    rows = Grammars(1, 0.0, eager=False)
    rows.replace(0, KINDS[0])
    rows.replace(1, KINDS[0], "impossible")
    device = rows.device
    slots = np.array([1, 0])
    assert rows.room.masks.ready(slots, device.slots.num_output_tokens(slots)).all()
    assert rows.room.masks.failed(slots).tolist() == [True, False]
    sampled = torch.tensor([17, 17], dtype=torch.int32)
    device.special.resample(torch.randn(2, VOCAB), slots, sampled)
    source, output = rows.requests[0]
    assert sampled[0] == 17 and int(sampled[1]) in allowed(source, output, VOCAB)


def test_warming_up_moves_no_request() -> None:
    rows = Grammars(1, 0.0, eager=False)
    state = rows.device.state
    state.last_token[:] = 5
    rows.device.special.warm_up()
    assert (state.last_token[:-1] == 5).all()
