"""Forced runs in the runner on the CPU: the same tokens in fewer steps, whatever room the blocks have
and whoever runs beside them."""

from collections import deque

import numpy as np
import pytest
from pagewire.config import ModelConfig, SchedulerConfig
from pagewire.worker.cpu.runner import Runner
from pagewire.worker.step.forced_runs import MAX_RUN
from pagewire_protocol.messages import Admission, Step, StepResult, pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.conftest import worker_config
from worker.stand_in_matcher import Room, allowed, grammar

COUNT = 40
REQUESTS: list[tuple[str | None, dict[str, object]]] = [
    ("G", {}),
    (None, {"logprobs": 2}),
    ("H", {"temperature": 0.0, "frequency_penalty": 0.7}),
    ("I", {"logprobs": 1}),
    ("J", {"bad_words": (pack("i", [5]),)}),
    ("k", {}),
    (None, {}),
]
"""A grammar in capitals forces most tokens; whether there is one, and what else is asked for."""


class Server:
    """A scheduler in miniature, which hears of a step's result when the next one has been sent."""

    def __init__(self, path, numbers, max_run: int, late: float) -> None:
        rooms: list[Room] = []

        def make_masks(count, model, vocab_size, eos):
            rooms.append(Room(count, vocab_size, late))
            return rooms[-1].masks

        config = worker_config()
        limits = SchedulerConfig(max_num_seqs=8)
        self.runner = Runner(path, ModelConfig(), limits, config, make_masks=make_masks)
        self.runner._max_run = self.runner._masks.allow_runs(max_run)
        self.block_size = config.block_size
        self.free = list(range(self.runner.facts().num_blocks))
        self.prompts = [numbers(5 + i, i) for i in range(len(REQUESTS))]
        self.output: list[list[int]] = [[] for _ in REQUESTS]
        self.blocks = [1 + len(prompt) // self.block_size for prompt in self.prompts]
        self.unheard: deque[StepResult] = deque()
        self.heard = [len(prompt) for prompt in self.prompts]
        """Tokens that each slot had by the results that were heard of."""
        self.steps = 0
        self.left_out = 0
        self.scored: dict[int, list[int]] = {1: [], 3: []}

    def admissions(self) -> tuple[Admission, ...]:
        return tuple(
            Admission(
                slot,
                slot + 1,
                pack("i", self.prompts[slot]),
                b"",
                pack("i", [self.free.pop() for _ in range(self.blocks[slot])]),
                0,
                Sampling(**{"seed": slot, "max_tokens": 100, "temperature": 1.0, **options}),
                grammar=None if source is None else grammar(source),
            )
            for slot, (source, options) in enumerate(REQUESTS)
        )

    def step(self) -> None:
        first = not self.steps
        slots = list(range(len(REQUESTS)))
        counts = [len(prompt) if first else 1 for prompt in self.prompts]
        grown = []
        for slot in slots:
            # Each result that was not heard of brings one token, as far as one can know.
            while self.heard[slot] + len(self.unheard) > self.blocks[slot] * self.block_size:
                self.blocks[slot] += 1
                grown.append(slot)
        step = Step(
            1,
            self.steps + 1,
            admit=self.admissions() if first else (),
            run_slots=pack("i", slots),
            run_counts=pack("i", counts),
            grow_slots=pack("i", grown),
            grow_blocks=pack("i", [self.free.pop() for _ in grown]),
        )
        self.steps += 1
        self.unheard.append(self.runner.execute(step))
        if len(self.unheard) > 1:
            self.hear(self.unheard.popleft())

    def hear(self, result: StepResult) -> None:
        slots = unpack("i", result.slots).tolist()
        counts = unpack("i", result.counts).tolist() if result.counts else [1] * len(slots)
        assert sorted(slots) == list(range(len(REQUESTS)))
        tokens = unpack("i", result.tokens).tolist()
        owner = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
        for slot, token in zip(owner, tokens, strict=True):
            source = REQUESTS[slot][0]
            if source is not None:
                assert token in allowed(source, self.output[slot], 257)
            self.output[slot].append(token)
            self.heard[slot] += 1
        assert not any(result.flags)
        self.left_out += counts.count(0)
        if result.logprobs is not None:
            rows = unpack("i", result.logprobs.rows).tolist()
            ids = iter(unpack("i", result.logprobs.ids).tolist())
            for row, count in zip(rows, unpack("i", result.logprobs.counts).tolist(), strict=True):
                entries = [next(ids) for _ in range(count)]
                assert entries[0] == tokens[row]
                self.scored[owner[row]].append(entries[0])


def run(path, numbers, max_run: int, late: float = 0.0) -> Server:
    server = Server(path, numbers, max_run, late)
    while min(map(len, server.output)) < COUNT:
        server.step()
    return server


@pytest.mark.parametrize("late", [0.0, 0.9])
def test_the_tokens_are_the_same_in_fewer_steps(tiny, numbers, late: float) -> None:
    path = tiny("llama").path
    one_by_one = run(path, numbers, 0)
    in_runs = run(path, numbers, MAX_RUN, late)
    for slot in range(len(REQUESTS)):
        assert in_runs.output[slot][:COUNT] == one_by_one.output[slot][:COUNT]
    for slot, scored in in_runs.scored.items():
        assert scored == in_runs.output[slot]
    if not late:
        further = [len(output) for output in in_runs.output]
        assert one_by_one.left_out == 0 < in_runs.left_out
        assert min(further[0], further[2]) > 1.3 * COUNT, "runs bring more tokens a step"
        assert np.ptp([further[slot] for slot in (1, 3, 4, 5, 6)]) == 0, "the others get one"
