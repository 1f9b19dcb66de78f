"""Norms, activation, embedding, rotary embedding with KV write, and the skinny product, against
their oracles."""

import pytest
import torch
from ops.triton_cases import error
from pagewire_kernels import reference
from pagewire_kernels.activation import gelu, gelu_mul, gelu_tanh, relu, silu_mul
from pagewire_kernels.batch import Batch, make_batch
from pagewire_kernels.embedding import embedding
from pagewire_kernels.gemm import SkinnyConfig, linear, skinny_linear
from pagewire_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pagewire_kernels.rope import rope_and_cache


@pytest.mark.parametrize("width", [64, 576, 1000])
def test_norms(width: int) -> None:
    x, residual, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(width)
    assert error(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)) < 1e-6
    strided = torch.randn(5, 2 * width)[:, :width]
    assert error(rms_norm(strided, weight, 1e-5), reference.rms_norm(strided, weight, 1e-5)) < 1e-6
    expected = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert error(normed, expected[0]) < 1e-6
    assert error(total, expected[1]) < 1e-6


@pytest.mark.parametrize("width", [64, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norms(width: int, biased: bool) -> None:
    x, residual, weight = torch.randn(5, width) + 3, torch.randn(5, width), torch.randn(width)
    bias = torch.randn(width) if biased else None
    assert (
        error(layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5)) < 1e-6
    )
    expected = reference.add_layer_norm(x, residual.clone(), weight, bias, 1e-5)
    normed, total = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert error(normed, expected[0]) < 1e-6
    assert error(total, expected[1]) < 1e-6


@pytest.mark.parametrize("width", [24, 1536, 2500])
def test_gated_activations(width: int) -> None:
    x = torch.randn(3, 2 * width) * 4
    assert error(silu_mul(x), reference.silu_mul(x)) < 1e-6
    assert error(gelu_mul(x), reference.gelu_mul(x)) < 1e-6


def test_plain_activations() -> None:
    x = torch.randn(3, 40) * 4
    for ours, wanted in (
        (gelu, reference.gelu),
        (gelu_tanh, reference.gelu_tanh),
        (relu, reference.relu),
    ):
        assert error(ours(x), wanted(x)) < 1e-6


def test_embedding_gives_zeros_for_unknown_ids() -> None:
    table = torch.randn(50, 96)
    ids = torch.tensor([3, -1, 49, 50])
    out = embedding(ids, table)
    assert torch.equal(out[[0, 2]], table[[3, 49]])
    assert out[[1, 3]].eq(0).all()


@pytest.mark.parametrize(
    ("dim", "hq", "hkv", "normed"),
    [(64, 9, 3, False), (128, 4, 2, True), (80, 2, 2, False), (96, 3, 1, True)],
)
def test_rope_and_cache(dim: int, hq: int, hkv: int, normed: bool) -> None:
    batch: Batch = make_batch([1, 7], [20, 7], [[3, 1], [4]], 16)
    batch.slot_mapping[3] = -1
    qkv, cos_sin = torch.randn(8, (hq + 2 * hkv) * dim), torch.randn(32, dim)
    weights = (torch.randn(dim), torch.randn(dim)) if normed else (None, None)
    ours, theirs = ([torch.full((5, hkv, 16, dim), 7.0) for _ in range(2)] for _ in range(2))
    expected = reference.rope_and_cache(qkv.clone(), cos_sin, *weights, 1e-6, *theirs, batch)
    q = rope_and_cache(qkv, cos_sin, *weights, 1e-6, *ours, batch)
    assert error(q, expected) < 1e-6
    assert error(ours[0], theirs[0]) < 1e-6
    assert error(ours[1], theirs[1]) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize(("n", "k", "splits"), [(64, 512, 1), (50, 640, 3), (33, 200, 2)])
def test_skinny_linear(rows: int, n: int, k: int, splits: int) -> None:
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k), torch.randn(n)
    config = SkinnyConfig(block_n=16, block_k=64, splits=splits, warps=1, stages=2)
    for _ in range(2):
        assert (
            error(
                skinny_linear(x, weight, bias, config), torch.nn.functional.linear(x, weight, bias)
            )
            < 1e-5
        )
    assert error(skinny_linear(x, weight, None, config), x @ weight.T) < 1e-5


def test_linear_takes_any_number_of_rows() -> None:
    x, weight = torch.randn(20, 96), torch.randn(8, 96)
    assert error(linear(x, weight), x @ weight.T) < 1e-5
    assert error(linear(x[:1], weight), x[:1] @ weight.T) < 1e-5
    with pytest.raises(ValueError, match="20 rows"):
        skinny_linear(x, weight)
