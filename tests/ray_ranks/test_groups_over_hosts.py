"""Groups whose ranks are on several nodes of Ray, in whole stacks: with a stand-in for Ray, whose other
node is another directory and another address of this machine, and, by request, on a cluster of two
nodes.

    PAGEWIRE_TEST_RAY_CLUSTER=1 make test ARGS="-s tests/ray_ranks"
"""

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import tempfile
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

RAY = ("--distributed-executor-backend", "ray")
SYS_PIDFD_GETFD = 438
REPLACED_S = 60.0
"""By when a group of ranks is another one, on a busy machine."""


@contextlib.contextmanager
def two_hosts(own: int, other: int, **variables: str) -> Iterator[dict[str, str]]:
    """An environment in which Ray has two nodes with so many CPUs, by the stand-in."""
    with tempfile.TemporaryDirectory(prefix="pw-other-") as directory:
        yield with_stand_in(
            STAND_IN_CPUS=str(own),
            STAND_IN_OTHER_CPUS=str(other),
            STAND_IN_OTHER_DIRECTORY=directory,
            **variables,
        )


@pytest.fixture(scope="module", params=["stand-in", pytest.param("cluster", marks=on_cluster)])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Ranks 0 and 1 are on this host, rank 2 is on another one."""
    flags = (*FAKE, "--fake-step-ms", "4", "-tp", "3", *RAY)
    with (cluster if request.param == "cluster" else two_hosts)(2, 1) as variables:
        stack = Stack(*flags, environment=variables)
        try:
            yield stack.wait_ready()
        finally:
            print("\n".join(stack.lines))
            assert stack.end() == 0


def remote_ranks(stack: Any) -> dict[str, tuple[int, int]]:
    """(process id, its actor's) of each rank on another host, by name: of those whose inbox, which
    is in the stack's run directory, is not their own."""
    ranks: dict[str, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdecimal():
                continue
            variables = (entry / "environ").read_bytes().split(b"\0")
            streams = [each for each in variables if each.startswith(b"PAGEWIRE_STREAM=")]
            if any(f"ipc://{stack.run_dir()}/".encode() in each for each in streams):
                words = (entry / "cmdline").read_text().split("\0")
                name = next(word for word in words if word.startswith("--name="))
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                ranks[name.removeprefix("--name=")] = (int(entry.name), parent)
    return ranks


def cut_connection(pid: int) -> None:
    """Break the one TCP connection of a process, as a network does."""
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not entry.readlink().name.startswith("socket:"):
                continue
            fd = ctypes.CDLL(None).syscall(SYS_PIDFD_GETFD, pidfd, int(entry.name), 0)
            with socket.socket(fileno=fd) as connection:
                if connection.family == socket.AF_INET:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
    finally:
        os.close(pidfd)
    raise AssertionError("the process has no TCP connection")


def test_a_rank_on_another_host_is_one_of_the_group(stack: Stack) -> None:
    assert sorted(ranks_of(stack)) == ["worker-0", "worker-0.1", "worker-0.2"]
    remote = remote_ranks(stack)
    assert list(remote) == ["worker-0.2"]
    rank, _ = remote["worker-0.2"]
    words = Path(f"/proc/{rank}/cmdline").read_text().split("\0")
    assert f"--run-dir={stack.run_dir()}" not in words
    assert sum("the ranks of the model are on several hosts" in line for line in stack.lines) == 1
    assert any("worker-0.2 " in line and "ready after" in line for line in stack.lines)
    (choice,) = ask(stack, [1, 2, 3], 8)["choices"]
    assert choice["token_ids"] == chain([1, 2, 3], 8, VOCAB)


@pytest.mark.parametrize(
    "victim", ["rank-killed", "rank-stopped", "actor-killed", "proxy-killed", "connection-cut"]
)
async def test_no_request_is_lost_with_another_host(victim: str, stack: Stack) -> None:
    """The group starts again as a whole, and every stream goes on with its own tokens."""
    make = random.Random(victim)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 99))] for _ in range(4)]
    rank, actor = remote_ranks(stack)["worker-0.2"]
    proxy = ranks_of(stack)["worker-0.2"]
    faults = {
        "rank-killed": lambda: os.kill(rank, signal.SIGKILL),
        "rank-stopped": lambda: os.kill(rank, signal.SIGSTOP),
        "actor-killed": lambda: os.kill(actor, signal.SIGKILL),
        "proxy-killed": lambda: os.kill(proxy, signal.SIGKILL),
        "connection-cut": lambda: cut_connection(proxy),
    }
    count = 700
    answers = await streams_through(stack, prompts, count, faults[victim])
    for prompt, (tokens, reason) in zip(prompts, answers, strict=True):
        assert tokens == chain(prompt, count, VOCAB) and reason == "length"
    # A stopped rank is noticed after seconds, and streams may have ended by then.
    end = time.monotonic() + REPLACED_S
    while remote_ranks(stack).get("worker-0.2", (rank,))[0] == rank:
        assert time.monotonic() < end
        await asyncio.sleep(0.1)
    assert gone([rank, actor], 10.0)
    await asyncio.to_thread(stack.wait_serving)


@pytest.mark.parametrize("on", ["stand-in", pytest.param("cluster", marks=on_cluster)])
def test_a_real_model_over_two_hosts_answers_as_one_process(
    on: str,
    tiny: Path,  # noqa: F811
    alone: list[list[int]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two stages of two ranks, one on each host: collectives within a host, hidden states and
    results between hosts, which have addresses of their own."""
    log = tmp_path / "calls"
    hosts = cluster(2, 2) if on == "cluster" else two_hosts(2, 2, STAND_IN_LOG=str(log))
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    divided = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    divided["watchdog_timeout"] = 60  # a rank that waits for others on a busy machine does not hang
    with hosts as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with LLM(str(tiny), distributed_executor_backend="ray", **divided, **ON_CPU) as llm:
            outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == alone
    if on == "stand-in":
        calls = [json.loads(line) for line in log.read_text().splitlines()]
        (reserved,) = [call for call in calls if call["call"] == "placement_group"]
        assert (reserved["strategy"], reserved["nodes"]) == ("PACK", ["a1", "a1", "b2", "b2"])


def test_a_stage_over_two_hosts_has_the_same_tokens(
    tiny: Path,  # noqa: F811
    alone: list[list[int]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    with two_hosts(1, 1) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray", **ON_CPU}
        with LLM(str(tiny), **settings) as llm:
            outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == alone


def test_another_version_there_is_refused_in_one_line() -> None:
    with two_hosts(1, 1, STAND_IN_OTHER_VERSION="0.0.9") as variables:
        stack = Stack(*FAKE, "-tp", "2", *RAY, environment=variables)
        try:
            with pytest.raises(AssertionError, match=r"has Pagewire 0\.0\.9, and this machine "):
                stack.wait_line("serves")
            assert stack.process.wait(20) == 1
        finally:
            stack.end()
