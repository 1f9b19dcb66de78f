"""What the doctor says of several ranks, from what torch might see and for a small model; and GPUs
of unlike kinds in one group."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pagewire.commands import doctor, doctor_container, doctor_ranks
from pagewire.config import BadSetting, FrontendConfig, ModelConfig, WorkerConfig
from pagewire.worker.device.gpu_kinds import check_alike
from pagewire.worker.device.gpus import (
    GIB,
    Connection,
    Gpu,
    GpuProbe,
    NoUsableGpu,
    Process,
    kind_of_connection,
)
from pagewire.worker.load.rank_agreement import check_gpus
from pagewire.worker.models.architecture import Unsupported
from rank_threads import run_ranks

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB, "GPU-aa", own=GIB)
TWIN = replace(H100, index=1, uuid="GPU-bb", total=80 * GIB - (1 << 20))
H200 = Gpu(1, "NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB, "GPU-cc", own=GIB)
L4 = Gpu(1, "NVIDIA L4", (8, 9), 22 * GIB, 21 * GIB, "GPU-dd", own=GIB)
ON_CUDA = WorkerConfig(device="cuda", tensor_parallel_size=2)
ON_CPU = WorkerConfig(device="cpu", tensor_parallel_size=2)
STAGES_ON_CUDA = WorkerConfig(device="cuda", pipeline_parallel_size=2)
STAGES_ON_CPU = WorkerConfig(device="cpu", tensor_parallel_size=2, pipeline_parallel_size=2)


def probe(*gpus: Gpu, **options: object) -> GpuProbe:
    return replace(
        GpuProbe("2.13.0", "13.0", "580.65.06", len(gpus), ("sm_80", "sm_90"), gpus), **options
    )


def test_gpus_of_one_kind_for_every_rank() -> None:
    assert doctor_ranks.check_places(ON_CUDA, probe(H100, TWIN, H200)) == (
        "ok",
        "2 ranks on GPU 0 (NVIDIA H100 80GB HBM3, 80.0 GiB), GPU 1 (NVIDIA H100 80GB HBM3, 80.0 GiB)",
    )


def test_too_few_gpus() -> None:
    assert doctor_ranks.check_places(replace_size(ON_CUDA, 4), probe(H100, TWIN)) == (
        "BROKEN",
        "a GPU a rank is needed, 4 in all, and there are 2: GPU 0 (NVIDIA H100 80GB HBM3, 80.0 GiB), "
        "GPU 1 (NVIDIA H100 80GB HBM3, 80.0 GiB)",
    )


def replace_size(config: WorkerConfig, size: int) -> WorkerConfig:
    return WorkerConfig(device=config.device, tensor_parallel_size=size)


def test_a_gpu_that_is_busy_or_cannot_be_used_is_named() -> None:
    busy = replace(TWIN, free=50 * GIB, others=(Process(7, "python", 29 * GIB),))
    mark, text = doctor_ranks.check_places(ON_CUDA, probe(H100, busy))
    assert mark == "note" and "GPU 1 (NVIDIA H100 80GB HBM3, 80.0 GiB): 29.0 GiB are used" in text
    old = replace(TWIN, name="Tesla P40", capability=(6, 1))
    mark, text = doctor_ranks.check_places(ON_CUDA, probe(H100, old))
    assert mark == "BROKEN" and text.startswith(
        "GPU 1 (Tesla P40, 80.0 GiB) has compute capability 6.1"
    )


UNLIKE_CAPABILITY = (
    "the ranks' GPUs have different compute capabilities (rank 0: GPU 0 (NVIDIA H100 80GB HBM3, 80.0 GiB), 9.0, "
    "rank 1: GPU 1 (NVIDIA L4, 22.0 GiB), 8.9): ranks draw the same tokens only with the same machine code; "
    "CUDA_VISIBLE_DEVICES chooses GPUs of one kind"
)
UNLIKE_SIZE = (
    "the ranks' GPUs are not of one kind (rank 0: GPU 0 (NVIDIA H100 80GB HBM3, 80.0 GiB), rank 1: GPU 1 (NVIDIA H200, 140.0 GiB)): "
    "all get the KV blocks and steps that the smallest has room for, and wait for the slowest"
)


def test_gpus_of_unlike_kinds() -> None:
    assert check_alike([H100, TWIN]) == ""
    assert check_alike([H100, H200]) == UNLIKE_SIZE
    with pytest.raises(NoUsableGpu) as refusal:
        check_alike([H100, L4])
    assert str(refusal.value) == UNLIKE_CAPABILITY
    mark, text = doctor_ranks.check_places(ON_CUDA, probe(H100, H200))
    assert mark == "note" and text.endswith(f"; {UNLIKE_SIZE}")
    assert doctor_ranks.check_places(ON_CUDA, probe(H100, L4)) == ("BROKEN", UNLIKE_CAPABILITY)


def test_ranks_tell_each_other_what_gpus_they_have(caplog: pytest.LogCaptureFixture) -> None:
    """All refuse alike; what is only said is said once."""

    def told(*gpus: Gpu) -> list[str]:
        def check(communicator: object) -> str:
            try:
                check_gpus(gpus[communicator.rank], communicator)  # type: ignore[attr-defined, arg-type]
            except NoUsableGpu as error:
                return str(error)
            return ""

        return run_ranks(len(gpus), check)

    with caplog.at_level(logging.WARNING, "pagewire.worker"):
        assert told(H100, L4) == [UNLIKE_CAPABILITY] * 2
        assert told(H100, TWIN) == ["", ""] and not caplog.messages
        busy = replace(H200, others=(Process(7, "x" * 3000, GIB),))
        assert told(H100, busy) == ["", ""] and caplog.messages == [UNLIKE_SIZE]


MATRIX = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tPHB\t0-47\t0\t\tN/A\n"
    "GPU2\tSYS\tPHB\t X \t0-47\t0\t\tN/A\n"
    "\n"
    "Legend:\n\n  X    = Self\n"
)
NUMBERS = "0, GPU-bb\n1, GPU-aa\n2, GPU-cc\n"


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("GPU-aa", "GPU-bb", "NV18"),
        ("GPU-aa", "GPU-cc", "PHB"),
        ("GPU-cc", "GPU-bb", "SYS"),
        ("GPU-aa", "GPU-zz", ""),
    ],
)
def test_the_table_of_connections_is_read_by_uuid(first: str, second: str, kind: str) -> None:
    """nvidia-smi's numbers are not torch's."""
    assert kind_of_connection(NUMBERS, MATRIX, first, second) == kind
    assert kind_of_connection("", "", first, second) == ""


def test_how_gpus_reach_each_other() -> None:
    nvlink, none = Connection(0, 1, True, "NV18"), Connection(0, 1, False, "SYS")
    elsewhere = Connection(0, 2, False)
    check = doctor_ranks.check_peers
    assert check((nvlink, elsewhere), (H100, TWIN), ON_CUDA) == (
        "ok",
        "the ranks' GPUs can use each other's memory over NV18",
    )
    assert check((Connection(0, 1, True),), (H100, TWIN), ON_CUDA)[0] == "ok"
    assert check((Connection(0, 1, True, "PHB"),), (H100, TWIN), ON_CUDA) == (
        "note",
        "the ranks' GPUs can use each other's memory over PHB; PHB is PCIe, and every layer waits for it twice",
    )
    assert check((none,), (H100, TWIN), ON_CUDA) == (
        "note",
        "GPU 0 and GPU 1 (SYS) cannot use each other's memory: all collective operations go through NCCL, "
        "which is slower for few rows",
    )


def test_stages_of_one_rank_need_less_of_a_connection() -> None:
    check = doctor_ranks.check_peers
    assert check((Connection(0, 1, True, "PHB"),), (H100, TWIN), STAGES_ON_CUDA) == (
        "ok",
        "the ranks' GPUs can use each other's memory over PHB; PHB is PCIe, and hidden states go over it",
    )
    assert check((Connection(0, 1, False, "SYS"),), (H100, TWIN), STAGES_ON_CUDA) == (
        "note",
        "GPU 0 and GPU 1 (SYS) cannot use each other's memory: NCCL hands on hidden states through the "
        "host's memory",
    )


def test_ranks_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ranks.processors, "usable", lambda: 8)
    assert doctor_ranks.check_places(ON_CPU, probe(H100)) == (
        "ok",
        "2 processes with 4 thread(s) each on 8 core(s), connected by gloo: slower than one process with all cores",
    )
    mark, text = doctor_ranks.check_places(replace_size(ON_CPU, 16), probe())
    assert mark == "note" and text.startswith("16 processes with 1 thread(s) each on 8 core(s)")


def test_all_ranks_of_all_stages_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ranks.processors, "usable", lambda: 4)
    assert doctor_ranks.check_places(STAGES_ON_CPU, probe(H100)) == (
        "ok",
        "4 processes, 2 stages of 2 rank(s), with 1 thread(s) each on 4 core(s), connected by gloo: "
        "one request at a time is slower than one process with all cores",
    )
    monkeypatch.setattr(doctor_ranks.processors, "usable", lambda: 3)
    assert doctor_ranks.check_places(STAGES_ON_CPU, probe())[0] == "note"


def test_stages_on_gpus_need_a_gpu_a_rank(tiny) -> None:
    model = ModelConfig(str(tiny("llama").path))
    assert doctor_ranks.check_places(STAGES_ON_CUDA, probe(H100, TWIN)) == (
        "ok",
        "2 ranks, 2 stages of 1, on GPU 0 (NVIDIA H100 80GB HBM3, 80.0 GiB), "
        "GPU 1 (NVIDIA H100 80GB HBM3, 80.0 GiB)",
    )
    mark, text = doctor_ranks.check_places(STAGES_ON_CUDA, probe(H100))
    assert mark == "BROKEN" and text.startswith("a GPU a rank is needed, 2 in all, and there are 1")
    assert subjects(model, STAGES_ON_CUDA, probe(H100, TWIN)) == [
        "ranks", "peers", "shared memory", "division", "rank memory",
    ]  # fmt: skip
    assert "2 processes, 2 stages of 1" in doctor_ranks.check_places(STAGES_ON_CUDA, probe())[1]


def test_who_places_them(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = WorkerConfig(device="cpu", tensor_parallel_size=2, distributed_executor_backend="ray")
    monkeypatch.setattr(doctor_ranks.importlib.metadata, "version", lambda name: "2.60.0")
    monkeypatch.setattr(doctor_ranks.stack.importlib.util, "find_spec", lambda name: object())
    assert doctor_ranks.check_places(worker, probe())[1].endswith("; placed by Ray 2.60.0")
    on_gpus = msgspec.structs.replace(worker, device="cuda")
    assert doctor_ranks.check_places(on_gpus, probe(H100)) == (
        "note",
        "2 ranks need 1 GPU(s) of other hosts beside this one's 1; placed by Ray 2.60.0, whose cluster is not asked "
        "here: `ray status` says what it has",
    )
    monkeypatch.setattr(doctor_ranks.stack.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadSetting, match=r"pip install 'pagewire\[ray\]'"):
        doctor_ranks.check_places(worker, probe())


def subjects(model: ModelConfig, worker: WorkerConfig, seen: GpuProbe) -> list[str]:
    return [subject for subject, _ in doctor_ranks.list_checks(model, worker, seen)]


def test_one_rank_needs_no_further_checks(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(str(tiny("llama").path))
    assert subjects(model, WorkerConfig(), probe(H100, TWIN)) == []
    assert subjects(model, ON_CPU, probe(H100)) == ["ranks", "division", "rank memory"]
    assert subjects(model, ON_CUDA, probe(H100)) == [
        "ranks", "peers", "shared memory", "division", "rank memory",
    ]  # fmt: skip
    monkeypatch.setattr(doctor, "look_at_gpus", lambda: probe(H100, TWIN))
    names = [name for name, _ in doctor.list_checks(model, FrontendConfig(), ON_CUDA, False)]
    assert names[-6:] == ["model", "ranks", "peers", "shared memory", "division", "rank memory"]
    stages = WorkerConfig(device="cpu", pipeline_parallel_size=2)
    names = [name for name, _ in doctor.list_checks(model, FrontendConfig(), stages, False)]
    assert names[-4:] == ["model", "ranks", "division", "rank memory"]
    names = [name for name, _ in doctor_container.checks("worker", model, stages)]
    assert names[2:6] == ["device", "ranks", "division", "rank memory"]
    names = [name for name, _ in doctor_container.checks("worker", model, ON_CUDA)]
    assert names[2:8] == ["device", "ranks", "peers", "shared memory", "division", "rank memory"]
    names = [name for name, _ in doctor_container.checks("tokenizer", model, ON_CUDA)]
    assert "ranks" not in names


def test_which_numbers_divide_a_model(tiny) -> None:
    path = tiny("llama").path
    model = ModelConfig(str(path))
    config = json.loads((path / "config.json").read_text())
    mark, text = doctor_ranks.check_division(path, model, ON_CPU)
    assert mark == "ok" and text.startswith("this llama model can be divided among 1, 2")
    heads = config["num_attention_heads"]
    with pytest.raises(
        Unsupported, match=f"{heads} attention heads cannot be divided among 7 ranks"
    ):
        doctor_ranks.check_division(path, model, replace_size(ON_CPU, 7))
    mark, text = doctor_ranks.check_division(path, model, STAGES_ON_CPU)
    assert mark == "ok" and text.endswith(" ranks, in each of 1 to 3 stages of its 3 layers")
    deep = WorkerConfig(device="cpu", pipeline_parallel_size=4)
    with pytest.raises(Unsupported, match="3 layers cannot be divided among 4 stages"):
        doctor_ranks.check_division(path, model, deep)


def test_the_trial_generation_has_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    class Stopped(Exception):
        pass

    def engine(model: str, **settings: object) -> None:
        asked.update(settings)
        raise Stopped

    monkeypatch.setattr("pagewire.LLM", engine)
    with pytest.raises(Stopped):
        doctor.check_generation(ModelConfig("some/model", revision="v2"), STAGES_ON_CPU)
    assert asked["tensor_parallel_size"] == asked["pipeline_parallel_size"] == 2
    assert asked["revision"] == "v2" and asked["hopper_attention"] is True


def test_what_each_rank_holds(tiny) -> None:
    """By the arithmetic of the start itself: half of what there is to divide, and the norms."""
    path = tiny("llama").path
    model = ModelConfig(str(path))

    def bytes_of(size: int) -> tuple[int, int]:
        from pagewire.config import SchedulerConfig
        from pagewire.worker.load.rank_forecast import Request, forecast

        worker = WorkerConfig(
            device="cpu", dtype="float32", num_kv_blocks=64, tensor_parallel_size=size
        )
        answer = forecast(Request(str(path), model, SchedulerConfig(), worker))
        assert not answer.reason and answer.tokens == 64 * 16
        (stage,) = answer.stages
        return stage.weights, stage.cache

    whole, half = bytes_of(1), bytes_of(2)
    assert whole[0] / 2 < half[0] < 0.6 * whole[0] and half[1] == whole[1] // 2
    worker = WorkerConfig(device="cpu", tensor_parallel_size=2, num_kv_blocks=64)
    mark, text = doctor_ranks.check_memory(path, model, worker, ())
    assert mark == "ok" and text.startswith(
        "each rank holds 0.00 GiB of weights and 0.00 GiB of KV cache, "
    )
    assert "1,024 tokens in all; contexts of up to" in text


@pytest.mark.parametrize(
    ("size", "quantization", "share"), [(1, "", 0.01), (2, "", 0.01), (1, "int8", 0.25)]
)
def test_what_each_stage_holds(size: int, quantization: str, share: float, tiny) -> None:
    """As its start says it: two layers and the embedding, one layer and the head. Of quantized
    weights it is an estimate."""
    from pagewire.config import SchedulerConfig
    from pagewire.worker.load import loader
    from pagewire.worker.load.rank_agreement import Ranks
    from pagewire.worker.load.rank_forecast import Request, forecast
    from pagewire.worker.models.decoder import Decoder
    from pagewire.worker.models.ranks import PipelineStage
    from pagewire_kernels.communicator import SINGLE_RANK

    path = tiny("llama").path
    model = ModelConfig(str(path), quantization=quantization)
    worker = WorkerConfig(
        device="cpu",
        dtype="bfloat16" if quantization else "float32",
        cpu_kv_cache_gb=0.01,
        tensor_parallel_size=size,
        pipeline_parallel_size=2,
    )
    answer = forecast(Request(str(path), model, SchedulerConfig(), worker))
    assert [stage.layers for stage in answer.stages] == [2, 1]
    first, last = answer.stages
    assert first.cache == 2 * last.cache and answer.tokens % worker.block_size == 0
    if size == 1:
        for index, stage in enumerate(answer.stages):
            ranks = Ranks(SINGLE_RANK, SINGLE_RANK, PipelineStage(index, 2))
            loaded = loader.load(path, model, worker, lambda stage, fraction: None, ranks=ranks)
            decoder = loaded.decoder
            assert isinstance(decoder, Decoder) and stage.weights == loaded.sizing.weight_bytes
            tied_copy = 257 * 64 * 4 if index == 1 and not quantization else 0
            assert stage.weights - tied_copy == pytest.approx(decoder.nbytes, rel=share)
    mark, text = doctor_ranks.check_memory(path, model, worker, ())
    assert mark == "ok" and text.startswith(
        "each rank of stage 0 (2 layers, embedding) holds 0.00 GiB of weights and "
    )
    assert "; each rank of stage 1 (1 layer, head) holds " in text
    assert f", {answer.tokens:,} tokens in all; contexts of up to" in text


@pytest.mark.parametrize("quantization", ["", "int8"])
def test_what_each_stage_holds_of_gpus(quantization: str, tiny) -> None:
    """The weights of its part, and what is left of its GPU's memory for blocks, of which all have as
    many as the stage with the least room."""
    from pagewire.config import SchedulerConfig
    from pagewire.worker.load.rank_forecast import Request, forecast

    path = tiny("llama").path
    model = ModelConfig(str(path), quantization=quantization)

    def of(stages: int, *gpus: Gpu) -> Any:
        worker = WorkerConfig(device="cuda", dtype="bfloat16", pipeline_parallel_size=stages)
        answer = forecast(Request(str(path), model, SchedulerConfig(), worker, gpus))
        assert not answer.reason
        return answer

    whole, parts = of(1, H100), of(2, H100, TWIN)
    first, last = parts.stages
    assert (first.layers, last.layers) == (2, 1) and first.weights > last.weights
    table = 257 * 64 * 2
    both = first.weights + last.weights - table
    about = 0.1 if quantization else 0.02  # of quantized weights it is an estimate
    assert both == pytest.approx(whole.stages[0].weights, rel=about)
    assert first.cache == 2 * last.cache and 1.3 < parts.tokens / whole.tokens < 1.6


def test_stages_that_are_alike_are_told_together() -> None:
    held = {"layers": 2, "weights": GIB, "cache": GIB // 2}
    assert doctor_ranks._held([held] * 5) == (
        "each rank of stage 0 (2 layers, embedding) holds 1.00 GiB of weights and 0.50 GiB of KV cache; "
        "each rank of stages 1 to 3 (2 layers) holds 1.00 GiB of weights and 0.50 GiB of KV cache; "
        "each rank of stage 4 (2 layers, head) holds 1.00 GiB of weights and 0.50 GiB of KV cache"
    )


def test_a_context_is_cut_to_what_all_stages_hold(tiny) -> None:
    """--fit, and the refusal without it, which names a rank of all."""
    from pagewire.config import SchedulerConfig
    from pagewire.worker.load.rank_forecast import Forecast, Request, forecast

    path = tiny("llama").path

    def answer(fit: bool) -> Forecast:
        worker = WorkerConfig(
            device="cpu", num_kv_blocks=4, pipeline_parallel_size=3, tensor_parallel_size=2, fit=fit
        )
        return forecast(
            Request(str(path), ModelConfig(str(path), max_model_len=128), SchedulerConfig(), worker)
        )

    assert answer(True).max_model_len == answer(True).tokens == 64
    assert answer(False).reason.startswith("rank 0 of 6: a context of 128 tokens needs 8 KV blocks")


def test_a_model_with_too_few_layers_is_refused_in_words(tiny) -> None:
    path = tiny("llama").path
    deep = WorkerConfig(device="cpu", pipeline_parallel_size=4)
    mark, text = doctor_ranks.check_memory(path, ModelConfig(str(path)), deep, ())
    assert mark == "BROKEN" and "3 layers cannot be divided among 4 stages" in text


def test_a_rank_s_gpu_that_is_too_small_is_named(tiny) -> None:
    """The second one; planned on numbers alone, without a GPU."""
    from pagewire.config import SchedulerConfig
    from pagewire.worker.load.rank_forecast import Request, forecast

    path = tiny("llama").path
    full = replace(TWIN, free=GIB // 8)
    request = Request(str(path), ModelConfig(str(path)), SchedulerConfig(), ON_CUDA, (H100, TWIN))
    answer = forecast(request)
    assert not answer.reason and answer.stages[0].cache > 50 * GIB
    request = Request(str(path), ModelConfig(str(path)), SchedulerConfig(), ON_CUDA, (H100, full))
    assert forecast(request).reason.startswith("rank 1 of 2: the model needs")


def test_on_this_machine(tiny) -> None:
    """The whole of it, on the CPU, in one of the images."""
    path = str(tiny("llama").path)
    words = (
        "doctor",
        path,
        "--device=cpu",
        "-tp=2",
        "--num-kv-blocks=64",
        "--port=0",
        "--no-generation",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pagewire", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line[8:22].strip(): line for line in done.stdout.splitlines()}
    assert {"ranks", "division", "rank memory"} <= set(lines)
    assert "1,024 tokens in all" in lines["rank memory"]


def test_small_shared_memory_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    sizes = SimpleNamespace(f_frsize=4096, f_blocks=(64 << 20) // 4096)
    monkeypatch.setattr(doctor_ranks.os, "statvfs", lambda path: sizes)
    assert doctor_ranks.check_shared_memory() == (
        "note",
        "0.06 GiB in /dev/shm, which NCCL may find too small: start a container with --shm-size=1g",
    )


def test_in_a_container_the_stack_s_settings_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("tensor_parallel_size: 2\nmodel: some/model\nport: 8000\n")
    asked: list[tuple[str, str, int, str]] = []

    def checks(image: str, model: ModelConfig, worker: WorkerConfig) -> list[object]:
        asked.append((image, model.model, worker.tensor_parallel_size, worker.device))
        return []

    monkeypatch.setattr(doctor_container, "SETTINGS", str(settings))
    monkeypatch.setattr(doctor_container, "checks", checks)
    monkeypatch.setenv("PAGEWIRE_IMAGE", "worker")
    monkeypatch.setenv("PAGEWIRE_DEVICE", "cpu")
    assert doctor_container.main([]) == 0
    assert doctor_container.main(["-tp", "4"]) == 0
    assert asked == [("worker", "some/model", 2, "cpu"), ("worker", "some/model", 4, "cpu")]
