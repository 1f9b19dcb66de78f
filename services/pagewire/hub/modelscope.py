"""Models from ModelScope instead of the Hugging Face hub, where the environment asks for it. Knows
nothing but ids and directories.

The modelscope package is imported only then. It has a cache of its own, which works without the
network.
"""

import os
from pathlib import Path
from typing import Any

VARIABLES = ("PAGEWIRE_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
YES = ("true", "1", "yes", "on")
NO = ("false", "0", "no", "off")


class Failed(ValueError):
    """The model cannot be found or downloaded; the message says why and what to do."""


def wanted() -> bool:
    """Whether the environment asks for ModelScope. Raises Failed for a value that is neither yes
    nor no."""
    for name in VARIABLES:
        if value := os.environ.get(name):
            if value.lower() not in YES + NO:
                raise Failed(f"{name}={value}: True or False is needed")
            return value.lower() in YES
    return False


class Repository:
    """The files of `model`, in the cache in `directory` (empty: ModelScope's own) or from its hub.
    Raises Failed without the modelscope package."""

    def __init__(self, model: str, revision: str, directory: str) -> None:
        try:
            from modelscope import snapshot_download  # type: ignore[import-not-found]
        except ImportError:
            name = next(name for name in VARIABLES if os.environ.get(name))
            raise Failed(
                f"{name} is set, but the modelscope package is not installed; `pip install modelscope`"
            ) from None
        self._snapshot_download: Any = snapshot_download
        self._model = model
        options = {"cache_dir": directory or None, "revision": revision or None}
        self._options = {name: value for name, value in options.items() if value is not None}

    def cached(self) -> Path:
        """The directory in the cache, whatever it holds. Raises Failed where there is none."""
        try:
            return Path(
                self._snapshot_download(self._model, local_files_only=True, **self._options)
            )
        except Exception as error:  # for a model that is not there, no particular type
            raise Failed(_reason(error)) from None

    def fetch(self, patterns: list[str], ignored: list[str]) -> Path:
        """The directory, with the files that match `patterns` and not `ignored` downloaded. Raises
        Failed."""
        try:
            return Path(
                self._snapshot_download(
                    self._model, allow_patterns=patterns, ignore_patterns=ignored, **self._options
                )
            )
        except Exception as error:
            raise Failed(_reason(error)) from None


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
