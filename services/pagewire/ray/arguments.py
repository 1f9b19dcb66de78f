"""The arguments of the application: every flag of `pagewire serve`, and Ray Serve's options of a
deployment. Starts nothing."""

import argparse
import difflib
import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import ray
import yaml
from ray import serve

from ..cli import Parser
from ..launch import flags, stack
from ..launch.stack import StackConfig

log = logging.getLogger("ray.serve")

SOURCE: Final = "pagewire.ray"
INGRESS: Final = "ingress"
"""The argument with the options of the ingress deployment."""
OPTIONS: Final = frozenset(inspect.signature(serve.deployment).parameters) - {
    "_func_or_class",
    "name",
    "version",
    "user_config",
}
"""What Ray Serve lets an application say of a deployment."""
RAYS_OWN: Final = {
    **dict.fromkeys(
        ("host", "port"), "Ray's proxies listen; set host and port in Ray Serve's http_options"
    ),
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"),
        "Ray's proxies listen; set ssl_keyfile and ssl_certfile in Ray Serve's http_options",
    ),
    "shutdown_timeout": "Ray ends replicas; set graceful_shutdown_timeout_s",
    "shutdown_delay": "Ray ends replicas; set graceful_shutdown_timeout_s",
    "run_dir": "each replica has a directory of its own",
    "config": "give the file's settings as arguments",
}
"""Flags of `pagewire serve` for what Ray Serve does here."""
GRACEFUL_SHUTDOWN_S: Final = 120.0
"""Running answers may take so long when a replica is ended; the same as in the compose files."""


class ApplicationParser(Parser):
    """Refuses by ValueError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ").removeprefix(f"{SOURCE}: ")
        raise ValueError(f"{SOURCE}: {text} (`pagewire serve --help` lists the flags)")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise ValueError(f"{SOURCE}: {(message or '').strip()}")


@dataclass(frozen=True)
class Plan:
    """How the application is deployed. `stack_flags`: those of `pagewire serve` for each replica;
    the options are those of `serve.deployment`."""

    stack_flags: list[str]
    max_body_bytes: int
    stack_options: dict[str, Any]
    ingress_options: dict[str, Any]


def plan_of(arguments: Mapping[str, Any]) -> Plan:
    """Values may be texts, as `serve run` has them. Raises ValueError with one line for an argument
    that is neither a flag nor an option, or has a bad value."""
    parser = new_parser()
    settings = {str(name).replace("-", "_"): value for name, value in arguments.items()}
    # All requests of a stack come through one process of Ray, to which one frontend is more than
    # equal.
    settings.setdefault("num_frontends", 1)
    ingress_options = _mapping(INGRESS, settings.pop(INGRESS, None))
    options = {name: _value(settings.pop(name)) for name in OPTIONS & settings.keys()}
    _check_names(parser, settings)
    stack_flags = flags.from_mapping(parser, SOURCE, settings)
    config = parse(parser, stack_flags, runs_here=False)
    assert config.frontend is not None
    if config.worker.distributed_executor_backend == "ray":
        raise ValueError(
            f"{SOURCE}: distributed_executor_backend=ray: a replica has its GPUs from Ray already, "
            "and starts its ranks on them by itself (mp)"
        )
    return Plan(
        stack_flags,
        config.frontend.max_body_mb << 20,
        _stack_options(config, options),
        _ingress_options(ingress_options, options),
    )


def new_parser() -> ApplicationParser:
    """A parser for the flags of a replica's stack."""
    parser = flags.new("serve", "", parser_class=ApplicationParser)
    assert isinstance(parser, ApplicationParser)
    return parser


def parse(
    parser: argparse.ArgumentParser, stack_flags: list[str], runs_here: bool = True
) -> StackConfig:
    """The settings of one replica's stack. Raises ValueError with one line. `runs_here`: on this
    node."""
    return flags.parse(parser, stack_flags, log.warning, runs_here)[0]


def _check_names(parser: argparse.ArgumentParser, settings: Mapping[str, Any]) -> None:
    flag_names = {action.dest for action in parser._actions}
    accepted = {word[2:].replace("-", "_") for word in parser._option_string_actions}
    for name in settings:
        if name in RAYS_OWN:
            raise ValueError(f"{SOURCE}: {name} has no effect here: {RAYS_OWN[name]}")
        if name not in accepted:
            close = difflib.get_close_matches(name, {*flag_names, *OPTIONS, INGRESS}, 1, 0.75)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"{SOURCE}: {name} is neither a flag of `pagewire serve` nor an option of a Ray Serve deployment{hint}"
            )


def _value(value: Any) -> Any:
    """Of an option: a number, mapping or list where the command line has its text."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(f"{SOURCE}: {value}: {' '.join(str(error).split())}") from None


def _mapping(name: str, value: Any) -> dict[str, Any]:
    value = {} if value is None else _value(value)
    if not isinstance(value, dict):
        raise ValueError(f"{SOURCE}: {name} is a mapping, not a {type(value).__name__}")
    return dict(value)


def _stack_options(config: StackConfig, options: dict[str, Any]) -> dict[str, Any]:
    running = config.scheduler.num_seqs() * config.num_workers
    # Up to twice what a stack computes at a time, so that its scheduler has a choice. The rest
    # waits in the ingress, from where a replica that has just started gets its share.
    options = {
        "max_ongoing_requests": 2 * running,
        "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_S,
        **options,
    }
    actor_options = _mapping("ray_actor_options", options.get("ray_actor_options"))
    options["ray_actor_options"] = {"num_gpus": gpus_of(config), **actor_options}
    if options.get("autoscaling_config"):
        autoscaling = _mapping("autoscaling_config", options["autoscaling_config"])
        options["autoscaling_config"] = {"target_ongoing_requests": running, **autoscaling}
    return options


def _ingress_options(ingress: dict[str, Any], stacks: dict[str, Any]) -> dict[str, Any]:
    """As many ingress replicas as stacks, unless `ingress` says how many. Like Ray's proxies they
    reserve no core: on a small machine there would be none left for them."""
    unknown = ingress.keys() - OPTIONS
    if unknown:
        raise ValueError(
            f"{SOURCE}: {INGRESS}: {sorted(unknown)[0]} is no option of a Ray Serve deployment"
        )
    defaults: dict[str, Any] = {
        "max_ongoing_requests": 65536,
        "graceful_shutdown_timeout_s": stacks.get(
            "graceful_shutdown_timeout_s", GRACEFUL_SHUTDOWN_S
        ),
    }
    if not ingress.keys() & {"num_replicas", "autoscaling_config"}:
        defaults["num_replicas"] = _most_replicas(stacks)
    actor_options = _mapping("ray_actor_options", ingress.get("ray_actor_options"))
    return {**defaults, **ingress, "ray_actor_options": {"num_cpus": 0, **actor_options}}


def _most_replicas(stacks: dict[str, Any]) -> int:
    count = stacks.get("num_replicas") or 1
    autoscaling = stacks.get("autoscaling_config")
    if isinstance(autoscaling, dict):
        count = autoscaling.get("max_replicas", 1)
    return count if isinstance(count, int) else 1


def gpus_of(config: StackConfig) -> int:
    """How many GPUs a replica needs for its workers: one for each rank of a group, and for each
    worker that is alone, of which several may share one."""
    device = config.worker.device
    if device == "auto":
        device = "cuda" if _cluster_has_gpus() else "cpu"
    if device != "cuda":
        return 0
    services = stack.model_services(config, config.model)
    workers = [service for service in services if service.kind == "worker"]
    ranks = [service for service in workers if service.group]
    workers_per_gpu = int(1 / config.worker.gpu_memory_utilization + 1e-6)
    return len(ranks) + math.ceil((len(workers) - len(ranks)) / workers_per_gpu)


def _cluster_has_gpus() -> bool:
    """Whether the cluster has GPUs; before this program has joined it, whether this machine
    has."""
    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    return stack.has_gpu()
