"""The settings of `LLM` from keyword arguments, in a program's words. Starts nothing."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import structs

from ..config import (
    BadSetting,
    ModelConfig,
    RunConfig,
    SchedulerConfig,
    TokenizerConfig,
    WorkerConfig,
    as_number,
    read,
    template_defaults,
)
from ..launch.stack import StackConfig, check_workers, notes
from ..launch.vllm_compat import ALIASES, FOREIGN, Refused, judge_all

STRUCTS = {
    "run": RunConfig,
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "scheduler": SchedulerConfig,
    "worker": WorkerConfig,
}
REPLICAS = ("num_tokenizers", "num_workers")
NAMES = {field.name for kind in STRUCTS.values() for field in structs.fields(kind)} - {
    "run_dir",
    "name",
} | {*REPLICAS}
UNWATCHED = {"max_step_ms": 0.0, "log_level": "warning"}
"""Nobody waits for single tokens here, and a program's error stream is its own."""


def configure(
    settings: dict[str, Any], warn: Callable[[str], None] = lambda _: None
) -> StackConfig:
    """None means the default; `warn` gets a line for each setting of vLLM's that is accepted
    without effect. Raises TypeError for an unknown name, ValueError for a value."""
    settings = {
        ALIASES.get(key, key): value for key, value in settings.items() if value is not None
    }
    if settings.pop("disable_cascade_attn", False):
        settings["enable_cascade"] = False
    if token := settings.pop("hf_token", None):
        os.environ["HF_TOKEN"] = str(token)
    unknown = set(settings) - NAMES - set(FOREIGN)
    if unknown:
        raise TypeError(f"LLM() has no setting {', '.join(sorted(unknown))}")
    try:
        lines = judge_all(settings, NAMES, _as_argument, os.environ)
    except Refused as refusal:
        raise ValueError(f"{_as_argument(refusal.name, refusal.value)}: {refusal}") from None
    for line in lines:
        warn(f"pagewire: {line}")
    settings = {name: value for name, value in settings.items() if name in NAMES}
    counts = {key: settings.pop(key) for key in REPLICAS if key in settings}
    namespace = argparse.Namespace(**{**UNWATCHED, **_normal(settings)})
    try:
        config = check_workers(
            StackConfig(**{name: read(kind, namespace) for name, kind in STRUCTS.items()}, **counts)
        )
        template_defaults(config.tokenizer)
    except BadSetting as error:
        raise ValueError(f"{error.name}={error.value!r}: {error.reason}") from None
    for line in notes(config.worker, _as_argument):
        warn(f"pagewire: {line}")
    return config


def _as_argument(name: str, value: Any) -> str:
    return f"{name}={value!r}"


def _normal(settings: dict[str, Any]) -> dict[str, Any]:
    """Forms that programs use beside the plain ones: a tokenizer, path or dtype as an object, a
    length that means "what fits"."""
    settings = dict(settings)
    for key in ("model", "tokenizer", "download_dir", "chat_template"):
        if key in settings and isinstance(settings[key], os.PathLike):
            settings[key] = os.fspath(settings[key])
    if "tokenizer" in settings and not isinstance(settings["tokenizer"], str):
        settings["tokenizer"] = getattr(
            settings["tokenizer"], "name_or_path", settings["tokenizer"]
        )
    if "dtype" in settings and not isinstance(settings["dtype"], str):
        settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
    variables = settings.get("default_chat_template_kwargs")
    if isinstance(variables, Mapping):
        settings["default_chat_template_kwargs"] = json.dumps(variables)
    length = settings.get("max_model_len")
    if length in (-1, "auto"):
        settings["max_model_len"] = 0
    elif isinstance(length, str) and length[:-1].isdecimal():
        settings["max_model_len"] = as_number(length)
    return settings
