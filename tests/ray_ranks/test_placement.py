"""What Ray is asked for, what goes between a rank's proxy and its actor, and what is refused."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pagewire.config import BadSetting, WorkerConfig
from pagewire.launch import flags, stack
from pagewire.launch.ray_ranks import child, handover, placement, planning
from pagewire.launch.ray_ranks.handover import RankDescriptors, RankProcess
from pagewire.launch.ray_ranks.planning import Needs, NotPlaced
from pagewire.offline.settings import configure
from pagewire.process import liveness
from pagewire.process.group import GroupMemory, Place, RingReader, RingWriter

GPU = Needs(gpus=1, cpus=0)
CPU = Needs(gpus=0, cpus=1)


@pytest.mark.parametrize(
    ("device", "has_device", "visible", "needs"),
    [
        ("cuda", False, None, GPU),
        ("auto", True, None, GPU),
        ("auto", True, "3,4", GPU),
        ("auto", True, "-1", CPU),
        ("auto", False, None, CPU),
        ("cpu", True, None, CPU),
        ("fake", True, None, CPU),
    ],
)
def test_a_rank_needs_a_gpu_where_the_model_runs_on_gpus(
    device: str,
    has_device: bool,
    visible: str | None,
    needs: Needs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning.driver, "has_device", lambda: has_device)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert planning.needs_of(device) == needs


def test_a_client_s_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(NotPlaced, match="this machine has to be a node of the cluster"):
        placement.place(placement.Request("worker-0", "life", "cpu", ["a", "b"]))


PROGRAM = """
import sys
from pagewire.process import liveness
from pagewire.process.group import Place, RingReader
from pagewire.process.parent import die_with_parent
die_with_parent()
liveness.own.inherit()
place = Place.inherited()
print("rank", place.rank, "of", place.size, flush=True)
print(RingReader(place).expect(20).decode(), flush=True)
sys.stdin.read()
import signal
signal.pause()
"""


class Rank:
    """A rank that `child.run_rank` starts in a thread, as an actor does, and this test's end of its
    socket, as its proxy's."""

    def __init__(self, directory: Path) -> None:
        self.memory = GroupMemory("worker-0", 2)
        place = self.memory.place(1)
        self.writer = RingWriter(self.memory.place(0))
        page = liveness.new_page()
        output, theirs = os.pipe()
        self.output = os.fdopen(output, "r")
        path = handover.socket_path(directory, place, 1)
        process = RankProcess(
            (sys.executable, "-c", PROGRAM),
            str(directory),
            {**os.environ, "PAGEWIRE_TEST_MARK": "\udcff"},
            place.as_variable(),
        )
        self.thread = threading.Thread(target=child.run_rank, args=(str(path), None), daemon=True)
        with handover.listening(path) as listener:
            self.thread.start()
            listener.settimeout(20.0)
            self.proxy, _ = listener.accept()
        assert not path.exists()
        descriptors = RankDescriptors(theirs, page, place.fds)
        handover.send(self.proxy, process, descriptors)
        os.close(theirs)
        os.close(page)

    def close(self) -> None:
        self.proxy.close()
        self.output.close()
        self.memory.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_a_rank_inherits_its_place_and_ends_as_it_is_told(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    try:
        assert rank.output.readline() == "rank 1 of 2\n"
        rank.writer.write(b"a step")
        assert rank.output.readline() == "a step\n"
        rank.proxy.send(bytes((signal.SIGTERM,)))
        assert handover.receive_status(rank.proxy) == -signal.SIGTERM
        assert rank.output.read() == ""
    finally:
        rank.close()


def test_a_rank_is_killed_when_its_proxy_is_gone(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    try:
        rank.output.readline()
        rank.proxy.shutdown(socket.SHUT_RDWR)
        assert rank.output.read() == ""
    finally:
        rank.close()


def test_a_proxy_that_cannot_be_reached_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "CONNECT_S", 0.0)
    with pytest.raises(
        child.NoProxy, match=r"cannot reach .*/no-such \(No such file or directory\)"
    ):
        child.run_rank(str(tmp_path / "no-such"), None)


def parse(*words: str) -> tuple[stack.StackConfig, list[str]]:
    lines: list[str] = []
    return flags.parse(flags.new("serve", ""), [*words], lines.append)[0], lines


@pytest.mark.parametrize("backend", ["mp", "uni", "ray"])
def test_one_rank_needs_nobody_to_place_it(backend: str) -> None:
    config, lines = parse("M", "--distributed-executor-backend", backend)
    assert config.worker.distributed_executor_backend == backend
    line = "--distributed-executor-backend ray has no effect: one rank is a process of this machine"
    assert lines == ([line] if backend == "ray" else [])
    lines.clear()
    configure({"model": "M", "distributed_executor_backend": backend}, lines.append)
    line = "pagewire: distributed_executor_backend='ray' has no effect: one rank is a process of this machine"
    assert lines == ([line] if backend == "ray" else [])


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_several_ranks_are_placed_by_either(backend: str) -> None:
    config, lines = parse(
        "M", "-tp", "2", "--device", "cpu", f"--distributed-executor-backend={backend}"
    )
    assert config.worker.distributed_executor_backend == backend and not lines
    settings = {"model": "M", "tensor_parallel_size": 2, "device": "cpu"}
    config = configure({**settings, "distributed_executor_backend": backend})
    assert config.worker.distributed_executor_backend == backend
    config = configure({**settings, "distributed_executor_backend": None})
    assert config.worker.distributed_executor_backend == "mp"


def test_without_ray_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stack.importlib.util, "find_spec", lambda name: None)
    line = "--distributed-executor-backend ray: Ray is not installed: pip install 'pagewire[ray]'"
    with pytest.raises(SystemExit):
        parse("M", "-tp", "2", "--device", "cpu", "--distributed-executor-backend", "ray")
    assert line in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"pip install 'pagewire\[ray\]'"):
        configure(
            {"model": "M", "tensor_parallel_size": 2, "device": "cpu", "distributed_executor_backend": "ray"}
        )  # fmt: skip
    with pytest.raises(BadSetting, match="Ray is not installed"):
        stack.check_backend(
            WorkerConfig(tensor_parallel_size=2, distributed_executor_backend="ray")
        )


def test_several_ranks_are_not_one_process() -> None:
    with pytest.raises(BadSetting, match="uni: one process cannot be 2 ranks: use mp"):
        stack.check_backend(
            WorkerConfig(tensor_parallel_size=2, distributed_executor_backend="uni")
        )


def test_a_backend_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("M", "--distributed-executor-backend", "external_launcher")
    assert "'mp', 'ray', 'uni'" in capsys.readouterr().err.replace(
        "mp, ray, uni", "'mp', 'ray', 'uni'"
    )


def test_a_service_alone_says_it_too() -> None:
    """As in a container, where there is no Ray."""
    program = (
        "import importlib.util, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *rest: None if name == 'ray' else find(name, *rest); "
        "from pagewire.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ("worker", "--device=fake", "-tp=2", "--distributed-executor-backend=ray")
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "pagewire worker: --distributed-executor-backend ray: Ray is not installed: pip install 'pagewire[ray]'"
    )


def test_a_ring_goes_through_descriptors_that_were_passed_on() -> None:
    memory = GroupMemory("worker-0", 3)
    place = memory.place(2)
    copies = [os.dup(fd) for fd in place.fds]
    moved = Place.read(place.as_variable()).with_fds(copies)
    assert (moved.group, moved.rank, moved.size, moved.life) == ("worker-0", 2, 3, place.life)
    writer = RingWriter(memory.place(0))
    writer.write(b"record")
    assert RingReader(moved).expect(5) == b"record"
    for fd in copies:
        os.close(fd)
    memory.close()


HERE = planning.HostNode("a", "10.0.0.1", 2, 2)
THERE = planning.HostNode("b", "10.0.0.2", 2, 2)


class RemoteMethods:
    """An actor whose methods answer at once, by their names."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, SimpleNamespace(remote=lambda *_, answer=answer: answer))


def got(reference: Any) -> Any:
    """As ray.get of what RemoteMethods gives."""
    if isinstance(reference, list):
        return [got(each) for each in reference]
    if isinstance(reference, Exception):
        raise reference
    return reference


def test_a_host_without_pagewire_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "ray", SimpleNamespace(get=got))
    died = RuntimeError(
        "The actor died because of an error\n  in its creation\nNo module 'pagewire'"
    )
    actors = [RemoteMethods(devices=[]), RemoteMethods(devices=died)]
    line = (
        r"could not start a rank on 10\.0\.0\.2 \(No module 'pagewire'\): install the same version"
    )
    with pytest.raises(NotPlaced, match=line):
        placement._check_hosts(planning.Plan((HERE, THERE)), actors)


def test_a_rank_sees_the_gpus_of_its_host_s_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "ray", SimpleNamespace(get=got))
    actors = [RemoteMethods(devices=[name]) for name in ("3", "1", "0", "1")]
    plan = planning.Plan((HERE, HERE, THERE, THERE))
    assert placement._devices(actors, plan) == ["3,1", "3,1", "0,1", "0,1"]


def test_all_ranks_see_the_gpus_of_all_in_the_order_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray decides which; the actors are told the path of their proxy and all of the GPUs."""
    ran: list[tuple[str, str | None]] = []

    class Actor:
        def __init__(self, gpu: str) -> None:
            self.devices = SimpleNamespace(remote=lambda: [gpu])
            self.run = SimpleNamespace(remote=lambda *arguments: ran.append(arguments))

    class Cluster:
        def nodes(self) -> list[Any]:
            resources = {"GPU": 4.0, "node:10.0.0.1": 1.0}
            return [
                {"NodeID": "a", "Alive": True, "NodeManagerAddress": "h", "Resources": resources}
            ]

        def get_runtime_context(self) -> Any:
            return SimpleNamespace(get_node_id=lambda: "a")

        def init(self, **options: Any) -> None:
            assert options["namespace"] == "pagewire"

        def get(self, references: Any) -> Any:
            return references

        def remote(self, actor_class: Any) -> Any:
            return SimpleNamespace(options=self._options)

        def _options(self, **options: Any) -> Any:
            assert options["num_gpus"] == 1 and options["num_cpus"] == 0
            rank = options["scheduling_strategy"].placement_group_bundle_index
            return SimpleNamespace(remote=lambda: Actor(["3", "GPU-1f2e"][rank]))

    reserved: list[Any] = []

    def reserve(each: Any, **options: Any) -> Any:
        reserved.append(each)
        return SimpleNamespace(wait=lambda timeout_s: True)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(placement, "ray", Cluster())
    monkeypatch.setattr(placement, "placement_group", reserve)
    monkeypatch.setattr(placement, "available_resources_per_node", dict)
    placement.place(placement.Request("worker-0", "life", "cuda", ["/a", "/b"]))
    assert reserved == [[{"GPU": 1.0, "node:10.0.0.1": 0.001}] * 2]
    assert ran == [("/a", "3,GPU-1f2e"), ("/b", "3,GPU-1f2e")]
