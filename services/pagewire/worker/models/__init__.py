"""The model families, by the `model_type` of their configuration. A new one is a file with `describe` and a line here."""

from ..architecture import Architecture, Config, Unsupported
from . import llama, mistral, qwen2, qwen3

MODELS = {"llama": llama.describe, "mistral": mistral.describe, "qwen2": qwen2.describe, "qwen3": qwen3.describe}


def describe(config: Config) -> Architecture:
    """The architecture that `config` asks for. Raises Unsupported when the family is unknown or a field of its configuration is missing."""
    kind = config.get("model_type")
    if kind not in MODELS:
        raise Unsupported(f"model_type {kind!r} is not supported; supported are {', '.join(sorted(MODELS))}")
    try:
        return MODELS[kind](config)
    except KeyError as error:
        raise Unsupported(f"the configuration of this {kind} model has no {error.args[0]!r}") from None
