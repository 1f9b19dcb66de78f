"""Our decoders against transformers' own, in float32: the whole prompt at once, in chunks, step by
step, in mixed batches."""

import json

import pytest
import torch
from worker.model_variants import VARIANTS

LENGTH = 90


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ours.shape == wanted.shape
    worst = (ours - wanted).abs().max().item()
    assert worst < 1e-5 * max(1.0, wanted.abs().max().item()), f"logits differ by {worst:.2e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [LENGTH, 16, 37, 1])
def test_one_sequence(variant, chunk, tiny, harness, numbers):
    reference, tokens = tiny(variant), numbers(LENGTH)
    close(harness(reference.path).logits(tokens, chunk), reference.logits(tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_batch(variant, tiny, harness, numbers):
    """Decodes, chunks and a fresh prompt in one step, with block tables in random order."""
    reference, ours = tiny(variant), harness(tiny(variant).path)
    spans = [(40, 41), (0, 33), (16, 48), (70, 71), (7, 8), (0, 33)]
    work, logits = ours.mixed_step(spans, numbers)
    expected = torch.cat([reference.logits(tokens)[first:end] for tokens, first, end, _ in work])
    close(logits, expected)


def test_long_prompt_in_query_pieces(tiny, harness, numbers):
    reference, tokens = tiny("mistral"), numbers(400)
    close(harness(reference.path).logits(tokens, 330), reference.logits(tokens))


def test_sharded_checkpoint(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("qwen2"), numbers(20)
    reference.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    close(harness(tmp_path).logits(tokens, 20), reference.logits(tokens))


def test_older_configuration_format(tiny, harness, numbers, tmp_path):
    """rope_theta and rope_scaling at the top level, torch_dtype, as files from before transformers
    5 have them."""
    reference, tokens = tiny("llama3-rope"), numbers(80)
    for file in reference.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {
        "rope_theta": scaling.pop("rope_theta"),
        "rope_scaling": scaling,
        "torch_dtype": config.pop("dtype"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    close(harness(tmp_path).logits(tokens, 80), reference.logits(tokens))


def test_bfloat16_is_near(tiny, harness, numbers):
    """Loosely: the type's own rounding through three layers; a wrong operation is far outside."""
    reference, tokens = tiny("qwen3"), numbers(60)
    ours, wanted = (
        harness(reference.path, dtype="bfloat16").logits(tokens, 25).float(),
        reference.logits(tokens),
    )
    similarity = torch.nn.functional.cosine_similarity(ours, wanted, dim=-1)
    assert similarity.min() > 0.99
