"""Workers that are groups of ranks, in whole stacks: with the fake model, whose every token is known,
and with a small real one over gloo on the CPU."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from e2e.conftest import Stack
from e2e.test_stack_fake import VOCAB, ask, stream
from pagewire.offline.llm import LLM
from pagewire.offline.sampling_params import SamplingParams
from pagewire.process.errors import EXPECTED
from pagewire.process.group import Place
from pagewire.worker.communicators import NoCommunicator, connect_ranks
from pagewire.worker.fake import chain
from pagewire.worker.models import describe
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire_kernels.backend import backend
from pagewire_protocol.sampling import Sampling
from safetensors.torch import save_file
from torch._C._distributed_c10d import HashStore
from worker.conftest import Driver

FAKE = ("--device", "fake", "--skip-tokenizer-init", "--fake-vocab-size", str(VOCAB))
ON_CPU = {"dtype": "float32", "skip_tokenizer_init": True, "num_kv_blocks": 100, "device": "cpu"}
COUNT = 60
LLAMA = {
    "model_type": "llama", "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "rope_theta": 10_000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def ranks_of(stack: Any) -> dict[str, int]:
    """Process ids of a stack's workers by their names."""
    found: dict[str, int] = {}
    for pid, kind in stack.children().items():
        if kind == "worker":
            names = re.findall(r"--name=([^\0]*)", Path(f"/proc/{pid}/cmdline").read_text())
            found[names[0]] = pid
    return found


async def streams_through(stack: Any, prompts: list[list[int]], count: int, fault: Any) -> Any:
    """The answers to `prompts`, during which `fault` is called."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [
            asyncio.create_task(stream(session, stack.url, prompt, count)) for prompt in prompts
        ]
        await asyncio.sleep(0.5)
        running = sum(not task.done() for task in streams)
        fault()
        answers = await asyncio.wait_for(asyncio.gather(*streams), 60)
    assert running == len(prompts), "the streams ended before the fault: nothing was tested"
    await asyncio.to_thread(stack.wait_serving)
    return answers


@pytest.fixture(scope="module")
def fake_ranks() -> Iterator[Stack]:
    stack = Stack(*FAKE, "--fake-step-ms", "4", "-tp", "2", "-pp", "2")
    try:
        yield stack.wait_ready()
    finally:
        assert stack.end() == 0


def test_a_group_is_one_worker_of_several_processes(fake_ranks: Stack) -> None:
    assert sorted(ranks_of(fake_ranks)) == [
        "worker-0",
        *(f"worker-0.{rank}" for rank in (1, 2, 3)),
    ]
    (choice,) = ask(fake_ranks, [1, 2, 3], 8)["choices"]
    assert choice["token_ids"] == chain([1, 2, 3], 8, VOCAB)


@pytest.mark.parametrize("rank", ["worker-0", "worker-0.3"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_streams_survive_the_loss_of_a_rank(
    rank: str, number: signal.Signals, fake_ranks: Stack
) -> None:
    """The group starts again as a whole, and every stream goes on with its own tokens."""
    make = random.Random(rank)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 99))] for _ in range(8)]
    before = ranks_of(fake_ranks)
    answers = await streams_through(fake_ranks, prompts, 700, lambda: os.kill(before[rank], number))
    for prompt, (tokens, reason) in zip(prompts, answers, strict=True):
        assert tokens == chain(prompt, 700, VOCAB) and reason == "length"
    after = ranks_of(fake_ranks)
    assert sorted(after) == sorted(before)
    assert not set(after.values()) & set(before.values()), "a rank outlived its group"


def save_model(path: Path, config: dict[str, Any]) -> Path:
    """A model of random weights, without transformers, whose import would take longer than all of
    this."""
    slots = Decoder(describe(config), Build(backend("cpu"), torch.float32, "meta")).weight_slots()
    make = torch.Generator().manual_seed(5)
    tensors = {slot.name: torch.randn(slot.shape, generator=make) * 0.2 for slot in slots}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), LLAMA)


PROMPTS = [[5, 9, 11], [7, 23, 40, 2, 8], [1], [99, 100, 101, 102]]


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[list[int]]:
    """What one process says after the prompts."""
    greedy = Sampling(0, COUNT, temperature=0.0, ignore_eos=True)
    return Driver(tiny).generate(PROMPTS, [greedy] * len(PROMPTS), COUNT)


@pytest.mark.parametrize(
    ("flag", "words", "killed"),
    [
        ("--tensor-parallel-size", "divided among 2 ranks; each of them has:", ["worker-0.1"]),
        ("-pp", "divided among 2 pipeline stages of 1 rank(s)", ["worker-0.1", "worker-0"]),
    ],
    ids=["tensor-parallel", "pipeline-parallel"],
)
async def test_a_real_model_over_two_ranks_survives_the_loss_of_one(
    flag: str, words: str, killed: list[str], tiny: Path, alone: list[list[int]]
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ON_CPU.items() if value != 1]
    stack = Stack(str(tiny), *flags, "--skip-tokenizer-init", flag, "2")
    try:
        await asyncio.to_thread(stack.wait_ready)
        assert any(words in line for line in stack.lines)
        body: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": COUNT}

        async def tokens(prompt: list[int]) -> list[int]:
            answer = await asyncio.to_thread(ask, stack, prompt, COUNT, **body)
            return answer["choices"][0]["token_ids"]

        for rank in killed:
            before = ranks_of(stack)
            running = [asyncio.create_task(tokens(prompt)) for prompt in PROMPTS]
            await asyncio.sleep(0.05)
            os.kill(before[rank], signal.SIGKILL)
            assert await asyncio.wait_for(asyncio.gather(*running), 60) == alone
            assert not set(ranks_of(stack).values()) & set(before.values())
    finally:
        assert stack.end() == 0


@pytest.mark.parametrize(("size", "stages"), [(2, 1), (2, 2)])
def test_the_same_offline(size: int, stages: int, tiny: Path, alone: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    settings = {"tensor_parallel_size": size, "pipeline_parallel_size": stages, **ON_CPU}
    with LLM(str(tiny), **settings) as llm:
        outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == alone


def test_a_model_that_cannot_be_divided_so_is_refused_in_one_line(tiny: Path) -> None:
    with pytest.raises(RuntimeError, match="4 attention heads cannot be divided among 3 ranks"):
        LLM(str(tiny), tensor_parallel_size=3, **ON_CPU)
    with pytest.raises(RuntimeError, match="3 layers cannot be divided among 4 stages"):
        LLM(str(tiny), pipeline_parallel_size=4, **ON_CPU)


TOO_FEW = "a GPU a rank is needed, 4 in all, and there are 2: 0, 1"


@pytest.mark.parametrize(
    "words",
    [("serve", "--port", "0"), ("run-batch", "-i", "{dir}/in", "-o", "{dir}/out")],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_refused_before_anything_starts(
    words: tuple[str, ...], device: str, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text("")
    run_dir = tmp_path / "run"
    flags = ("--device", device, "--run-dir", str(run_dir), "-pp", "2", "-tp", "2")
    done = subprocess.run(
        [sys.executable, "-m", "pagewire", *(word.format(dir=tmp_path) for word in words), *flags],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = done.stderr.splitlines()
    start = f"pagewire {words[0]}: --pipeline-parallel-size 2: {TOO_FEW}"
    assert line.startswith(start) and done.returncode
    assert not run_dir.exists() and not (tmp_path / "out").exists()


def test_more_ranks_than_gpus_are_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError) as refusal:
        LLM(pipeline_parallel_size=2, tensor_parallel_size=2)
    assert str(refusal.value) == f"pipeline_parallel_size=2: {TOO_FEW}"


def test_ranks_that_see_too_few_gpus_end_in_one_line() -> None:
    """Where no device file told of the GPUs before."""
    place = Place("worker-0", 0, 1, "life", 0, (), ())
    with pytest.raises(NoCommunicator) as refusal:
        connect_ranks(HashStore(), place, "cuda", 1)
    assert isinstance(refusal.value, EXPECTED)
    assert "as many GPUs, and this process sees 0: lower" in str(refusal.value)


def test_a_worker_by_itself_starts_its_ranks() -> None:
    """As in a container: the process that is started has the ranks for children, starts them again
    together, and ends with them."""
    command = ("-m", "pagewire", "worker", *FAKE, "--name", "w", "-tp", "2")
    run_dir = tempfile.mkdtemp(prefix="pw-")
    worker = Stack("--run-dir", run_dir, command=command)
    try:
        for _ in range(2):
            worker.wait_line("ready after")
            end = time.monotonic() + 30
            while sum("ready after" in line for line in worker.lines) < 2:
                assert time.monotonic() < end, worker.lines
                time.sleep(0.05)
            before = ranks_of(worker)
            assert sorted(before) == ["w", "w.1"]
            worker.lines.clear()
            os.kill(before["w.1"], signal.SIGKILL)
        assert worker.wait_line("ready after")
    finally:
        code = worker.end()
        shutil.rmtree(run_dir)
    assert code == 0
