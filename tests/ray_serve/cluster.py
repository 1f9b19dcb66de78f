"""A Ray cluster of this machine with Pagewire's application on it, told what to do line by line.

The tests run it as a program, so that neither Ray's threads nor its warnings are in their process.
Each line in is a JSON list, [command, *arguments]; each line out, after OUT, a JSON value.
"""

import json
import os
import sys
import time
from typing import Any

import ray
from pagewire.ray import build_app
from ray import serve
from ray.serve.schema import ReplicaState

OUT = "answer: "
START_ATTEMPTS = 3
NAME = "pagewire"
ACTORS = f"SERVE_REPLICA::{NAME}#Stack#"


def start(directory: str, port: int) -> None:
    """Ray without its dashboard, in `directory`, with room for all replicas of the tests."""
    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(
                num_cpus=16,
                num_gpus=0,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=100 << 20,
                _temp_dir=directory,
                _node_ip_address="127.0.0.1",
            )
            break
        except Exception as error:
            # Ray gives its own processes 30 s, which a machine that is busy otherwise may not have.
            if not attempts_left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    serve.start(http_options={"host": "127.0.0.1", "port": port})


def deploy(arguments: dict[str, Any], prefix: str) -> None:
    """Deploy the application, or change it; returns when as many replicas run as were asked for."""
    serve.run(build_app(arguments), name=NAME, route_prefix=prefix)
    while running() != {"RUNNING": arguments["num_replicas"]}:
        time.sleep(0.1)


def scale(arguments: dict[str, Any], prefix: str) -> None:
    """As `deploy`, without waiting."""
    serve.run(build_app(arguments), name=NAME, route_prefix=prefix, blocking=False)


def running() -> dict[str, int]:
    """How many replicas of the stacks there are, by state."""
    states = serve.status().applications[NAME].deployments["Stack"].replica_states
    return {ReplicaState(state).value: count for state, count in states.items() if count}


def ongoing() -> list[int]:
    """The requests that each replica of the stacks has."""
    return ray.get([actor.get_num_ongoing_requests.remote() for actor in _stacks()])


def pids() -> list[int]:
    """The process of each replica of the stacks."""
    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in _stacks()])


def delete() -> None:
    """End the application; returns when its last request has ended."""
    serve.delete(NAME)


def _stacks() -> list[Any]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [
        ray.get_actor(actor["name"], actor["namespace"])
        for actor in named
        if actor["name"].startswith(ACTORS)
    ]


COMMANDS = {
    command.__name__: command for command in (start, deploy, scale, running, ongoing, pids, delete)
}


def main() -> None:
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(OUT + json.dumps(COMMANDS[command](*arguments)), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
