"""What a start is planned with on the GPUs that people have, from their names in the shop to their
tokens of KV cache, on numbers alone."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.worker.device.gpus import GIB, Gpu
from pagewire.worker.load import gpu_memory, gpu_plan
from pagewire.worker.load.kv_sizing import DoesNotFit
from pagewire.worker.models import describe
from pagewire.worker.models.ranks import PipelineStage

MODELS = json.loads((Path(__file__).parent / "model_shapes.json").read_text())
BF16, HALF = torch.bfloat16, torch.float16


def gpu(name: str, capability: tuple[int, int], total: float, used: float = 0.45) -> Gpu:
    """total, used before the model: GiB as torch shows them."""
    return Gpu(
        0, name, capability, int(total * GIB), int((total - used) * GIB), own=int(used * GIB)
    )


CARDS = {
    "L4": gpu("NVIDIA L4", (8, 9), 22.05),
    "A10": gpu("NVIDIA A10", (8, 6), 22.05),
    "3090": gpu("NVIDIA GeForce RTX 3090", (8, 6), 23.55),
    "4090": gpu("NVIDIA GeForce RTX 4090", (8, 9), 23.55),
    "4090 with a desktop": gpu("NVIDIA GeForce RTX 4090", (8, 9), 23.55, 1.45),
    "5090": gpu("NVIDIA GeForce RTX 5090", (12, 0), 31.4),
    "A100-40": gpu("NVIDIA A100-SXM4-40GB", (8, 0), 39.4),
    "T4": gpu("Tesla T4", (7, 5), 14.6, 0.3),
    "H100": gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.2, 0.6),
    "H200": gpu("NVIDIA H200", (9, 0), 139.8, 0.6),
}


def planned(
    card: str | Gpu,
    name: str,
    scheduler: SchedulerConfig | None = None,
    model: ModelConfig | None = None,
    **settings,
):
    chosen = CARDS[card] if isinstance(card, str) else card
    dtype = HALF if chosen.capability < (8, 0) else BF16
    arch, config = describe(MODELS[name]), WorkerConfig(**settings)
    return gpu_plan.plan_gpu(
        arch, dtype, model or ModelConfig(), config, chosen, scheduler or SchedulerConfig()
    )


def tokens(plan: gpu_plan.GpuPlan) -> int:
    return plan.sizing.num_blocks * plan.sizing.block_size


TABLE = [
    # card, model, tokens of KV cache at least, rows
    ("L4", "llama-3.1-8b", 23_000, 128),
    ("A10", "llama-3.1-8b", 23_000, 128),
    ("3090", "llama-3.1-8b", 30_000, 128),
    ("4090", "llama-3.1-8b", 30_000, 128),
    ("4090 with a desktop", "llama-3.1-8b", 25_000, 128),
    ("5090", "llama-3.1-8b", 85_000, 256),
    ("A100-40", "llama-3.1-8b", 145_000, 256),
    ("L4", "qwen3-8b", 18_000, 128),
    ("4090", "qwen3-8b", 27_000, 128),
    ("5090", "qwen3-8b", 72_000, 256),
    ("L4", "mistral-7b", 36_000, 256),
    ("4090", "mistral-7b", 45_000, 256),
    ("5090", "gemma-2-9b", 25_000, 128),
    ("L4", "gemma-2-9b", 2_048, 64),
    ("4090", "gemma-2-9b", 6_000, 64),
    ("A100-40", "gemma-2-9b", 44_000, 256),
    ("L4", "qwen2.5-3b", 330_000, 256),
    ("T4", "qwen2.5-3b", 140_000, 256),
]


@pytest.mark.parametrize(("card", "name", "least", "rows"), TABLE)
@pytest.mark.parametrize("max_step_ms", [25.0, 0.0], ids=["serving", "offline"])
def test_small_cards(card, name, least, rows, max_step_ms):
    plan = planned(card, name, SchedulerConfig(max_step_ms=max_step_ms))
    assert (plan.step_tokens, plan.rows) == (2048, rows)
    assert least <= tokens(plan) < 1.2 * least


@pytest.mark.parametrize(
    ("card", "name"),
    [("T4", "llama-3.1-8b"), ("T4", "qwen3-8b"), ("T4", "mistral-7b"), ("T4", "gemma-2-9b")],
)
def test_models_that_do_not_fit(card, name):
    with pytest.raises(DoesNotFit, match=r"^the model needs \d+\.\d\d GiB \(weights") as caught:
        planned(card, name)
    assert "\n" not in str(caught.value) and "quantized" not in str(caught.value)


@pytest.mark.parametrize(
    ("card", "name", "serving", "offline"),
    [
        ("H100", "llama-3.1-8b", 432_112, 422_192),
        ("H200", "llama-3.1-8b", 878_912, 868_992),
        ("H100", "qwen3-8b", 383_312, 375_344),
        ("H200", "gemma-2-9b", 326_512, 323_184),
    ],
)
def test_large_cards_keep_what_they_had(card, name, serving, offline):
    """To the token: their steps, rows and division of memory are what was measured."""
    for max_step_ms, steps, held in ((25.0, 8192, serving), (0.0, 16_384, offline)):
        plan = planned(card, name, SchedulerConfig(max_step_ms=max_step_ms))
        assert (plan.step_tokens, plan.rows) == (steps, 256)
        assert abs(tokens(plan) - held) <= 64, "norms, which a count of parameters leaves out"


@pytest.mark.parametrize("card", ["L4", "H200"])
def test_what_was_asked_for_is_done(card):
    plan = planned(
        card, "qwen2.5-3b", SchedulerConfig(max_num_seqs=300, max_num_batched_tokens=4096)
    )
    assert (plan.step_tokens, plan.rows) == (4096, 300)
    assert planned(card, "llama-3.1-8b", SchedulerConfig(max_num_seqs=256)).rows == 256
    assert SchedulerConfig(max_num_seqs=3000).step_tokens(True, 24 * GIB) == 3000, (
        "all of them get on"
    )


def test_a_context_cut_too_short_is_refused_with_the_arithmetic():
    busy = replace(CARDS["4090"], free=int(21.5 * GIB), own=int(2.05 * GIB))
    with pytest.raises(DoesNotFit) as caught:
        planned(busy, "gemma-2-9b", SchedulerConfig(max_num_seqs=64))
    text = str(caught.value)
    assert (
        "\n" not in text
        and "tokens is all that fits, of 8,192, and less than 2,048 is served only when asked for"
        in text
    )
    assert "weights take 17.2" in text and "raise --gpu-memory-utilization from 0.9 to 0.9" in text


def test_advice_on_a_context_cut_too_short_helps():
    busy = replace(CARDS["4090"], free=int(21.5 * GIB), own=int(2.05 * GIB))
    few = SchedulerConfig(max_num_seqs=64)
    with pytest.raises(DoesNotFit) as caught:
        planned(busy, "gemma-2-9b", few)
    text = str(caught.value)
    held = int(text.partition("--max-model-len ")[2].split()[0])
    assert (
        planned(busy, "gemma-2-9b", few, ModelConfig(max_model_len=held)).sizing.max_model_len
        == held
        < 2048
    )
    share = float(text.partition("--gpu-memory-utilization from 0.9 to ")[2].split(";")[0])
    assert (
        planned(busy, "gemma-2-9b", few, gpu_memory_utilization=share).sizing.max_model_len >= 2048
    )


def test_a_short_context_that_is_the_models_own_or_was_asked_for_is_no_fault():
    assert planned("L4", "gpt2").sizing.max_model_len == 1024
    assert (
        planned("4090", "gemma-2-9b", model=ModelConfig(max_model_len=512)).sizing.max_model_len
        == 512
    )
    assert planned("H200", "llama-3.1-8b", num_kv_blocks=40).sizing.max_model_len == 640


def test_fit_does_not_cut_to_what_serves_nobody():
    busy = replace(CARDS["4090"], free=int(21.5 * GIB), own=int(2.05 * GIB))
    with pytest.raises(DoesNotFit, match="less than 2,048 is served only when asked for"):
        planned(
            busy,
            "gemma-2-9b",
            SchedulerConfig(max_num_seqs=64),
            ModelConfig(max_model_len=8000),
            fit=True,
        )


def test_a_gpu_without_tensor_cores_in_triton_says_so_once_and_runs_without_graphs(caplog):
    plan = planned("T4", "qwen2.5-3b")
    assert plan.attends_by_torch and "graphs 0.00 GiB" in plan.sizing.lines()[2]
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ] == [
        "GPU 0 (Tesla T4, 14.6 GiB) has compute capability 7.5; below 8.0 Triton has no tensor cores, so attention and products run "
        "through torch, without CUDA graphs (--enforce-eager)"
    ]
    assert not planned("L4", "qwen2.5-3b").attends_by_torch and len(caplog.records) == 1


def test_memory_for_attention_by_torch_follows_the_context_that_can_be_held():
    """Of a model with many KV heads and a long context, what could never be in the cache is not
    reserved for."""
    plan = planned("T4", "phi-3.5-mini")
    assert 10_000 < tokens(plan) < 20_000 and plan.sizing.workspace < 2.2 * GIB


@pytest.mark.parametrize(("index", "steps"), [(0, 3), (1, 5), (2, 2)])
def test_hidden_states_between_stages_have_room(index: int, steps: int) -> None:
    """8,192 tokens of 4,096 features, twice, in 16 bits: received with a copy, sent two ahead."""
    arch: Any = SimpleNamespace(hidden_size=4096)
    load = gpu_memory.Load(8192, 256, 4096, stage=PipelineStage(index, 3))
    assert gpu_memory.handed_on_bytes(arch, 2, load) == steps * 2 * 8192 * 4096 * 2
    assert gpu_memory.handed_on_bytes(arch, 2, gpu_memory.Load(8192, 256, 4096)) == 0
