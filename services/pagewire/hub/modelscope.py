"""Models from ModelScope instead of the Hugging Face hub, where the environment asks for it. Knows
nothing but ids and directories.

The modelscope package is imported only then. It has a cache of its own, which works without the
network.
"""

import os
from pathlib import Path
from typing import Any

VARIABLES = ("PAGEWIRE_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
YES, NO = ("true", "1", "yes", "on"), ("", "false", "0", "no", "off")


class Failed(ValueError):
    """The model cannot be found or downloaded; the message says why and what to do."""


def wanted() -> bool:
    """Whether the environment asks for ModelScope. Raises Failed for a value that is neither yes nor
    no."""
    for name in VARIABLES:
        if name in os.environ:
            value = os.environ[name]
            if value.lower() not in YES + NO:
                raise Failed(f"{name}={value}: True or False is needed")
            return value.lower() in YES
    return False


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
    except Exception as error:
        # For a model that is not in its cache, the package raises no particular type.
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
