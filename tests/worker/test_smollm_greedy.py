"""The demo model in float32, token for token against transformers on the same dequantized weights.

The oracle is one pass of transformers over prompt and output together: the output is what
transformers would generate greedily if and only if each of its tokens is the most likely one after
all before it.
"""

import os
from pathlib import Path

import pytest
import torch
from pagewire.config import ModelConfig
from pagewire.worker.load.gguf_file import Gguf
from pagewire.worker.load.weights import from_gguf
from pagewire_protocol.sampling import Sampling

STEPS = 64
GREEDY = Sampling(seed=0, max_tokens=STEPS, temperature=0.0)


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    given = os.environ.get("PAGEWIRE_TEST_GGUF")
    if given:
        return Path(given)
    from pagewire.hub import huggingface

    try:
        return huggingface.demo_gguf()
    except huggingface.ModelNotFound as error:
        pytest.skip(f"the demo model cannot be had here: {error}")


@pytest.fixture(scope="module")
def reference(gguf_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    file = Gguf(gguf_path)
    config = file.config()
    model = LlamaForCausalLM(
        LlamaConfig(
            **{k: v for k, v in config.items() if k != "model_type"}, attn_implementation="eager"
        )
    )
    model.load_state_dict(dict(from_gguf(file, config)), strict=False)
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Four lengths, of ids that follow one another as text does not; the last spans many blocks."""
    random = torch.Generator().manual_seed(11)
    return [torch.randint(3, 49_000, (n,), generator=random).tolist() for n in (4, 31, 150, 500)]


def test_greedy_equals_transformers(gguf_path, reference, prompts, driver):
    ours = driver(gguf_path, ModelConfig(max_model_len=1024), num_kv_blocks=400, threads=0)
    made = ours.generate(prompts, [GREEDY] * len(prompts), STEPS)
    for prompt, tokens in zip(prompts, made, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert len(tokens) == STEPS and logits.argmax(-1).tolist() == tokens
    assert ours.generate(prompts[3:], [GREEDY], STEPS, chunk=37) == made[3:]
