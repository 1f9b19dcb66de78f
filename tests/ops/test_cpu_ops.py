"""The CPU back end against the oracles, over shapes, dtypes, scattered block tables and mixed
batches."""

import pytest
import torch
from pagewire_kernels import cpu, reference
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import Batch, make_batch

BLOCK = 4
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.bfloat16: {"atol": 4e-2, "rtol": 4e-2},
}
DTYPES = list(TOLERANCE)
MIXES = {
    "one decode": ([1], [9]),
    "decodes": ([1, 1, 1], [9, 4, 17]),
    "full blocks": ([1, 1], [8, 8]),
    "long and short": ([1, 1, 1], [3, 150, 9]),
    "fresh prompts": ([7, 12], [7, 12]),
    "chunks": ([5, 3], [20, 9]),
    "mixed": ([1, 6, 1, 4], [13, 6, 90, 11]),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def scattered(counts: list[int], lengths: list[int], blocks: int = 128) -> Batch:
    free = torch.randperm(blocks).tolist()
    return make_batch(
        counts, lengths, [[free.pop() for _ in range(-(-n // BLOCK))] for n in lengths], BLOCK
    )


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, **TOLERANCE[wanted.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_activation(dtype):
    x, residual, weight = (
        torch.randn(5, 48).to(dtype),
        torch.randn(5, 48).to(dtype),
        torch.randn(48).to(dtype),
    )
    close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    close(cpu.silu_mul(x), reference.silu_mul(x))
    normed, total = cpu.add_rms_norm(x, residual.clone(), weight, 1e-5)
    wanted, total_wanted = reference.add_rms_norm(x, residual, weight, 1e-5)
    close(normed, wanted)
    close(total.to(dtype), total_wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norms(dtype, biased):
    x, residual, weight = (
        (torch.randn(5, 48) + 2).to(dtype),
        torch.randn(5, 48).to(dtype),
        torch.randn(48).to(dtype),
    )
    bias = torch.randn(48).to(dtype) if biased else None
    close(cpu.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
    normed, total = cpu.add_layer_norm(x, residual.clone(), weight, bias, 1e-5)
    wanted, total_wanted = reference.add_layer_norm(x, residual, weight, bias, 1e-5)
    close(normed, wanted)
    close(total.to(dtype), total_wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "gelu_mul"])
def test_other_activations(dtype, name):
    x = torch.randn(5, 48).to(dtype)
    close(getattr(cpu, name)(x), getattr(reference, name)(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_weights_kept_in_float32(dtype):
    x, weight = torch.randn(5, 48).to(dtype), torch.randn(48)
    ours = cpu.rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype
    close(ours, reference.rms_norm(x.float(), weight, 1e-5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts(dtype, tokens):
    x, up, down = (
        torch.randn(*shape).to(dtype) for shape in ((tokens, 32), (5, 48, 32), (5, 32, 24))
    )
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2)
    ours = cpu.experts(
        x, cpu.pack_experts(up.clone()), cpu.pack_experts(down.clone()), chosen, weights
    )
    wanted = reference.experts(x, up, down, chosen, weights)
    assert ours.dtype == dtype
    assert (ours - wanted).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * wanted.norm()


def test_the_residual_of_a_16_bit_model_is_kept_in_float32():
    x, residual = torch.full((1, 8), 1.0).bfloat16(), torch.full((1, 8), 256.0).bfloat16()
    _, total = cpu.add_rms_norm(x, residual, torch.ones(8).bfloat16(), 1e-5)
    assert total.dtype == torch.float32 and (total == 257).all()


def test_the_first_of_a_rows_logits_are_exact_where_bfloat16_cannot_tell_them_apart():
    weight = torch.randn(300, 64).bfloat16()
    weight[200] = weight[7]
    weight[200, 0] += weight[200, 0].abs() / 64 + 0.01
    x = (weight[7].float() * 4).bfloat16()[None]
    x[0, 0] = x[0, 0].abs()
    logits = cpu.tied_logits(x, cpu.pack_linear(weight.clone()), weight)
    exact = x.double() @ weight.double().T
    assert logits.dtype == torch.float32
    best = exact.topk(4).indices
    torch.testing.assert_close(
        logits.gather(1, best).double(), exact.gather(1, best), atol=1e-3, rtol=1e-5
    )
    assert logits.argmax() == exact.argmax()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_linear_of_packed_weights(dtype, rows):
    x, weight, bias = (
        torch.randn(rows, 48).to(dtype),
        torch.randn(72, 48).to(dtype),
        torch.randn(72).to(dtype),
    )
    packed = cpu.pack_linear(weight.clone())
    tolerance = (
        {"atol": 2e-1, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    )
    torch.testing.assert_close(cpu.linear(x, packed), x @ weight.T, **tolerance)
    torch.testing.assert_close(cpu.linear(x, packed, bias), x @ weight.T + bias, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_rope_and_cache(dtype, qk_norm, padded):
    heads, kv_heads, size = 6, 2, 16
    batch = scattered([1, 6, 1], [13, 6, 21])
    if padded:
        batch.slot_mapping[2] = -1
    qkv, cos_sin = torch.randn(8, (heads + 2 * kv_heads) * size).to(dtype), torch.randn(32, size)
    weights = (
        (torch.randn(size).to(dtype), torch.randn(size).to(dtype)) if qk_norm else (None, None)
    )
    ours, theirs = (torch.randn(2, 128, kv_heads, BLOCK, size).to(dtype) for _ in range(2))
    theirs.copy_(ours)
    q = cpu.rope_and_cache(qkv.clone(), cos_sin, *weights, 1e-6, ours[0], ours[1], batch)
    close(q, reference.rope_and_cache(qkv, cos_sin, *weights, 1e-6, theirs[0], theirs[1], batch))
    close(ours, theirs)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention(mix, window, softcap, dtype):
    counts, lengths = MIXES[mix]
    batch = scattered(counts, lengths)
    cache = torch.randn(2, 128, 2, BLOCK, 16).to(dtype)
    q = torch.randn(sum(counts), 6, 16).to(dtype)
    ours = cpu.paged_attention(q, cache[0], cache[1], batch, 0.25, window, softcap)
    close(ours, reference.paged_attention(q, cache[0], cache[1], batch, 0.25, window, softcap))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_with_slopes(mix, window, dtype):
    counts, lengths = MIXES[mix]
    batch = scattered(counts, lengths)
    cache = torch.randn(2, 128, 2, BLOCK, 16).to(dtype)
    q, alibi_slopes = (
        torch.randn(sum(counts), 6, 16).to(dtype),
        torch.tensor([0.5, 0.25, 0.1, 0.05, 0.02, 0.0]),
    )
    ours = cpu.paged_attention(q, cache[0], cache[1], batch, 0.25, window, None, alibi_slopes)
    close(
        ours,
        reference.paged_attention(q, cache[0], cache[1], batch, 0.25, window, None, alibi_slopes),
    )


def test_attention_never_reads_blocks_of_others():
    """Everything outside the sequences' own blocks is NaN; nothing of it may arrive."""
    batch = scattered([1, 1, 4], [8, 32, 12])
    cache = torch.full((2, 128, 2, BLOCK, 16), float("nan"))
    for row, length in enumerate([8, 32, 12]):
        cache[:, batch.block_tables[row, : length // BLOCK].long()] = 1.0
    out = cpu.paged_attention(torch.randn(6, 6, 16), cache[0], cache[1], batch, 0.25, None)
    assert torch.isfinite(out).all()


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="no kernels for device 'tpu'"):
        backend("tpu")
    assert backend("cpu").linear is cpu.linear
