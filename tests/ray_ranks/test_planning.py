"""On which nodes of Ray's cluster ranks go, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pagewire.launch.ray_ranks import planning
from pagewire.launch.ray_ranks.planning import HostNode, Needs, NotPlaced
from pagewire.process.group import Place
from pagewire.process.hosts import HOSTS_VARIABLE, Hosts
from pagewire.worker import communicators
from pagewire.worker.load.rank_agreement import ALONE
from pagewire_kernels import cuda_communicator
from torch.distributed import HashStore

GPU = Needs(gpus=1, cpus=0)
CPU = Needs(gpus=0, cpus=1)


def nodes(*rooms: int, free: tuple[int, ...] | None = None) -> list[HostNode]:
    return [
        HostNode(f"id{number}", f"10.0.0.{number + 1}", room, (free or rooms)[number])
        for number, room in enumerate(rooms)
    ]


def test_this_machine_s_node_comes_first_and_dead_ones_not_at_all() -> None:
    listed: list[dict[str, Any]] = [
        {"NodeID": "a", "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"GPU": 8.0}},
        {"NodeID": "b", "Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": {"GPU": 2.0}},
        {"NodeID": "c", "Alive": False, "NodeManagerAddress": "10.0.0.3", "Resources": {}},
        {"NodeID": "d", "Alive": True, "NodeManagerAddress": "10.0.0.4", "Resources": {"CPU": 9.0}},
    ]
    free = {"a": {"GPU": 3.0}, "b": {"CPU": 1.0}}
    assert planning.host_nodes(listed, free, "b", GPU) == [
        HostNode("b", "10.0.0.2", 2, 0),
        HostNode("a", "10.0.0.1", 8, 3),
        HostNode("d", "10.0.0.4", 0, 0),
    ]


def test_the_resource_that_a_node_alone_has() -> None:
    listed = [
        {"NodeID": "a", "Resources": {"CPU": 8.0, "node:10.0.0.2": 1.0}},
        {
            "NodeID": "b",
            "Resources": {"node:__internal_head__": 1.0, "GPU": 2.0, "node:10.0.0.1": 1.0},
        },
    ]
    node = planning.own_resource(listed, "b")
    assert node == "node:10.0.0.1"
    assert planning.bundles_here(2, GPU, node) == [{"GPU": 1.0, "node:10.0.0.1": 0.001}] * 2


@pytest.mark.parametrize(
    ("rooms", "free", "ranks", "stage_size", "expected"),
    [
        ((8, 8), None, 8, 8, (0,) * 8),
        ((8, 8), (0, 8), 8, 4, (0,) * 8),  # this machine has enough in all: it is waited for
        ((4, 4), None, 8, 4, (0,) * 4 + (1,) * 4),
        ((6, 8), None, 8, 4, (0,) * 4 + (1,) * 4),  # no stage on two nodes
        ((6, 8), None, 12, 4, (0,) * 4 + (1,) * 8),
        ((4, 8, 4), None, 16, 8, (0,) * 4 + (1,) * 8 + (2,) * 4),
        ((1, 3), None, 4, 2, (0, 1, 1, 1)),
        ((2, 8), None, 8, 8, (0,) * 2 + (1,) * 6),
        ((1, 1, 1), None, 3, 1, (0, 1, 2)),
        ((2, 4, 4), (2, 0, 4), 4, 2, (0, 0, 2, 2)),  # by what is free
        ((2, 2, 4), (0, 0, 0), 4, 2, (0, 0, 1, 1)),  # what the last life has not given back
    ],
)
def test_ranks_of_a_node_follow_each_other_and_stages_stay_whole(
    rooms: tuple[int, ...],
    free: tuple[int, ...] | None,
    ranks: int,
    stage_size: int,
    expected: tuple[int, ...],
) -> None:
    there = nodes(*rooms, free=free)
    plan = planning.plan(there, ranks, stage_size, GPU)
    assert plan.nodes == tuple(there[number] for number in expected)
    assert plan.spans_hosts == (len(set(expected)) > 1)
    order = sorted(set(expected))
    assert plan.numbers == tuple(order.index(number) for number in expected)
    assert plan.bundles(GPU) == [{"GPU": 1.0}] * ranks
    assert plan.selectors() == [{"ray.io/node-id": f"id{number}"} for number in expected]


def test_a_stage_on_several_hosts_is_one_line() -> None:
    assert planning.plan(nodes(4, 4), 8, 4, GPU).warning(4) == ""
    assert planning.plan(nodes(4, 4), 8, 8, GPU).warning(8) == (
        "the ranks of the model are on several hosts (10.0.0.1, 10.0.0.2): each layer waits for the network twice; "
        "a --tensor-parallel-size that fits on one host and --pipeline-parallel-size over hosts is faster"
    )
    line = planning.plan(nodes(1, 3), 4, 2, GPU).warning(2)
    assert line.startswith("the ranks of stage 0 are on several hosts (10.0.0.1, 10.0.0.2): ")


@pytest.mark.parametrize(
    ("rooms", "needs", "line"),
    [
        (
            (3,),
            GPU,
            "8 ranks need 8 GPU, and the only node of Ray's cluster, this machine, has 3: use fewer ranks, "
            "`ray start` with --num-gpus 8, or add hosts with `ray start --address`",
        ),
        (
            (4, 2, 1),
            CPU,
            "8 ranks need 8 CPU, and the 3 nodes of Ray's cluster have 7: this machine 4, 10.0.0.2 2, 10.0.0.3 1: "
            "use fewer ranks, or add hosts with `ray start --address`",
        ),
        (
            (0, 8),
            GPU,
            "8 ranks need 8 GPU, one of them on this machine, whose Ray node has none (others: 10.0.0.2 8): run this "
            "command on one of those",
        ),
    ],
)
def test_too_little_is_refused_with_the_numbers(
    rooms: tuple[int, ...], needs: Needs, line: str
) -> None:
    with pytest.raises(NotPlaced) as refusal:
        planning.plan(nodes(*rooms), 8, 4, needs)
    assert str(refusal.value) == f"--distributed-executor-backend ray: {line}"


HOSTS = Hosts((0, 0, 1, 1, 1, 2), "10.0.0.2", "10.0.0.1", 4711)


def test_hosts_go_through_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOSTS_VARIABLE, HOSTS.as_variable())
    assert Hosts.inherited() == HOSTS
    assert Hosts.inherited() is None


def test_a_rank_takes_a_gpu_of_its_host_by_its_number_there() -> None:
    places = [Place("worker-0", rank, 6, "life", 0, (), ()) for rank in range(6)]
    assert [communicators.gpu_of(place, HOSTS) for place in places] == [
        (0, 2),
        (1, 2),
        (0, 3),
        (1, 3),
        (2, 3),
        (0, 1),
    ]
    assert [communicators.gpu_of(place, None) for place in places] == [(n, 6) for n in range(6)]


def test_ranks_connect_by_their_hosts_addresses_and_divide_what_a_host_has() -> None:
    """Cores, memory and caches are divided among the ranks of a host, not all."""
    store = HashStore()

    def connect(rank: int) -> tuple[tuple[int, int], list[float]]:
        hosts = Hosts((0, 0, 1), f"127.0.0.{1 + (rank == 2)}", "127.0.0.1", 1)
        place = Place("worker-0", rank, 3, "life", 0, (), ())
        ranks = communicators.connect_ranks(store, place, "cpu", 3, 60.0, hosts)
        return ranks.local, ranks.host.all_gather(torch.full((1,), float(rank)), 0).tolist()

    with ThreadPoolExecutor(3) as pool:
        connected = list(pool.map(connect, range(3)))
    assert [local for local, _ in connected] == [(0, 2), (1, 2), (0, 1)]
    assert all(gathered == [0.0, 1.0, 2.0] for _, gathered in connected)
    assert ALONE.local == (0, 1)


def test_memory_is_shared_by_gpus_of_one_host_alone() -> None:
    assert communicators.share_memory(None, range(6))
    assert communicators.share_memory(HOSTS, range(2))
    assert communicators.share_memory(HOSTS, range(2, 4))
    assert not communicators.share_memory(HOSTS, range(4, 6))
    assert not communicators.share_memory(HOSTS, range(6))


def test_between_hosts_nccl_takes_all_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetric memory is not even tried there."""
    made: list[str] = []
    for name in ("NcclCommunicator", "connect"):
        monkeypatch.setattr(cuda_communicator, name, lambda *_, name=name: made.append(name))
    gpu = torch.device("cuda", 0)
    communicators._on_gpu(HashStore(), 0, 2, gpu, communicators.share_memory(HOSTS, range(2)))
    communicators._on_gpu(HashStore(), 0, 2, gpu, communicators.share_memory(HOSTS, range(4, 6)))
    assert made == ["connect", "NcclCommunicator"]
