"""ExtraSampling outside a GPU runner: slots on both sides, CPU tensors, and steps whose tokens the
host does not look at."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu_on_cpu import Uploads
from pagewire.config import ModelConfig
from pagewire.worker.gpu.resample import ExtraSampling, Kernels, StepLogprobs
from pagewire.worker.step.grammar_masks import GrammarMasks
from pagewire.worker.step.slots import Slots
from pagewire_kernels.masked_sampling import MaskedSamplingRows
from pagewire_kernels.penalties import apply_penalties_reference, count_tokens_reference
from pagewire_kernels.reference import apply_token_masks
from pagewire_kernels.sampling import Sampled, SamplingRows
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.messages import Admission, pack
from pagewire_protocol.sampling import Sampling
from worker.sampling_reference import bias, restricted, words

VOCAB, SLOTS, EOS = 60, 8, (2,)


def draw(logits: torch.Tensor, rows: SamplingRows) -> Sampled:
    """Greedy, as every row here is; and what the kernel says of rows that are not finite."""
    assert not rows.temperature.any()
    return Sampled(logits.argmax(-1), logits.amax(-1), logits.isnan().any(-1))


def draw_masked(
    logits: torch.Tensor,
    held: MaskedSamplingRows,
    last_token: torch.Tensor,
    sampled_tokens: torch.Tensor,
) -> None:
    """The same of rows under masks."""
    rows = held.rows.long()
    x = logits[rows].float()
    apply_token_masks(x, torch.arange(len(rows)), held.words[held.masks.long()])
    sampled = draw(x, held.sampling)
    tokens = sampled.tokens.int()
    last_token[held.slots.long()] = tokens
    sampled_tokens[rows] = torch.where(sampled.bad, -1, tokens)


PLAIN = Kernels(
    draw, apply_penalties_reference, count_tokens_reference, apply_token_masks, draw_masked
)


class Device:
    def __init__(self, kernels: Kernels = PLAIN, masks: GrammarMasks | None = None) -> None:
        self.slots = Slots(SLOTS, 200, 8)
        self.state = SlotState.empty(SLOTS, 32, "cpu")
        loaded: Any = SimpleNamespace(
            decoder=SimpleNamespace(arch=SimpleNamespace(vocab_size=VOCAB)),
            eos_token_ids=EOS,
            dtype=torch.float32,
        )
        uploads: Any = Uploads()
        masks = masks or GrammarMasks(SLOTS, ModelConfig(), VOCAB, EOS)
        self.special = ExtraSampling(loaded, self.slots, self.state, uploads, masks, kernels)

    def admit(
        self, slot: int, prompt: list[int], given: Sampling, output: tuple[int, ...] = ()
    ) -> None:
        blocks = pack("i", range(20))
        self.slots.admit(Admission(slot, 1, pack("i", prompt), pack("i", output), blocks, 0, given))
        self.special.admit(np.array([slot]))

    def step(self, logits: torch.Tensor, slots: list[int]) -> tuple[list[int], StepLogprobs | None]:
        """What the graph wrote, then the special rows; the host counts the tokens and keeps none of
        them."""
        report, which = logits.argmax(-1).int(), np.array(slots)
        report[logits.isnan().any(-1)] = -1
        self.state.last_token[which] = report.clamp(min=0)
        extra = self.special.resample(logits, which, report)
        self.slots.num_tokens[which] += 1
        assert ((self.state.last_token[which] == report) | (report < 0)).all()
        return report.tolist(), extra


def settings(seed: int) -> list[dict[str, Any]]:
    """One for each slot: every kind of row, and all kinds at once."""
    make = random.Random(seed)

    def some(count: int) -> list[int]:
        return make.sample(range(VOCAB), count)

    return [
        {},
        {"logprobs": 3},
        {"allowed_ids": pack("i", some(5)), "logprobs": 0},
        {**bias({token: make.uniform(-4, 4) for token in some(12)})},
        {"bad_words": words(*[[token] for token in some(20)], *[some(2) for _ in range(25)])},
        {"min_tokens": 7, "stop_token_ids": tuple(some(9))},
        {
            "presence_penalty": 1.0,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.4,
            "bad_words": words(some(3)),
        },
        {
            **bias({token: make.uniform(-4, 4) for token in some(12)}),
            "allowed_ids": pack("i", some(30)),
            "bad_words": words(*[some(1) for _ in range(8)], *[some(2) for _ in range(60)]),
            "min_tokens": 5,
            "stop_token_ids": tuple(some(4)),
            "repetition_penalty": 0.8,
            "frequency_penalty": -0.6,
            "logprobs": 20,
        },
    ]


class Rows:
    """A request of every kind in its slot, with some output already; steps of any of them are
    compared with transformers."""

    def __init__(self, seed: int, kernels: Kernels = PLAIN) -> None:
        self.make, self.device = random.Random(seed), Device(kernels)
        torch.manual_seed(seed)
        self.given = [Sampling(0, 100, **{"temperature": 0.0, **extra}) for extra in settings(seed)]
        self.prompts = [self._some(self.make.randrange(1, 30)) for _ in self.given]
        self.outputs = [self._some(self.make.choice([0, 3, 70])) for _ in self.given]
        for slot, (prompt, sampling) in enumerate(zip(self.prompts, self.given, strict=True)):
            self.device.admit(slot, prompt, sampling, tuple(self.outputs[slot]))

    def _some(self, count: int) -> list[int]:
        return [self.make.randrange(VOCAB) for _ in range(count)]

    def step(self) -> tuple[torch.Tensor, list[int], list[int], StepLogprobs | None]:
        """Logits, slots, tokens as transformers would choose them, and log-probabilities."""
        slots = self.make.sample(range(SLOTS), self.make.randrange(1, SLOTS + 1))
        logits = (torch.randn(len(slots), VOCAB) * 2).bfloat16().float()
        got, extra = self.device.step(logits.clone(), slots)
        for slot, row, token in zip(slots, logits, got, strict=True):
            wanted = restricted(row, self.prompts[slot], self.outputs[slot], self.given[slot], EOS)
            assert token == int(wanted.argmax()), (
                f"slot {slot} after {len(self.outputs[slot])} tokens"
            )
            self.outputs[slot].append(token)
        return logits, slots, got, extra
