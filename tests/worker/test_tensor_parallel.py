"""One model over several ranks, over gloo: every family against one process, and the same bits on
every rank and in every run. Ranks are threads here."""

from pathlib import Path

import pytest
import torch
from pagewire.config import ModelConfig
from pagewire.worker.models import describe
from pagewire.worker.models.architecture import Unsupported
from pagewire.worker.models.ranks import check_ranks, of_rank
from pagewire.worker.models.weight_slots import Shard
from pagewire_kernels import reference
from pagewire_kernels.communicator import Communicator
from pagewire_protocol.messages import pack, unpack
from pagewire_protocol.sampling import Sampling
from rank_threads import run_ranks
from torch import Tensor
from worker.conftest import Driver, Harness, assert_close
from worker.model_variants import EXPERTS, VARIANTS

LENGTH = 40
CHUNK = 23


def same_bits(results: list[Tensor]) -> Tensor:
    for other in results[1:]:
        assert torch.equal(other, results[0]), "ranks differ"
    return results[0]


def logits_of(path: Path, tokens: list[int], ranks: int, **settings) -> Tensor:
    def run(communicator: Communicator) -> Tensor:
        model = settings.get("model")
        others = {name: value for name, value in settings.items() if name != "model"}
        return Harness(path, model, communicator, **others).logits(tokens, CHUNK)

    return same_bits(run_ranks(ranks, run))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_gives_the_logits_of_one_process(variant, ranks, tiny, harness, numbers):
    """Four ranks share two KV heads, and 257 tokens are divided unevenly."""
    path = tiny(variant).path
    tokens = numbers(LENGTH)
    assert_close(logits_of(path, tokens, ranks), harness(path).logits(tokens, CHUNK))


@pytest.mark.parametrize(
    ("family", "settings"),
    [("Llama", {}), ("Qwen3Moe", {**EXPERTS, "head_dim": 32})],
)
def test_eight_ranks(family, settings, tiny, harness, numbers, monkeypatch):
    """A head each, and two KV heads for all."""
    monkeypatch.setitem(VARIANTS, family, (family, {**settings, "num_attention_heads": 8}))
    path = tiny(family).path
    tokens = numbers(LENGTH)
    assert_close(logits_of(path, tokens, 8), harness(path).logits(tokens, CHUNK))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("quantization", ["int8", "int4", "bitsandbytes_8bit", "bitsandbytes"])
def test_quantized_weights_are_those_of_one_process(quantization, ranks, tiny, harness, numbers):
    """Four ranks have 24 columns of the MLP's matrix each, and groups have 32."""
    path = tiny("qwen3-moe").path
    model = ModelConfig(quantization=quantization)
    tokens = numbers(LENGTH)
    wanted = harness(path, model).logits(tokens, CHUNK)
    assert_close(logits_of(path, tokens, ranks, model=model), wanted, 2e-4)


class InOneKernel:
    """A communicator that normalises, as the one of GPUs; counts how often."""

    def __init__(self, ranks: Communicator) -> None:
        self.rank = ranks.rank
        self.size = ranks.size
        self.all_reduce = ranks.all_reduce
        self.all_gather = ranks.all_gather
        self.calls = 0

    def all_reduce_add_norm(self, x, residual, weight, eps, bias=None, *, centre=False):
        self.calls += 1
        total = self.all_reduce(x) + residual
        if centre:
            return reference.layer_norm(total, weight, bias, eps), total
        return reference.rms_norm(total, weight, eps), total


@pytest.mark.parametrize(
    ("variant", "calls"), [("qwen3", 6), ("opt", 6), ("neox", 3), ("gemma2", 0), ("opt-350m", 6)]
)
def test_sums_residuals_and_norms_in_one_kernel(variant, calls, tiny, harness, numbers):
    """In each layer as often as the block adds up, and once more at the end where one norm is."""
    path = tiny(variant).path
    tokens = numbers(LENGTH)

    def run(communicator: Communicator) -> tuple[Tensor, int]:
        norming = InOneKernel(communicator)
        return Harness(path, None, norming).logits(tokens, LENGTH), norming.calls

    results = run_ranks(2, run)
    assert [count for _, count in results] == [calls, calls]
    assert_close(same_bits([logits for logits, _ in results]), harness(path).logits(tokens, LENGTH))


def test_16_bits_are_near(tiny, harness, numbers):
    path = tiny("qwen3").path
    tokens = numbers(LENGTH)
    ours = logits_of(path, tokens, 2, dtype="bfloat16").float()
    wanted = harness(path, dtype="float32").logits(tokens, CHUNK)
    assert torch.nn.functional.cosine_similarity(ours, wanted, dim=-1).min() > 0.99


SAMPLINGS = (
    Sampling(1, 12, temperature=0.0),
    Sampling(3, 12, top_p=0.9),
    Sampling(4, 12, temperature=0.8, top_k=7, presence_penalty=1.0, logprobs=3),
    Sampling(5, 12, repetition_penalty=1.3, prompt_logprobs=2, min_tokens=4),
    Sampling(
        6, 12, temperature=0.0, bias_ids=pack("i", [7]), bias_values=pack("f", [2.5]), logprobs=1
    ),
)


def generated(path: Path, prompts: list[list[int]], communicator: Communicator) -> list:
    driver = Driver(path, communicator=communicator)
    tokens = driver.generate(prompts, list(SAMPLINGS), 12, chunk=9)
    return [tokens, driver.results]


def test_every_rank_samples_the_same_tokens_in_every_run(tiny, numbers):
    """Drawn and greedy ones, with penalties, filters and biases, and their log-probabilities."""
    path = tiny("gemma2").path
    prompts = [numbers(20, seed) for seed in range(len(SAMPLINGS))]
    runs = [
        run_ranks(ranks, lambda communicator: generated(path, prompts, communicator))
        for ranks in (2, 2, 4)
    ]
    for run in runs:
        assert all(rank == run[0] for rank in run)
    assert runs[0] == runs[1]
    alone = Driver(path).generate(prompts, list(SAMPLINGS), 12, chunk=9)
    assert [run[0][0] for run in runs] == [alone] * 3
    last = runs[2][0][1][-2]
    assert last.logprobs is not None and unpack("i", last.logprobs.rows)


def test_a_rank_holds_its_part_of_weights_and_cache(tiny):
    path = tiny("llama").path

    def held(communicator: Communicator) -> tuple[int, int]:
        loaded = Harness(path, None, communicator)._loaded
        return loaded.decoder.nbytes, loaded.cache.nbytes

    whole_weights, whole_cache = run_ranks(1, held)[0]
    for weights, cache in run_ranks(2, held):
        assert weights < 0.6 * whole_weights
        assert cache == whole_cache // 2


@pytest.mark.parametrize(
    ("changes", "ranks", "obstacle", "possible"),
    [
        ({}, 3, "4 attention heads", "1, 2, 4"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "3 KV heads", "1, 3, 6"),
        ({"intermediate_size": 30}, 4, "an intermediate size of 30", "1, 2"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_sizes_that_can(
    changes, ranks, obstacle, possible
):
    config = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        **changes,
    }  # fmt: skip
    wanted = (
        f"--tensor-parallel-size {ranks}: {obstacle} cannot be divided among {ranks} ranks; "
        f"this llama model can run on {possible}$"
    )
    with pytest.raises(Unsupported, match=wanted):
        check_ranks(describe(config), ranks)


def test_a_model_of_transformers_stays_on_one_rank(tiny, monkeypatch):
    """In one line, before anything is loaded."""
    from pagewire.worker.load import loader

    path = tiny("llama").path
    monkeypatch.setattr(loader, "FAMILIES", {})

    def refused(communicator: Communicator) -> str:
        with pytest.raises(Unsupported, match="tensor-parallel-size 2 is not supported for") as no:
            Harness(path, None, communicator)
        return str(no.value)

    run_ranks(2, refused)


@pytest.mark.parametrize("count", [5, 96, 257, 32_000, 50_257, 151_936])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_vocabularies_are_divided_without_gaps(count, size):
    if count < size * size:
        return
    each = Shard(0, size).each_of_vocabulary(count)
    parts = [Shard(rank, size).vocabulary(count) for rank in range(size)]
    assert [part.start for part in parts] == [min(rank * each, count) for rank in range(size)]
    assert sum(part.length for part in parts) == count
    assert each % 64 == 0 or count < 64 * size * size


def test_the_arithmetic_of_a_rank(tiny, harness):
    loaded = harness(tiny("qwen2-moe").path)._loaded
    arch = of_rank(loaded.decoder.arch, 4)
    assert (arch.num_heads, arch.num_kv_heads, arch.vocab_size) == (1, 1, 65)
    assert arch.moe is not None and (arch.moe.intermediate_size, arch.moe.shared_size) == (10, 6)
