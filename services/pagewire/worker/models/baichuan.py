"""Baichuan 1 and 2: Llama with joined queries, keys and values. The 7B ones rotate, the 13B ones
have ALiBi and name no positions.

Baichuan 2 has a head whose rows are brought to length 1 before use; that is done to the weights at
loading."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .alibi import alibi_slopes
from .architecture import Architecture, Config, common
from .checkpoint import Named, Names, renamed
from .rope import NO_ROPE

if TYPE_CHECKING:
    from torch import Tensor

BAICHUAN2 = "baichuan2"
BAICHUAN2_VOCABULARY = 125_696
NAMES = Names(
    layers="model.layers",
    top={},
    parts={"self_attn.W_pack": "self_attn.qkv_proj"},
    ignored=("rotary_emb.inv_freq",),
)
_renamed = renamed(NAMES)


def tensors(name: str, tensor: "Tensor", arch: Architecture) -> Iterator[Named]:
    """Renamed and cut; the rows of Baichuan 2's head are brought to length 1."""
    if name == "lm_head.weight" and arch.model_type == BAICHUAN2:
        from torch.nn.functional import normalize

        yield name, normalize(tensor.float())
    else:
        yield from _renamed(name, tensor, arch)


def describe(config: Config) -> Architecture:
    """Baichuan 1 or 2, told apart by what the configuration names."""
    second = "z_loss_weight" in config or config["vocab_size"] == BAICHUAN2_VOCABULARY
    overrides = {"model_type": BAICHUAN2 if second else config["model_type"]}
    if "max_position_embeddings" in config:
        return common(config | overrides)
    overrides["max_position_embeddings"] = config["model_max_length"]
    return common(
        config | overrides,
        rope=NO_ROPE,
        alibi_slopes=alibi_slopes(int(config["num_attention_heads"])),
    )
