"""Has Ray place and start the ranks of a group as actors. `python -m
pagewire.launch.ray_ranks.placement` is a driver of the cluster for one life of a group, in Ray's
sense: what it has reserved and started ends with it. It is a process of its own, so that signals
for the proxy of rank 0, its parent, do not reach the cluster that it may have started.

The placement group is one node's, this machine's, where that has enough in all; else it is dealt
out over nodes (`planning.py`), and the proxies of ranks elsewhere are told to listen for them.
"""

import logging
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any, Final

import msgspec
import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...process import last_words, logs
from ...process.errors import EXPECTED, error_line
from ...process.hosts import Hosts
from . import child, handshake, planning, remote_child
from .planning import Needs, NotPlaced, Plan
from .remote_child import Assignment

log = logging.getLogger("pagewire.ray_ranks")
NAMESPACE: Final = "pagewire"
PLACEMENT_S: Final = 60.0
"""How long a group waits for resources that others hold: those of its last life, for example, which
Ray has not yet taken back."""
AFTER_PROXY_S: Final = 1.0
"""How long the proxy of a rank whose actor is lost has for its own words."""
OBJECT_STORE_BYTES: Final = 100 << 20
"""Of a cluster that is started for the group alone: nothing large goes through it."""
SECRET_BYTES: Final = 32


class Request(msgspec.Struct, frozen=True):
    """One life of a group. device, log_format: the worker's flags. paths: where the proxy of each
    rank listens. stage_size: ranks of a pipeline stage."""

    group: str
    life: str
    device: str
    paths: list[str]
    stage_size: int = 1
    log_format: str = "text"


class RankActor:
    """The class of an actor: one rank."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def devices(self) -> list[str]:
        """The GPUs that Ray gave to it, by the names of CUDA_VISIBLE_DEVICES."""
        return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])

    def listen(self, address: str) -> int:
        """The port at which rank 0 will be found by the others, at `address` of this host."""
        self._listener = handshake.listen(address)
        return self._listener.getsockname()[1]

    def run(self, path: str, devices: str | None, hosts: Hosts | None = None) -> None:
        """As child.run_rank."""
        child.run_rank(path, devices, hosts, self._listener)

    def run_remote(self, assignment: Assignment) -> None:
        """As remote_child.run_rank."""
        remote_child.run_rank(assignment)


def main() -> int:
    """The first line of the input is a Request. Until the input ends, and with it the proxy. 1,
    with a line that says why, when the ranks cannot be placed or one of the actors fails."""
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
    logs.set_up("info", request.log_format, request.group)
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
    needs = planning.needs_of(request.device)
    _join_cluster(ranks)
    nodes, own_id = ray.nodes(), ray.get_runtime_context().get_node_id()
    hosts = planning.host_nodes(nodes, available_resources_per_node(), own_id, needs)
    plan = planning.plan(hosts, ranks, request.stage_size, needs)
    name = f"{request.group}-{request.life}"
    if plan.spans_hosts:
        if warning := plan.warning(request.stage_size):
            log.warning("%s", warning)
        reserved = placement_group(
            plan.bundles(needs),
            strategy="PACK",
            name=name,
            bundle_label_selector=plan.selectors(),
        )
    else:
        node = planning.own_resource(nodes, own_id)
        here = planning.bundles_here(ranks, needs, node)
        reserved = placement_group(here, strategy="STRICT_PACK", name=name)
    _wait(reserved, plan, needs)
    actors = [_actor(request, rank, needs, reserved) for rank in range(ranks)]
    if plan.spans_hosts:
        _check_hosts(plan, actors)
    devices = _devices(actors, plan) if needs.gpus else [None] * ranks
    if plan.spans_hosts:
        return _run_on_hosts(request, plan, actors, devices)
    return [
        actor.run.remote(path, names)
        for actor, path, names in zip(actors, request.paths, devices, strict=True)
    ]


def _devices(actors: list[Any], plan: Plan) -> list[str]:
    """What each rank sees: the GPUs of all ranks on its host, in the order of the ranks."""
    each = ray.get([actor.devices.remote() for actor in actors])
    by_node: dict[str, list[str]] = {}
    for node, names in zip(plan.nodes, each, strict=True):
        by_node.setdefault(node.node_id, []).extend(names)
    return [",".join(by_node[node.node_id]) for node in plan.nodes]


def _check_hosts(plan: Plan, actors: list[Any]) -> None:
    """Raises NotPlaced for a host on which Pagewire cannot be imported."""
    for node, actor in zip(plan.nodes, actors, strict=True):
        try:
            ray.get(actor.devices.remote())
        except Exception as error:  # of many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise NotPlaced(
                f"Ray could not start a rank on {node.address} ({reason[-1][:200]}): install the "
                "same version of Pagewire on all hosts, for the Python that Ray runs there"
            ) from None


def _run_on_hosts(request: Request, plan: Plan, actors: list[Any], devices: list[Any]) -> list[Any]:
    """The references to each actor's `run`, as of `place`."""
    first = plan.nodes[0]
    port: Any = ray.get(actors[0].listen.remote(first.address))
    runs: list[Any] = []
    for rank, (node, actor) in enumerate(zip(plan.nodes, actors, strict=True)):
        hosts = Hosts(plan.numbers, node.address, first.address, port)
        path = request.paths[rank]
        if node == first:
            runs.append(actor.run.remote(path, devices[rank], hosts))
        else:
            secret = secrets.token_bytes(SECRET_BYTES)
            with handshake.listen(first.address) as listener:
                own_port = listener.getsockname()[1]
                handshake.hand_listener(path, listener, secret)
            runs.append(
                actor.run_remote.remote(
                    Assignment(first.address, own_port, secret, devices[rank], hosts)
                )
            )
    return runs


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
            f"RAY_ADDRESS={address}: this machine has to be a node of the cluster, since rank 0 "
            "shares memory with it; give the address of the cluster's head, HOST:6379"
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


def _wait(reserved: Any, plan: Plan, needs: Needs) -> None:
    if not reserved.wait(PLACEMENT_S):
        ranks = len(plan.nodes)
        hosts = ", ".join(dict.fromkeys(node.address for node in plan.nodes))
        where = f"the nodes {hosts} have" if plan.spans_hosts else "this machine has"
        raise NotPlaced(
            f"Ray has not placed {ranks} ranks within {PLACEMENT_S:g} s: they need "
            f"{needs.of(ranks)} at once, and others hold what {where}; `ray status` says who"
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
