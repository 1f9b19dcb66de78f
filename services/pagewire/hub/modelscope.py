"""Models from ModelScope instead of the Hugging Face hub, where the environment asks for it. Knows
nothing but ids and directories.

The modelscope package is imported only then; it keeps its own cache, which serves without the
network.
"""

import os
from pathlib import Path
from typing import Any

VARIABLES = ("PAGEWIRE_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
YES, NO = ("true", "1", "yes", "on"), ("", "false", "0", "no", "off")


class Failed(ValueError):
    """The model could not be had; the message says why and what to do."""


def wanted() -> bool:
    """Raises Failed for a value that is neither yes nor no."""
    given = next(((name, os.environ[name]) for name in VARIABLES if name in os.environ), ("", ""))
    if given[1].lower() not in YES + NO:
        raise Failed(f"{given[0]}={given[1]}: True or False is needed")
    return given[1].lower() in YES


def snapshot(model: str, revision: str, directory: str, offline: bool) -> Path:
    """The directory with the files of `model`, from the cache in `directory` (empty: ModelScope's
    own) or downloaded. Raises Failed."""
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found]
    except ImportError:
        name = next(name for name in VARIABLES if name in os.environ)
        raise Failed(
            f"{name} is set, but the modelscope package is not installed; `pip install modelscope`"
        ) from None
    options: dict[str, Any] = {"cache_dir": directory or None, "revision": revision or None}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        return Path(snapshot_download(model, local_files_only=True, **options))
    except (
        Exception
    ) as error:  # the package raises what it likes for a model that is not in its cache
        if offline:
            raise Failed(
                f"it is not cached, and HF_HUB_OFFLINE forbids downloading it ({_reason(error)})"
            ) from None
    try:
        return Path(snapshot_download(model, **options))
    except Exception as error:
        raise Failed(_reason(error)) from None


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
