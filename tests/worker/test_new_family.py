"""What it takes to add a model: StarCoder 2, which transformers runs here otherwise, as a family of
ours. CONTRIBUTING.md says what such a file holds."""

from typing import Any

import pytest
import torch
import transformers
from pagewire.worker.models import FAMILIES, Family
from pagewire.worker.models.architecture import Architecture, Config, gpt_like
from pagewire.worker.models.checkpoint import Names, renamed
from pagewire.worker.models.decoder import Decoder
from worker.model_variants import SIZES

NAMES = Names(
    prefix="model.",
    layers="layers",
    top={"embed_tokens": "model.embed_tokens", "norm": "model.norm"},
    parts={
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.k_proj",
        "self_attn.v_proj": "self_attn.v_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
)


def describe(config: Config) -> Architecture:
    return gpt_like(
        config,
        norm_eps=float(config["norm_epsilon"]),
        bias=bool(config["use_bias"]),
        windows=(config["sliding_window"],) * int(config["num_hidden_layers"]),
    )


def test_a_description_and_names_are_all_that_a_family_needs(
    harness: Any, numbers: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    config = transformers.Starcoder2Config(**SIZES, sliding_window=11, tie_word_embeddings=True)
    model = transformers.Starcoder2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(FAMILIES, "starcoder2", Family(describe, renamed(NAMES)))
    ours, tokens = harness(tmp_path), numbers(40)
    assert isinstance(ours._loaded.decoder, Decoder)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(ours.logits(tokens, 13), wanted, atol=1e-5, rtol=1e-5)
