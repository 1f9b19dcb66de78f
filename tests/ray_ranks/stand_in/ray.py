"""What Pagewire uses of Ray to start ranks, on this machine alone and without a cluster: an actor is
a child process of the driver. One file, which brings Ray's modules with it.

STAND_IN_CPUS and STAND_IN_GPUS say what the node has that is this machine's, STAND_IN_OTHER_CPUS what
another one has, if there is one; actors of the latter start in STAND_IN_OTHER_DIRECTORY, with
STAND_IN_OTHER_VERSION of Pagewire if that is set. STAND_IN_LOG names a file in which calls are noted,
a line each."""

import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NODE_ID = "a1"
OTHER_ID = "b2"
ACTOR = "from ray import actor_main; actor_main()"
OTHER_VERSION = """import os, pagewire.version as version
version.__version__ = os.environ.get("STAND_IN_OTHER_VERSION", version.__version__)"""
_next_gpu = iter(range(64))


class RayActorError(Exception):
    pass


def note(call: str, **details: Any) -> None:
    if path := os.environ.get("STAND_IN_LOG"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"call": call, **details}) + "\n")


def init(**options: Any) -> None:
    if os.environ.get("RAY_ADDRESS") and "num_cpus" in options:
        raise ValueError("When connecting to an existing cluster, num_cpus must not be provided.")
    note("init", sizes=sorted(options.keys() & {"num_cpus", "object_store_memory"}))


def shutdown() -> None:
    note("shutdown")


def nodes() -> list[dict[str, Any]]:
    own = {
        "CPU": float(os.environ.get("STAND_IN_CPUS", "8")),
        "GPU": float(os.environ.get("STAND_IN_GPUS", "0")),
        "node:__internal_head__": 1.0,
        "node:10.0.0.1": 1.0,
    }
    other = {"CPU": float(os.environ.get("STAND_IN_OTHER_CPUS", "0")), "node:10.0.0.2": 1.0}
    return [_node(OTHER_ID, "127.0.0.2", other), _node(NODE_ID, "127.0.0.1", own)]


def _node(node_id: str, address: str, resources: dict[str, float]) -> dict[str, Any]:
    return {
        "NodeID": node_id,
        "Alive": True,
        "NodeManagerAddress": address,
        "Resources": resources,
    }


def available_resources_per_node() -> dict[str, dict[str, float]]:
    return {node["NodeID"]: node["Resources"] for node in nodes()}


def get_runtime_context() -> Any:
    gpus = [name for name in os.environ.get("STAND_IN_OWN_GPUS", "").split(",") if name]
    return SimpleNamespace(get_node_id=lambda: NODE_ID, get_accelerator_ids=lambda: {"GPU": gpus})


def get(references: Any) -> Any:
    if isinstance(references, list):
        return [reference.result() for reference in references]
    return references.result()


def wait(references: list[Any], num_returns: int = 1) -> tuple[list[Any], list[Any]]:
    done = wait_for(references, return_when=FIRST_COMPLETED).done
    return [r for r in references if r in done], [r for r in references if r not in done]


def remote(actor_class: type[Any]) -> Any:
    return SimpleNamespace(
        options=lambda **options: SimpleNamespace(remote=lambda: _Actor(actor_class, options))
    )


class _Actor:
    def __init__(self, actor_class: type[Any], options: dict[str, Any]) -> None:
        strategy = options.pop("scheduling_strategy")
        note("actor", bundle=strategy.index, **options)
        gpus = ",".join(str(next(_next_gpu)) for _ in range(options["num_gpus"]))
        is_elsewhere = strategy.node_id == OTHER_ID
        program = f"{OTHER_VERSION}\n{ACTOR}" if is_elsewhere else ACTOR
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, options["name"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "STAND_IN_OWN_GPUS": gpus},
            cwd=os.environ["STAND_IN_OTHER_DIRECTORY"] if is_elsewhere else None,
        )
        self._lock = threading.Lock()
        self._tell(actor_class)

    def _tell(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin)
        self._process.stdin.flush()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> "Future[Any]":
        future: Future[Any] = Future()

        def call() -> None:
            try:
                with self._lock:
                    self._tell((name, arguments))
                    assert self._process.stdout is not None
                    value = pickle.load(self._process.stdout)
            except (EOFError, OSError):
                value = RayActorError("The actor died unexpectedly before finishing this task.")
            if isinstance(value, Exception):
                future.set_exception(value)
            else:
                future.set_result(value)

        threading.Thread(target=call, daemon=True).start()
        return future


def actor_main() -> None:
    """The process of an actor: calls come as pickles, and it ends with the driver."""
    requests: list[Any] = []
    came = threading.Condition()

    def read() -> None:
        while True:
            try:
                request = pickle.load(sys.stdin.buffer)
            except EOFError:
                os._exit(1)
            with came:
                requests.append(request)
                came.notify()

    actor_class = pickle.load(sys.stdin.buffer)
    actor = actor_class()
    threading.Thread(target=read, daemon=True).start()
    while True:
        with came:
            came.wait_for(lambda: requests)
            name, arguments = requests.pop(0)
        try:
            value = getattr(actor, name)(*arguments)
        except Exception as error:
            value = error
        pickle.dump(value, sys.stdout.buffer)
        sys.stdout.buffer.flush()


class _Reserved:
    def __init__(self, node_ids: list[str]) -> None:
        self.node_ids = node_ids

    def wait(self, timeout_s: float) -> bool:
        return True


def placement_group(
    bundles: list[dict[str, float]],
    bundle_label_selector: list[dict[str, str]] | None = None,
    **options: Any,
) -> Any:
    selectors = bundle_label_selector or [{"ray.io/node-id": NODE_ID} for _ in bundles]
    node_ids = [selector["ray.io/node-id"] for selector in selectors]
    note("placement_group", bundles=bundles, strategy=options["strategy"], nodes=node_ids)
    return _Reserved(node_ids)


class PlacementGroupSchedulingStrategy:
    def __init__(self, reserved: _Reserved, placement_group_bundle_index: int) -> None:
        self.index = placement_group_bundle_index
        self.node_id = reserved.node_ids[placement_group_bundle_index]


def _module(name: str, *contents: Any) -> None:
    module = ModuleType(name)
    for each in contents:
        setattr(module, each.__name__, each)
    sys.modules[name] = module


_module("ray._private")
_module("ray._private.state", available_resources_per_node)
_module("ray.util")
_module("ray.util.placement_group", placement_group)
_module("ray.util.scheduling_strategies", PlacementGroupSchedulingStrategy)
