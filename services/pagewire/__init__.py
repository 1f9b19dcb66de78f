"""Pagewire: LLM inference from one host.

Importing this package loads neither torch nor the services; `LLM` and `SamplingParams` come in on
first use.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .offline.llm import LLM
    from .offline.outputs import BeamSearchOutput, CompletionOutput, Logprob, RequestOutput
    from .offline.prompts import TextPrompt, TokensPrompt
    from .offline.sampling_params import (
        BeamSearchParams,
        SamplingParams,
        StructuredOutputsParams,
    )

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]
_HOMES = {
    "LLM": "offline.llm",
    "SamplingParams": "offline.sampling_params",
    "BeamSearchParams": "offline.sampling_params",
    "StructuredOutputsParams": "offline.sampling_params",
    "RequestOutput": "offline.outputs",
    "CompletionOutput": "offline.outputs",
    "BeamSearchOutput": "offline.outputs",
    "Logprob": "offline.outputs",
    "TextPrompt": "offline.prompts",
    "TokensPrompt": "offline.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
