"""Tiny models of every family, made with transformers and saved as users would have them; a harness
that runs ours position by position."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.worker.cpu.runner import Runner
from pagewire.worker.load import loader
from pagewire.worker.load.rank_agreement import Ranks
from pagewire.worker.models.ranks import WHOLE_MODEL, PipelineStage
from pagewire_kernels.batch import Batch, make_batch
from pagewire_kernels.communicator import SINGLE_RANK, Communicator
from pagewire_protocol.messages import Admission, Step, StepResult, pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.model_variants import BY_LENGTH, CAUSAL, SIZES, VARIANTS

BLOCK = 8


def build(variant: str):
    """A transformers model in float32, random biases and norms included: their defaults of 0 and 1
    would hide mistakes."""
    import transformers

    family, extra = (VARIANTS | BY_LENGTH)[variant]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra})
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # the others leave the cap out
    model = getattr(transformers, CAUSAL.get(family, f"{family}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@dataclass
class Tiny:
    variant: str
    path: Path
    model: torch.nn.Module

    def logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(variant) -> Tiny, saved once a session."""
    made: dict[str, Tiny] = {}

    def make(variant: str) -> Tiny:
        if variant not in made:
            path = tmp_path_factory.mktemp(variant)
            model = build(variant)
            model.save_pretrained(path)
            made[variant] = Tiny(variant, path, model)
        return made[variant]

    return make


def worker_config(**settings) -> WorkerConfig:
    return WorkerConfig(
        **{
            "device": "cpu",
            "dtype": "float32",
            "block_size": BLOCK,
            "num_kv_blocks": 160,
            "threads": 1,
            **settings,
        }
    )


Work = list[tuple[list[int], int, int, list[int]]]
"""(tokens, first, end, table) of each sequence of a step."""


def ids_and_batch(work: Work) -> tuple[torch.Tensor, Batch]:
    """What a decoder is given for `work`."""
    batch = make_batch(
        [end - first for _, first, end, _ in work],
        [end for _, _, end, _ in work],
        [table for *_, table in work],
        BLOCK,
    )
    ids = torch.tensor([token for tokens, first, end, _ in work for token in tokens[first:end]])
    return ids, batch


def assert_close(ours: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Logits of the same tokens, computed in another order; the likeliest token is the same."""
    assert ours.shape == wanted.shape
    worst = (ours - wanted).abs().max().item()
    assert worst < tolerance * max(1.0, wanted.abs().max().item()), f"logits differ by {worst:.2e}"
    assert torch.equal(ours.argmax(-1), wanted.argmax(-1))


class Harness:
    """Runs a loaded model on chosen chunks of sequences, over block tables in random order; gives
    the logits of every position."""

    def __init__(
        self,
        path: Path,
        model: ModelConfig | None = None,
        communicator: Communicator = SINGLE_RANK,
        stage: PipelineStage = WHOLE_MODEL,
        **settings,
    ) -> None:
        self._loaded = loader.load(
            path,
            model or ModelConfig(),
            worker_config(**settings),
            lambda stage, fraction: None,
            ranks=Ranks(communicator, communicator, stage),
        )
        self.free = list(range(self._loaded.sizing.num_blocks))
        random.Random(3).shuffle(self.free)
        with torch.inference_mode():
            self._loaded.cache.fill_(0.5)

    @property
    def max_model_len(self) -> int:
        return self._loaded.sizing.max_model_len

    def table(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // BLOCK))]

    def step(self, work: Work) -> torch.Tensor:
        """work -> [sum of end - first, V]."""
        ids, batch = ids_and_batch(work)
        with torch.inference_mode():
            loaded = self._loaded
            return loaded.decoder(ids, loaded.cos_sin, loaded.caches, batch, None, lambda: None)

    def mixed_step(
        self, spans: list[tuple[int, int]], numbers: Callable[[int, int], list[int]]
    ) -> tuple[Work, torch.Tensor]:
        """One step that computes positions first to end - 1 of a sequence for each (first, end),
        after what is before them: (work, its logits)."""
        work = [
            (numbers(end, seed), first, end, self.table(end))
            for seed, (first, end) in enumerate(spans)
        ]
        for tokens, first, _, table in work:
            if first:
                self.step([(tokens, 0, first, table)])
        return work, self.step(work)

    def logits(self, tokens: list[int], chunk: int) -> torch.Tensor:
        table = self.table(len(tokens))
        firsts = range(0, len(tokens), chunk)
        return torch.cat(
            [
                self.step([(tokens, first, min(first + chunk, len(tokens)), table)])
                for first in firsts
            ]
        )


class Driver:
    """A scheduler in miniature: places requests in slots of a Runner, runs them, collects their
    tokens."""

    def __init__(
        self,
        path: Path,
        model: ModelConfig | None = None,
        max_num_seqs: int = 64,
        communicator: Communicator = SINGLE_RANK,
        make: Callable[..., Any] = Runner,
        **settings,
    ) -> None:
        """make: a SyncRunner, with the arguments of CpuSteps."""
        config = worker_config(**settings)
        self.runner = make(
            path,
            model or ModelConfig(),
            SchedulerConfig(max_num_seqs=max_num_seqs),
            config,
            incarnation=5,
            ranks=Ranks(communicator, communicator),
        )
        self.facts = self.runner.facts()
        self.block_size = config.block_size
        self.free = list(range(self.facts.num_blocks))
        random.Random(4).shuffle(self.free)
        self.out: dict[int, list[int]] = {}
        self.held: dict[int, list[int]] = {}
        self.results: list[StepResult] = []

    def admission(
        self,
        slot: int,
        prompt: list[int],
        sampling: Sampling,
        output: tuple[int, ...] = (),
        room: int = 0,
        cached: Sequence[int] = (),
    ) -> Admission:
        """`cached`: blocks of another request that hold the beginning of this one's tokens."""
        needed = -(-(len(prompt) + len(output) + room) // self.block_size)
        own = [self.free.pop() for _ in range(needed - len(cached))]
        self.held[slot], self.out[slot] = own, list(output)
        computed = len(cached) * self.block_size
        return Admission(
            slot,
            slot,
            pack("i", prompt),
            pack("i", output),
            pack("i", [*cached, *own]),
            computed,
            sampling,
        )

    def step(self, epoch: int = 1, **parts) -> StepResult:
        result = self.runner.execute(Step(epoch, len(self.results), **parts))
        self.results.append(result)
        for slot, token in zip(unpack("i", result.slots), unpack("i", result.tokens), strict=True):
            self.out[slot].append(token)
        return result

    def generate(
        self, prompts: list[list[int]], samplings: list[Sampling], count: int, chunk: int = 10**6
    ) -> list[list[int]]:
        """`count` tokens for each prompt, all in one batch, prompts in chunks."""
        slots = list(range(len(prompts)))
        admit = tuple(self.admission(s, prompts[s], samplings[s], room=count) for s in slots)
        done = [0] * len(slots)
        while any(len(self.out[s]) < count for s in slots):
            run = [s for s in slots if len(self.out[s]) < count]
            counts = [min(chunk, len(prompts[s]) + len(self.out[s]) - done[s]) for s in run]
            for s, n in zip(run, counts, strict=True):
                done[s] += n
            self.step(admit=admit, run_slots=pack("i", run), run_counts=pack("i", counts))
            admit = ()
        self.step(retire=pack("i", slots))
        for slot in slots:
            self.free += self.held.pop(slot)
        return [self.out[s] for s in slots]


@pytest.fixture
def numbers():
    """numbers(n, seed): token ids of the tiny vocabulary."""

    def make(count: int, seed: int = 0) -> list[int]:
        source = random.Random(seed)
        return [source.randrange(3, SIZES["vocab_size"]) for _ in range(count)]

    return make


@pytest.fixture
def harness():
    return Harness


@pytest.fixture
def driver():
    return Driver


@pytest.fixture
def variants():
    return VARIANTS
