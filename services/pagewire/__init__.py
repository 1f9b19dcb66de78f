"""Pagewire: LLM inference from one host.

Importing this package loads neither torch nor the services; `LLM` and `SamplingParams` come in on first use.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .llm import LLM
    from .outputs import BeamSearchOutput, CompletionOutput, Logprob, RequestOutput
    from .params import BeamSearchParams, SamplingParams
    from .prompts import TextPrompt, TokensPrompt

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]
_HOMES = {
    "LLM": "llm",
    "SamplingParams": "params",
    "BeamSearchParams": "params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "BeamSearchOutput": "outputs",
    "Logprob": "outputs",
    "TextPrompt": "prompts",
    "TokensPrompt": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
