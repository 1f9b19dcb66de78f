"""Has Ray place and start the ranks of a group as actors. `python -m
pagewire.launch.ray_ranks.placement` is a driver of the cluster for one life of a group, in Ray's
sense: what it has reserved and started ends with it. It is a process of its own, so that signals
for the proxy of rank 0, its parent, do not reach the cluster that it may have started.

All ranks are on this host, since they share memory: the placement group is one node's, this one.
"""

import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...process import last_words
from ...process.errors import EXPECTED, error_line
from ...worker.device import driver
from .child import run_rank

NAMESPACE: Final = "pagewire"
PLACEMENT_S: Final = 60.0
"""How long a group waits for resources that others hold: those of its last life, for example, which
Ray has not yet taken back."""
AFTER_PROXY_S: Final = 1.0
"""How long the proxy of a rank whose actor is lost has for its own words."""
OBJECT_STORE_BYTES: Final = 100 << 20
"""Of a cluster that is started for the group alone: nothing large goes through it."""
NODE: Final = "node:"
HEAD: Final = "node:__internal_head__"
LEAST_OF_NODE: Final = 0.001
"""Of a node's own resource, of which each has 1: enough to be placed there."""


class NotPlaced(ValueError):
    """Ray cannot place the ranks; the message says why and what to do."""


@dataclass(frozen=True)
class Needs:
    """Ray's resources for one rank."""

    gpus: int
    cpus: int

    def of(self, ranks: int) -> str:
        """What so many ranks need, in words."""
        name, each = ("GPU", self.gpus) if self.gpus else ("CPU", self.cpus)
        return f"{ranks * each} {name}"


def needs_of(device: str) -> Needs:
    """A GPU for each rank, or a CPU where the model does not run on GPUs. device: the flag."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in driver.HIDDEN
    on_gpus = device == "cuda" or (device == "auto" and driver.has_device() and not hidden)
    return Needs(gpus=1, cpus=0) if on_gpus else Needs(gpus=0, cpus=1)


def bundles(ranks: int, needs: Needs, node: str) -> list[dict[str, float]]:
    """Of the placement group, one for each rank. node: the node's own resource."""
    each = {"GPU": float(needs.gpus)} if needs.gpus else {"CPU": float(needs.cpus)}
    return [{**each, node: LEAST_OF_NODE} for _ in range(ranks)]


def own_node(nodes: list[dict[str, Any]], node_id: str) -> tuple[str, dict[str, float]]:
    """(its own resource, all its resources) of the node `node_id`. nodes: as ray.nodes() has
    them."""
    resources = next(node["Resources"] for node in nodes if node["NodeID"] == node_id)
    return next(name for name in resources if name.startswith(NODE) and name != HEAD), resources


def check_node(resources: dict[str, float], ranks: int, needs: Needs) -> None:
    """Raises NotPlaced for a node that has too little, whoever uses it."""
    name, each = ("GPU", needs.gpus) if needs.gpus else ("CPU", needs.cpus)
    total = int(resources.get(name, 0))
    if total < ranks * each:
        raise NotPlaced(
            f"--distributed-executor-backend ray: {ranks} ranks need {needs.of(ranks)} of this "
            f"machine's Ray node, which has {total}: use fewer ranks, or `ray start` with "
            f"--num-{name.lower()}s {ranks * each}; the ranks of a group are on one host"
        )


class Request(msgspec.Struct, frozen=True):
    """One life of a group. device: the worker's flag. paths: where the proxy of each rank
    listens."""

    group: str
    life: str
    device: str
    paths: list[str]


class RankActor:
    """The class of an actor: one rank."""

    def devices(self) -> list[str]:
        """The GPUs that Ray gave to it, by the names of CUDA_VISIBLE_DEVICES."""
        return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])

    def run(self, path: str, devices: str | None) -> None:
        """As child.run_rank."""
        run_rank(path, devices)


def main() -> int:
    """The first line of the input is a Request. Until the input ends, and with it the proxy. 1,
    with a line that says why, when the ranks cannot be placed or one of the actors fails."""
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
    is_placed = threading.Event()
    ending = threading.Thread(target=_await_end, args=(is_placed,), daemon=True)
    ending.start()
    try:
        runs = place(request)
        is_placed.set()
        threading.Thread(target=_watch, args=(runs, ending), daemon=True).start()
    except Exception as error:  # Ray raises many kinds
        _say_why(error)
        return 1
    ending.join()
    ray.shutdown()
    return 0


def _await_end(is_placed: threading.Event) -> None:
    # not through sys.stdin, whose lock a daemon thread would hold at the end of the interpreter
    while os.read(sys.stdin.fileno(), 4096):
        pass
    if not is_placed.is_set():
        os._exit(0)


def place(request: Request) -> list[Any]:
    """Reserve what all ranks need, and start an actor for each, which is told where the proxy of
    its rank listens. Returns the reference to each actor's `run`. Raises NotPlaced."""
    ranks = len(request.paths)
    needs = needs_of(request.device)
    _join_cluster(ranks)
    node, resources = own_node(ray.nodes(), ray.get_runtime_context().get_node_id())
    check_node(resources, ranks, needs)
    reserved = placement_group(
        bundles(ranks, needs, node), strategy="STRICT_PACK", name=f"{request.group}-{request.life}"
    )
    _wait(reserved, ranks, needs)
    actors = [_actor(request, rank, needs, reserved) for rank in range(ranks)]
    devices = None
    if needs.gpus:
        # A rank sees the GPUs of its whole group, in the order of the ranks.
        each = ray.get([actor.devices.remote() for actor in actors])
        devices = ",".join(name for names in each for name in names)
    return [
        actor.run.remote(path, devices) for actor, path in zip(actors, request.paths, strict=True)
    ]


def _watch(runs: list[Any], ending: threading.Thread) -> None:
    """In a thread: end this process when an actor fails, and so the group, unless it ends
    anyway."""
    try:
        while runs:
            ended, runs = ray.wait(runs, num_returns=1)
            ray.get(ended)
    except Exception as error:  # of many kinds
        time.sleep(AFTER_PROXY_S)
        if ending.is_alive():
            _say_why(error)
            os._exit(1)


def _say_why(error: Exception) -> None:
    cause = getattr(error, "cause", None)  # what an actor raised, without Ray's traceback
    error = cause if isinstance(cause, Exception) else error
    last_words.say("worker", error_line(error, (*EXPECTED, RuntimeError)))


def _join_cluster(ranks: int) -> None:
    """The cluster that RAY_ADDRESS names or `ray start` has started here; without one, one of this
    process's own."""
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise NotPlaced(
            f"RAY_ADDRESS={address}: this machine has to be a node of the cluster, since ranks share "
            "memory with it; give the address of the cluster's head, HOST:6379"
        )
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    try:
        ray.init(
            num_cpus=max(ranks, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            **options,
        )
    except ValueError:
        # Sizes are not for a cluster that there is.
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise NotPlaced(
                f"Ray's cluster {address or 'of this machine'} cannot be reached: {error}"
            ) from None


def _wait(reserved: Any, ranks: int, needs: Needs) -> None:
    if not reserved.wait(PLACEMENT_S):
        raise NotPlaced(
            f"Ray has not placed {ranks} ranks within {PLACEMENT_S:g} s: they need "
            f"{needs.of(ranks)} at once, and others hold what this machine has; `ray status` "
            "says who"
        )


def _actor(request: Request, rank: int, needs: Needs, reserved: Any) -> Any:
    """Not restarted by Ray: whoever started the group does that, for all ranks at once."""
    strategy = PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=rank)
    options = actor_options(request, rank, needs)
    return ray.remote(RankActor).options(scheduling_strategy=strategy, **options).remote()


def actor_options(request: Request, rank: int, needs: Needs) -> dict[str, Any]:
    """Of the actor of `rank`, but for where it is placed."""
    return {
        "name": f"{request.group}.{rank}-{request.life}",
        "num_gpus": needs.gpus,
        "num_cpus": needs.cpus,
        "max_restarts": 0,
    }


if __name__ == "__main__":
    # Actors import this module by its name: what they are given must not be of __main__.
    from pagewire.launch.ray_ranks import placement

    sys.exit(placement.main())
