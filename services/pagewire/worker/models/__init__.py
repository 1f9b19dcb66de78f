"""The model families, by the `model_type` of their configuration.

To add one, write a file of its differences and name it in FAMILIES:

1. `describe(config) -> Architecture`: usually `common({**config, ...}, ...)`, where the dict
gives Llama's names to what config.json calls
   otherwise and the keywords are the fields of Architecture in which the family differs.
2. Where the checkpoint has other names or joined matrices, `tensors`: a `checkpoint.Names` table
and `checkpoint.renamed` for most, a
   generator of its own for the rest. Rotary embeddings of a part of each head, or of
   neighbouring dimensions, are only described
   (`Rope.size`, `Rope.interleaved`): loading puts the rows of queries and keys in the order that
   the kernels want.
3. What no field can say yet becomes a field of Architecture, chosen when a part is made
(`blocks`, `decoder`), never in a call.
4. A variant in tests/worker/model_variants.py, and a row in docs/models.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import (
    baichuan,
    chatglm,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    opt,
    phi,
    phi3,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from .architecture import Architecture, Config, Unsupported
from .checkpoint import Tensors


@dataclass(frozen=True)
class Family:
    """How the models of one family are described and their checkpoints read."""

    describe: Callable[[Config], Architecture]
    tensors: Tensors | None = None
    """None: the checkpoint's tensors are the decoder's."""


FAMILIES = {
    "RefinedWeb": Family(falcon.describe, falcon.tensors),
    "RefinedWebModel": Family(falcon.describe, falcon.tensors),
    "baichuan": Family(baichuan.describe, baichuan.tensors),
    "chatglm": Family(chatglm.describe, chatglm.tensors),
    "falcon": Family(falcon.describe, falcon.tensors),
    "gemma": Family(gemma.describe, gemma.tensors),
    "gemma2": Family(gemma2.describe, gemma2.tensors),
    "gemma3": Family(gemma3.describe, gemma3.tensors),
    "gemma3_text": Family(gemma3.describe, gemma3.tensors),
    "glm": Family(glm.describe, glm.tensors),
    "glm4": Family(glm.describe4, glm.tensors4),
    "gpt2": Family(gpt2.describe, gpt2.tensors),
    "gpt_neox": Family(gpt_neox.describe, gpt_neox.tensors),
    "gptj": Family(gptj.describe, gptj.tensors),
    "llama": Family(llama.describe),
    "mistral": Family(mistral.describe),
    "mixtral": Family(mixtral.describe, mixtral.tensors),
    "opt": Family(opt.describe, opt.tensors),
    "phi": Family(phi.describe, phi.tensors),
    "phi3": Family(phi3.describe, phi3.tensors),
    "qwen": Family(qwen.describe, qwen.tensors),
    "qwen2": Family(qwen2.describe),
    "qwen2_moe": Family(qwen2_moe.describe),
    "qwen3": Family(qwen3.describe),
    "qwen3_moe": Family(qwen3_moe.describe),
}


def family(config: Config) -> Family:
    """Raises Unsupported when it is unknown."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise Unsupported(
            f"model_type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def describe(config: Config) -> Architecture:
    """The architecture that `config` asks for. Raises Unsupported when the family is unknown or a
    field of its configuration is missing or no value of its kind."""
    chosen = family(config)
    try:
        return chosen.describe(config)
    except KeyError as error:
        raise Unsupported(
            f"the configuration of this {config['model_type']} model has no {error.args[0]!r}"
        ) from None
    except Unsupported:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Unsupported(
            f"config.json of this {config['model_type']} model has a field with a value of another "
            f"kind ({error}); compare it with the published one, null above all"
        ) from error
