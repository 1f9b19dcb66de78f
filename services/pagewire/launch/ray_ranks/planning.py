"""On which nodes of Ray's cluster the ranks of a group go. It decides, and asks nobody.

All go to this machine's node where that has enough in all. Otherwise they are dealt out, this node
first: the ranks of one node follow each other, and as far as possible a node gets whole pipeline
stages, since the ranks of a stage wait for each other in every layer.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...worker.device import driver

NODE: Final = "node:"
HEAD: Final = "node:__internal_head__"
LEAST_OF_NODE: Final = 0.001
"""Of a node's own resource, of which each has 1: enough to be placed there."""
NODE_LABEL: Final = "ray.io/node-id"
"""Which every node of Ray's has."""


class NotPlaced(ValueError):
    """Ray cannot place the ranks; the message says why and what to do."""


@dataclass(frozen=True)
class Needs:
    """Ray's resources for one rank."""

    gpus: int
    cpus: int

    @property
    def resource(self) -> str:
        """The name of the one that ranks are counted by."""
        return "GPU" if self.gpus else "CPU"

    @property
    def each(self) -> int:
        """How much of it a rank needs."""
        return self.gpus or self.cpus

    def of(self, ranks: int) -> str:
        """What so many ranks need, in words."""
        return f"{ranks * self.each} {self.resource}"


@dataclass(frozen=True)
class HostNode:
    """A node of the cluster. address: by which Ray knows it. total, free: how many ranks it has
    room for, whoever uses it, and at present."""

    node_id: str
    address: str
    total: int
    free: int


@dataclass(frozen=True)
class Plan:
    """nodes: that of each rank."""

    nodes: tuple[HostNode, ...]

    @property
    def spans_hosts(self) -> bool:
        """Whether ranks are on other nodes than rank 0."""
        return len(set(self.numbers)) > 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each rank's node, in the order of the ranks."""
        order = list(dict.fromkeys(node.node_id for node in self.nodes))
        return tuple(order.index(node.node_id) for node in self.nodes)

    def bundles(self, needs: Needs) -> list[dict[str, float]]:
        """Of the placement group, one for each rank."""
        return [{needs.resource: float(needs.each)} for _ in self.nodes]

    def selectors(self) -> list[dict[str, str]]:
        """Which node each bundle is for."""
        return [{NODE_LABEL: node.node_id} for node in self.nodes]

    def warning(self, stage_size: int) -> str:
        """A line where ranks of one stage of `stage_size` are on several hosts; else empty."""
        stages = [
            self.nodes[first : first + stage_size]
            for first in range(0, len(self.nodes), stage_size)
        ]
        torn = [number for number, stage in enumerate(stages) if len(set(stage)) > 1]
        if not torn:
            return ""
        which = f"stage {', '.join(map(str, torn))}" if len(stages) > 1 else "the model"
        hosts = ", ".join(dict.fromkeys(node.address for node in self.nodes))
        return (
            f"the ranks of {which} are on several hosts ({hosts}): each layer waits for the "
            "network twice; a --tensor-parallel-size that fits on one host and "
            "--pipeline-parallel-size over hosts is faster"
        )


def needs_of(device: str) -> Needs:
    """A GPU for each rank, or a CPU where the model does not run on GPUs. device: the flag."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in driver.HIDDEN
    on_gpus = device == "cuda" or (device == "auto" and driver.has_device() and not hidden)
    return Needs(gpus=1, cpus=0) if on_gpus else Needs(gpus=0, cpus=1)


def bundles_here(ranks: int, needs: Needs, node: str) -> list[dict[str, float]]:
    """Of a placement group on one node, a bundle for each rank. node: the node's own resource."""
    return [{needs.resource: float(needs.each), node: LEAST_OF_NODE} for _ in range(ranks)]


def own_resource(nodes: Sequence[Mapping[str, Any]], node_id: str) -> str:
    """The name of the resource that the node `node_id` alone has. nodes: as ray.nodes() has
    them."""
    resources = next(node["Resources"] for node in nodes if node["NodeID"] == node_id)
    return next(name for name in resources if name.startswith(NODE) and name != HEAD)


def host_nodes(
    nodes: Sequence[Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]],
    own_id: str,
    needs: Needs,
) -> list[HostNode]:
    """The nodes that live, this machine's first, then those with most room. nodes: as ray.nodes()
    has them; free: by node id, as available_resources_per_node() has it."""

    def room(resources: Mapping[str, float]) -> int:
        return int(resources.get(needs.resource, 0) // needs.each)

    living = [
        HostNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            room(node["Resources"]),
            room(free.get(node["NodeID"], {})),
        )
        for node in nodes
        if node["Alive"]
    ]
    return sorted(living, key=lambda node: (node.node_id != own_id, -node.total, node.node_id))


def plan(nodes: Sequence[HostNode], ranks: int, stage_size: int, needs: Needs) -> Plan:
    """Where the ranks go, by what is free, or where that is too little by what there is in all.
    nodes: this machine's first. Raises NotPlaced where there is too little in all."""
    if nodes[0].total >= ranks:
        return Plan((nodes[0],) * ranks)
    if nodes[0].total < 1 or sum(node.total for node in nodes) < ranks:
        raise NotPlaced(_too_little(nodes, ranks, needs))
    free = [node.free for node in nodes]
    rooms = free if free[0] and sum(free) >= ranks else [node.total for node in nodes]
    shares = _whole_stages(rooms, ranks, stage_size) or _any_ranks(rooms, ranks)
    return Plan(
        tuple(node for node, share in zip(nodes, shares, strict=True) for _ in range(share))
    )


def _whole_stages(rooms: Sequence[int], ranks: int, stage_size: int) -> list[int]:
    """How many ranks each node gets, where no stage has to be on several; else nothing."""
    shares: list[int] = []
    for room in rooms:
        stages = min(room, ranks - sum(shares)) // stage_size
        shares.append(stages * stage_size)
    return shares if shares[0] and sum(shares) == ranks else []


def _any_ranks(rooms: Sequence[int], ranks: int) -> list[int]:
    """The same of nodes that are filled one after the other."""
    shares: list[int] = []
    for room in rooms:
        shares.append(min(room, ranks - sum(shares)))
    return shares


def _too_little(nodes: Sequence[HostNode], ranks: int, needs: Needs) -> str:
    start = f"--distributed-executor-backend ray: {ranks} ranks need {needs.of(ranks)}"
    flag = f"--num-{needs.resource.lower()}s"
    if len(nodes) == 1:
        return (
            f"{start}, and the only node of Ray's cluster, this machine, has {nodes[0].total}: use "
            f"fewer ranks, `ray start` with {flag} {ranks * needs.each}, or add hosts with `ray "
            "start --address`"
        )
    each = ", ".join(f"{node.address} {node.total}" for node in nodes[1:])
    total = sum(node.total for node in nodes)
    if total >= ranks:
        return (
            f"{start}, one of them on this machine, whose Ray node has none (others: {each}): run "
            "this command on one of those"
        )
    return (
        f"{start}, and the {len(nodes)} nodes of Ray's cluster have {total}: this machine "
        f"{nodes[0].total}, {each}: use fewer ranks, or add hosts with `ray start --address`"
    )
