"""`import pagewire.as_vllm` makes Pagewire answer to the name `vllm` in this program: `from vllm
import LLM, SamplingParams` then works unchanged, in the program and in libraries that it uses.

Only what is named here exists; anything else is an AttributeError or ModuleNotFoundError, as of a
package that lacks it. Nothing heavy is imported before it is asked for.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from .version import __version__

LLM = "offline.llm"
PARAMS = "offline.sampling_params"
OUTPUTS = "offline.outputs"
PROMPTS = "offline.prompts"
_OUTPUTS = {
    "RequestOutput": OUTPUTS,
    "CompletionOutput": OUTPUTS,
    "RequestMetrics": OUTPUTS,
    "Logprob": OUTPUTS,
}
_INPUTS = {"TextPrompt": PROMPTS, "TokensPrompt": PROMPTS}
_BEAMS = {"BeamSearchOutput": OUTPUTS, "BeamSearchSequence": OUTPUTS}
NAMES: dict[str, dict[str, str]] = {
    # module of vLLM: what is in it, and the module here where that lives
    "vllm": {
        "LLM": LLM,
        "SamplingParams": PARAMS,
        "RequestOutput": OUTPUTS,
        "CompletionOutput": OUTPUTS,
        **_INPUTS,
    },
    "vllm.version": {},
    "vllm.outputs": _OUTPUTS,
    "vllm.sequence": {"Logprob": OUTPUTS, "RequestMetrics": OUTPUTS},
    "vllm.logprobs": {"Logprob": OUTPUTS},
    "vllm.inputs": _INPUTS,
    "vllm.sampling_params": {
        "SamplingParams": PARAMS,
        "BeamSearchParams": PARAMS,
        "StructuredOutputsParams": PARAMS,
        "GuidedDecodingParams": PARAMS,
    },
    "vllm.beam_search": _BEAMS,
    "vllm.entrypoints": {},
    "vllm.entrypoints.llm": {"LLM": LLM, "SamplingParams": PARAMS, "BeamSearchParams": PARAMS},
    "vllm.entrypoints.openai": {},
    "vllm.entrypoints.openai.api_server": {"main": "entrypoints.openai.api_server"},
    "vllm.entrypoints.openai.run_batch": {"main": "entrypoints.openai.run_batch"},
}


VLLM_VERSION = "0.26.0"
"""Of vLLM, whose names these are: programs compare it with the version that they need."""


class _Stand(ModuleType):
    """A module whose names are looked up when they are used."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"Pagewire under the name of {name}.")
        self.__version__ = VLLM_VERSION
        self.__pagewire_version__ = __version__
        self.__path__ = []
        self.__all__ = sorted(NAMES[name])

    def __getattr__(self, name: str) -> Any:
        home = NAMES[self.__name__].get(name)
        if home is None:
            raise AttributeError(
                f"module {self.__name__!r}, which is Pagewire here, has no attribute {name!r}"
            )
        return getattr(importlib.import_module(f".{home}", __package__), name)


def install() -> None:
    """Put the modules in place. Does nothing the second time. Raises ImportError when vLLM itself
    is already imported."""
    present = sys.modules.get("vllm")
    if isinstance(present, _Stand):
        return
    if present is not None:
        raise ImportError("vllm itself is already imported; import pagewire.as_vllm before it")
    for name in NAMES:
        module = sys.modules[name] = _Stand(name)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


install()
