"""The division of a GPU's memory, on numbers alone: what is planned, what is refused, and that
every advice given really helps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.worker.device.gpus import GIB, Gpu, Process
from pagewire.worker.load import gpu_memory, gpu_plan
from pagewire.worker.load.gpu_memory import Load, MemoryRequest
from pagewire.worker.load.kv_sizing import DoesNotFit
from pagewire.worker.load.memory_errors import GpuFailed, explain, explained
from pagewire.worker.models import describe
from pagewire.worker.models.cache_spec import cache_spec
from pagewire_kernels.routing import Routing

MODELS = Path(__file__).parents[2] / "bench" / "models"
WORKER = Path(gpu_memory.__file__).parent
H200 = Gpu(0, "NVIDIA H200", (9, 0), int(139.8 * GIB), int(139.2 * GIB), own=int(0.6 * GIB))
T4 = Gpu(1, "Tesla T4", (7, 5), int(14.6 * GIB), int(14.3 * GIB), own=int(0.3 * GIB))
REQUEST = MemoryRequest(0.9, 16)
LOAD = Load(8192, 256, 131072)


def arch(name: str = "llama-3.1-8b"):
    return describe(json.loads((MODELS / name / "config.json").read_text()))


def weights(name: str = "llama-3.1-8b", itemsize: int = 2) -> int:
    return arch(name).parameters * itemsize


def size(
    gpu: Gpu = H200,
    request: MemoryRequest = REQUEST,
    load: Load = LOAD,
    name: str = "llama-3.1-8b",
    itemsize: int = 2,
):
    shape = arch(name)
    cache = cache_spec(shape, torch.bfloat16 if itemsize == 2 else torch.float32)
    return gpu_memory.size(shape, itemsize, cache, weights(name, itemsize), gpu, request, load)


def refusal(*args, **settings) -> str:
    with pytest.raises(DoesNotFit) as caught:
        size(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_that_is_planned_stays_within_the_share():
    sizing = size()
    used = H200.total - H200.free
    planned = used + sizing.weight_bytes + sizing.workspace + sizing.kv_bytes
    assert 0 <= 0.9 * H200.total - planned < sizing.block_bytes + 1
    assert sizing.max_model_len == 131072 and not sizing.note


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b"])
def test_overhead_on_a_large_gpu_is_at_most_4_gb(name):
    """Beside weights and KV blocks: what CUDA itself took before, and the workspace."""
    assert size(name=name).workspace + H200.total - H200.free <= 4e9


def test_the_workspace_follows_from_model_and_load():
    space = gpu_memory.workspace(arch(), 2, LOAD)
    inner = 8192 * 2 * 3 * 14336
    assert inner < space.activations < 2 * inner
    assert (
        gpu_memory.workspace(arch(), 2, replace(LOAD, tokens=2048)).activations
        < 0.6 * space.activations
    )
    assert gpu_memory.workspace(arch(), 2, replace(LOAD, rows=64)).sampling == space.sampling // 4
    assert gpu_memory.workspace(arch(), 2, replace(LOAD, graphs=False)).graphs == 0
    assert (
        gpu_memory.workspace(arch(), 2, replace(LOAD, fused=False)).activations
        > 2 * space.activations
    )
    parts = (space.activations, space.graphs, space.sampling, space.tables, space.libraries)
    assert sum(parts) == space.total and all(parts)


def test_experts_need_room_for_each_token_as_often_as_it_is_routed():
    dense = arch()
    from pagewire.worker.models.architecture import Moe

    sparse = replace(dense, moe=Moe(Routing(8, 2, renormalize=True), 14336))
    assert gpu_memory.step_bytes(sparse, 2, 100) > 1.5 * gpu_memory.step_bytes(dense, 2, 100)


def test_what_is_said_adds_up():
    lines = size().lines()
    assert lines[0] == "GPU 0 (NVIDIA H200, 139.8 GiB): 139.20 GiB free"
    numbers = [float(n) for n in re.findall(r"([\d.]+) GiB", lines[1])]
    budget, in_use, *parts, left = numbers
    assert budget == pytest.approx(sum(parts), abs=0.03) and in_use == pytest.approx(0.6, abs=0.01)
    assert left == pytest.approx(H200.free / GIB - budget, abs=0.03)
    whole, *pieces = [float(n) for n in re.findall(r"([\d.]+) GiB", lines[2])]
    assert whole == pytest.approx(sum(pieces), abs=0.03)
    assert "blocks of 16 tokens and 2,048 KiB" in lines[3]


def test_other_processes_share_the_utilization_and_are_named():
    busy = replace(H200, free=int(102 * GIB), others=(Process(4242, "python", int(36.9 * GIB)),))
    assert size(busy).kv_bytes == pytest.approx(size().kv_bytes - 37.2 * GIB, abs=GIB // 100)
    assert (
        "37.2 GiB are used by other processes: python (pid 4242) 36.9 GiB" in size(busy).lines()[0]
    )
    message = refusal(replace(busy, free=15 * GIB))
    assert (
        "of GPU 0 (NVIDIA H200, 139.8 GiB)" in message
        and "python (pid 4242) 36.9 GiB. What helps: end the other processes" in message
    )


def test_a_model_that_is_too_large_names_what_there_is_room_for():
    message = refusal(T4, load=replace(LOAD, tokens=2048))
    assert re.match(
        r"the model needs 1\d\.\d\d GiB \(weights 14\.96 GiB, workspace \d\.\d\d GiB, KV cache at least 0\.25 GiB\) but of",
        message,
    )
    assert "12.84 GiB may be used (90% of it less 0.30 GiB in use)" in message
    assert "a smaller model (1" in message and "--max-num-batched-tokens" in message


def test_float32_is_told_of_half_types():
    assert "--dtype half or bfloat16" in refusal(
        replace(H200, total=24 * GIB, free=23 * GIB), itemsize=4
    )


def test_advice_on_utilization_is_right():
    small = replace(H200, total=20 * GIB, free=int(19.5 * GIB))
    message = refusal(
        small, load=replace(LOAD, tokens=2048, rows=64), request=replace(REQUEST, utilization=0.8)
    )
    share = float(re.search(r"raise --gpu-memory-utilization from 0\.8 to ([\d.]+)", message)[1])
    assert size(
        small, load=replace(LOAD, tokens=2048, rows=64), request=replace(REQUEST, utilization=share)
    ).num_blocks
    with pytest.raises(DoesNotFit):
        size(
            small,
            load=replace(LOAD, tokens=2048, rows=64),
            request=replace(REQUEST, utilization=share - 0.01),
        )


SMALL = replace(H200, total=24 * GIB, free=int(23.5 * GIB))
"""8B fits, its 131,072 tokens of context do not."""


def test_a_context_that_was_asked_for_and_does_not_fit():
    message = refusal(SMALL, replace(REQUEST, max_model_len=100_000))
    assert (
        "a context of 100,000 tokens needs 6,250 KV blocks (12.21 GiB), there is room for"
        in message
    )
    length = int(re.search(r"lower --max-model-len to (\d+)", message)[1])
    assert size(SMALL, replace(REQUEST, max_model_len=length)).max_model_len == length
    with pytest.raises(DoesNotFit):
        size(SMALL, replace(REQUEST, max_model_len=length + 1))


def test_fit_cuts_the_context_and_says_so():
    asked = replace(REQUEST, max_model_len=100_000, fit=True)
    sizing = size(SMALL, asked)
    assert sizing.max_model_len == sizing.num_blocks * 16 < 100_000
    assert sizing.lines()[-1] == sizing.note
    assert (
        f"cut to the {sizing.max_model_len:,} tokens that memory holds, from the 100,000 of --max-model-len"
        in sizing.note
    )
    assert size(H200, asked).max_model_len == 100_000 and not size(H200, asked).note


def test_without_a_length_it_is_cut_too():
    sizing = size(SMALL)
    assert sizing.max_model_len == sizing.num_blocks * 16
    assert "from the model's 131,072" in sizing.note


def test_more_positions_than_the_model_has_are_refused_even_with_fit():
    assert "131,072 positions" in refusal(H200, replace(REQUEST, max_model_len=131_073, fit=True))


def test_blocks_and_bytes_replace_the_share():
    each = cache_spec(arch(), torch.bfloat16).block_bytes(16)
    assert size(request=replace(REQUEST, blocks=9000, utilization=0.2)).num_blocks == 9000
    assert (
        size(request=replace(REQUEST, kv_bytes=20 * GIB, utilization=0.2)).num_blocks
        == 20 * GIB // each
    )
    assert size(request=replace(REQUEST, kv_bytes=118 * GIB)).kv_bytes > size().kv_bytes, (
        "beyond the share, within what is free"
    )
    assert "(free)" in size(request=replace(REQUEST, blocks=9000)).lines()[1]


@pytest.mark.parametrize(
    ("flag", "asked"),
    [("--num-kv-blocks", {"blocks": 70_000}), ("--kv-cache-memory-bytes", {"kv_bytes": 130 * GIB})],
)
def test_too_many_blocks_or_bytes_name_the_number_that_fits(flag, asked):
    message = refusal(request=replace(REQUEST, **asked))
    fitting = int(re.search(rf"lower {flag} to (\d+)", message)[1])
    assert size(request=replace(REQUEST, **dict.fromkeys(asked, fitting))).num_blocks


@pytest.mark.parametrize(
    ("flag", "name", "asked"),
    [("--num-kv-blocks", "blocks", 100), ("--kv-cache-memory-bytes", "kv_bytes", 200 << 20)],
)
def test_too_few_blocks_or_bytes_for_a_context_name_the_number_that_does(flag, name, asked):
    message = refusal(request=replace(REQUEST, max_model_len=4096, **{name: asked}))
    enough = int(re.search(rf"raise {flag} to (\d+)", message)[1])
    assert (
        size(request=replace(REQUEST, max_model_len=4096, **{name: enough})).max_model_len == 4096
    )


def test_settings_reach_the_arithmetic():
    """From flags to the sizing, with the weights counted from the tensors' shapes."""
    config = WorkerConfig(
        kv_cache_memory_bytes=3 * GIB, gpu_memory_utilization=0.5, fit=True, enforce_eager=True
    )
    gpu_sizing = gpu_plan.plan_gpu(
        arch("qwen3-0.6b"),
        torch.bfloat16,
        ModelConfig(max_model_len=40000),
        config,
        H200,
        SchedulerConfig(max_num_seqs=8),
    ).sizing
    assert (
        gpu_sizing.kv_bytes <= 3 * GIB
        and gpu_sizing.max_model_len == gpu_sizing.num_blocks * 16 < 40000
    )
    assert "graphs 0.00 GiB" in gpu_sizing.lines()[2]
    assert 0 <= gpu_sizing.weight_bytes - weights("qwen3-0.6b") < 1e6, (
        "norms are all that parameters leave out"
    )


TORCH_OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.00 GiB is free. Process 7 has "
    "36.90 GiB memory in use."
)


def test_out_of_memory_becomes_one_line_with_the_numbers():
    now = replace(
        H200, free=GIB, others=(Process(7, "python3", int(36.9 * GIB)),), own=int(101.9 * GIB)
    )
    error = explain(torch.OutOfMemoryError(TORCH_OOM), "capturing graphs", size(), now)
    assert isinstance(error, DoesNotFit)
    text = str(error)
    assert text.startswith(
        "out of memory while capturing graphs: 2.00 GiB more were asked for, of GPU 0 (NVIDIA H200, 139.8 GiB) 1.00 GiB are free."
    )
    assert "Planned: weights 14.96 GiB, KV cache 10" in text and "python3 (pid 7) 36.9 GiB" in text
    assert (
        "end the other processes" in text
        and "lower --gpu-memory-utilization or --max-model-len" in text
    )
    smaller = int(re.search(r"--kv-cache-memory-bytes (\d+)", text)[1])
    assert size(request=replace(REQUEST, kv_bytes=smaller)).kv_bytes <= size().kv_bytes - GIB
    assert "\n" not in text


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_other_words_for_out_of_memory(text):
    error = explain(RuntimeError(text), "loading the model", size(), None)
    assert (
        isinstance(error, DoesNotFit)
        and "more was asked for, than GPU 0" in str(error)
        and "\n" not in str(error)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "CUDA error: an illegal memory access was encountered\nFor debugging ...",
            "the GPU failed while x: CUDA error: an illegal memory",
        ),
        ("Failed to find C compiler. Please specify via CC environment variable.", "install gcc"),
        ("main.c:5:10: fatal error: Python.h: No such file or directory", "python3-dev"),
    ],
)
def test_other_faults_of_the_gpu_and_its_tools(text, said):
    error = explain(RuntimeError(text), "x", size(), None)
    assert isinstance(error, GpuFailed) and said in str(error) and "\n" not in str(error)


def test_errors_that_are_none_of_the_gpus_pass():
    defect = RuntimeError("shape '[3]' is invalid for input of size 4")
    assert explain(defect, "x", size(), None) is None
    with pytest.raises(RuntimeError) as caught, explained("x", replace(size(), gpu=None)):
        raise defect
    assert caught.value is defect
    with (
        pytest.raises(DoesNotFit, match="out of memory while x"),
        explained("x", replace(size(), gpu=None)),
    ):
        raise torch.OutOfMemoryError(TORCH_OOM)


def test_the_outcome_is_held_against_the_plan():
    sizing = size()
    free = H200.free - sizing.weight_bytes - sizing.kv_bytes - 2 * GIB
    text = gpu_memory.outcome(sizing, 120 * GIB, 121 * GIB, free)
    assert (
        f"workspace 2.00 GiB so far of {gpu_memory.gib(sizing.workspace)}" in text
        and "torch reserved 120.00 GiB, 121.00 GiB at most" in text
    )
