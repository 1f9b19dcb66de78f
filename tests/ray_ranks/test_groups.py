"""Groups whose ranks are Ray actors, in whole stacks with the fake model: with a stand-in for Ray,
and, by request, on a cluster.

    PAGEWIRE_TEST_RAY_CLUSTER=1 make test ARGS="-s tests/ray_ranks"
"""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Stack, gone
from e2e.test_rank_groups import (
    COUNT,
    FAKE,
    ON_CPU,
    PROMPTS,
    alone,  # noqa: F401  a fixture, as the next one
    ranks_of,
    streams_through,
    tiny,  # noqa: F401
)
from e2e.test_stack_fake import VOCAB, ask
from pagewire.offline.llm import LLM
from pagewire.offline.sampling_params import SamplingParams
from pagewire.worker.fake import chain
from ray_ranks.clusters import cluster, on_cluster, with_stand_in

RANKS = 3
NAMES = ["worker-0", "worker-0.1", "worker-0.2"]
RAY = ("--distributed-executor-backend", "ray")


def processes(stack: Any) -> dict[str, tuple[int, int]]:
    """(the rank's process, its actor's) of each rank's name."""
    run_dir = str(stack.run_dir())
    ranks: dict[str, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_text().split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        # the proxy has the same words but for the last one
        if f"--run-dir={run_dir}" in words and words[-2] == "--distributed-executor-backend=mp":
            name = next(word for word in words if word.startswith("--name="))
            ranks[name.removeprefix("--name=")] = (int(entry.name), parent)
    return ranks


REPLACED_S = 60.0
"""By when a group of ranks is another one, on a busy machine."""


@pytest.fixture(scope="module", params=["stand-in", pytest.param("cluster", marks=on_cluster)])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    flags = (*FAKE, "--fake-step-ms", "4", "-tp", str(RANKS), *RAY)
    if request.param == "cluster":
        yield from on_a_cluster(flags)
        return
    stack = Stack(*flags, environment=with_stand_in())
    try:
        yield stack.wait_ready()
    finally:
        assert stack.end() == 0


def on_a_cluster(flags: tuple[str, ...]) -> Iterator[Stack]:
    """As a user has it: `ray start`, then `pagewire serve`."""
    with cluster(8) as variables:
        stack = Stack(*flags, environment=variables)
        try:
            yield stack.wait_ready()
        finally:
            print("\n".join(stack.lines))
            assert stack.end() == 0


def test_each_rank_is_the_child_of_an_actor(stack: Stack) -> None:
    assert sorted(ranks_of(stack)) == NAMES
    ranks = processes(stack)
    assert sorted(ranks) == NAMES
    proxies = set(ranks_of(stack).values())
    assert not {pid for both in ranks.values() for pid in both} & proxies
    assert len({actor for _, actor in ranks.values()}) == RANKS
    (choice,) = ask(stack, [1, 2, 3], 8)["choices"]
    assert choice["token_ids"] == chain([1, 2, 3], 8, VOCAB)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("rank", signal.SIGKILL),
        ("rank", signal.SIGSTOP),
        ("actor", signal.SIGKILL),
        ("proxy", signal.SIGKILL),
    ],
    ids=["rank-killed", "rank-stopped", "actor-killed", "proxy-killed"],
)
async def test_streams_survive_the_loss_of_a_process(
    victim: str, number: signal.Signals, stack: Stack
) -> None:
    """The group starts again as a whole, with new actors, and every stream goes on with its own
    tokens."""
    make = random.Random(victim)
    name = {"rank": "worker-0.1", "actor": "worker-0.2", "proxy": "worker-0"}[victim]
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 99))] for _ in range(4)]
    before = processes(stack)
    rank, actor = before[name]
    pid = {"rank": rank, "actor": actor, "proxy": ranks_of(stack)[name]}[victim]
    count = 500
    answers = await streams_through(stack, prompts, count, lambda: os.kill(pid, number))
    for prompt, (tokens, reason) in zip(prompts, answers, strict=True):
        assert tokens == chain(prompt, count, VOCAB) and reason == "length"
    # A stopped rank is noticed after seconds, and streams may have ended by then.
    former = {pid for pid, _ in before.values()}
    end = time.monotonic() + REPLACED_S
    while sorted(after := processes(stack)) != NAMES or {pid for pid, _ in after.values()} & former:
        assert time.monotonic() < end, (before, after)
        await asyncio.sleep(0.1)
    assert gone([pid for both in before.values() for pid in both], 10.0)


def test_the_end_of_a_stack_leaves_no_process() -> None:
    """One that is killed; what one in order does: below."""
    stack = Stack(*FAKE, "-tp", "2", *RAY, environment=with_stand_in())
    try:
        stack.wait_ready()
        both = [pid for pair in processes(stack).values() for pid in pair]
        assert len(both) == 4
        stack.process.kill()
        assert gone(both, 10.0)
    finally:
        assert stack.end() == -signal.SIGKILL


def test_the_same_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in with_stand_in().items():
        monkeypatch.setenv(name, value)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    settings = {"skip_tokenizer_init": True, "fake_vocab_size": VOCAB, "tensor_parallel_size": 2}
    with LLM(device="fake", distributed_executor_backend="ray", **settings) as llm:
        (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == chain([1, 2, 3], 8, VOCAB)


def test_pipeline_stages_are_ranks_as_others(
    tiny: Path,  # noqa: F811
    alone: list[list[int]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An actor for each of the four ranks of two stages, and a real model's answers as of one
    process."""
    log = tmp_path / "calls"
    for name, value in with_stand_in(STAND_IN_LOG=str(log)).items():
        monkeypatch.setenv(name, value)
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    divided = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    divided["watchdog_timeout"] = 60  # a rank that waits for others on a busy machine does not hang
    with LLM(str(tiny), distributed_executor_backend="ray", **divided, **ON_CPU) as llm:
        outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == alone
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [call["bundle"] for call in calls if "bundle" in call] == [0, 1, 2, 3]


async def test_streams_survive_the_loss_of_a_stage() -> None:
    stack = Stack(
        *FAKE, "--fake-step-ms", "4", "-pp", "2", *RAY, environment=with_stand_in()
    ).wait_ready()
    try:
        before = processes(stack)
        assert sorted(before) == ["worker-0", "worker-0.1"]
        prompts = [[number, 2, 3] for number in range(4)]
        victim = before["worker-0.1"][0]
        answers = await streams_through(
            stack, prompts, 500, lambda: os.kill(victim, signal.SIGKILL)
        )
        for prompt, (tokens, reason) in zip(prompts, answers, strict=True):
            assert tokens == chain(prompt, 500, VOCAB) and reason == "length"
        assert gone([pid for both in before.values() for pid in both], 10.0)
    finally:
        assert stack.end() == 0


def calls_of(tmp_path: Path, *flags: str, **variables: str) -> tuple[Stack, list[Any]]:
    log = tmp_path / "calls"
    environment = with_stand_in(STAND_IN_LOG=str(log), **variables)
    stack = Stack(*FAKE, "-tp", "2", *RAY, *flags, environment=environment)
    try:
        stack.wait_line("serves")
    except AssertionError:
        stack.process.wait(10)
    finally:
        stack.end()
    return stack, [json.loads(line) for line in log.read_text().splitlines()]


def test_what_ray_is_asked_for(tmp_path: Path) -> None:
    """A cluster of its own where there is none, a node's worth of bundles, an actor a rank."""
    _, (init, reserved, *actors, shutdown) = calls_of(tmp_path)
    assert init == {"call": "init", "sizes": ["num_cpus", "object_store_memory"]}
    assert reserved["strategy"] == "STRICT_PACK"
    assert reserved["bundles"] == [{"CPU": 1.0, "node:10.0.0.1": 0.001}] * 2
    assert [(actor["bundle"], actor["num_gpus"], actor["num_cpus"]) for actor in actors] == [
        (0, 0, 1),
        (1, 0, 1),
    ]
    assert all(actor["max_restarts"] == 0 for actor in actors)
    assert shutdown["call"] == "shutdown"


def test_a_cluster_that_there_is_is_joined_and_too_small_a_one_is_one_line(tmp_path: Path) -> None:
    stack, calls = calls_of(tmp_path, RAY_ADDRESS="10.0.0.1:6379", STAND_IN_CPUS="1")
    assert calls[0] == {"call": "init", "sizes": []}
    assert stack.lines[-2] == (
        "pagewire serve: worker: --distributed-executor-backend ray: 2 ranks need 2 CPU, and the 2 nodes of Ray's "
        "cluster have 1: this machine 1, 127.0.0.2 0: use fewer ranks, or add hosts with `ray start --address`"
    )
