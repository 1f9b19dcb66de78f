"""Pagewire: LLM inference from one host.

Importing this package loads neither torch nor the services; `LLM` and `SamplingParams` come in on first use.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .llm import LLM
    from .outputs import CompletionOutput, Logprob, RequestOutput
    from .params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "__version__"]
_HOMES = {"LLM": "llm", "SamplingParams": "params", "RequestOutput": "outputs", "CompletionOutput": "outputs", "Logprob": "outputs"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
