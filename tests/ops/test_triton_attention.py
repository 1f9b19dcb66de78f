"""Paged attention kernels against the plain oracle, at shapes that do not divide."""

from dataclasses import replace

import pytest
import torch
from ops.triton_cases import error, paged
from pagewire_kernels import attention_decode, reference
from pagewire_kernels.attention_decode import DecodeConfig, Rope, decode_attention
from pagewire_kernels.attention_decode_few import decode_few
from pagewire_kernels.attention_prefill import PrefillConfig, prefill_attention
from pagewire_kernels.batch import Batch
from pagewire_kernels.cuda import paged_attention
from pagewire_kernels.decode_shapes import FewConfig

SMALL = DecodeConfig(block_n=16, warps=1, stages=2, chunk=16, splits=4)


@pytest.mark.parametrize(
    ("dim", "group", "page", "window", "cap"),
    [
        (64, 4, 16, None, None),
        (80, 1, 16, None, 5.0),
        (96, 3, 8, 20, None),
        (128, 8, 16, None, None),
        (64, 3, 32, 33, 3.0),
        (128, 1, 5, 7, None),
    ],
)
def test_decode(dim: int, group: int, page: int, window: int | None, cap: float | None) -> None:
    lengths = [1, 37, 64, 65, 150]
    q, k, v, batch = paged([1] * 5, lengths, 2, group, dim, page)
    expected = reference.paged_attention(q, k, v, batch, 0.1, window, cap)
    out = torch.full_like(expected, float("nan"))
    decode_attention(
        q, k, v, batch.block_tables, batch.seq_lens, 0.1, window, cap, out=out, config=SMALL
    )
    assert error(out, expected) < 1e-5
    one = DecodeConfig(block_n=32, warps=1, stages=2, chunk=32, splits=1)
    assert (
        error(
            decode_attention(
                q, k, v, batch.block_tables, batch.seq_lens, 0.1, window, cap, config=one
            ),
            expected,
        )
        < 1e-5
    )


def test_decode_padding_rows_give_zeros() -> None:
    q, k, v, batch = paged([1, 1, 1], [40, 1, 23], 2, 4, 64, 16)
    expected = reference.paged_attention(q, k, v, batch, 0.1, None).clone()
    batch.seq_lens[1] = 0
    expected[1] = 0
    out = torch.full_like(expected, float("nan"))
    decode_attention(q, k, v, batch.block_tables, batch.seq_lens, 0.1, out=out)
    assert error(out, expected) < 1e-5
    assert out[1].eq(0).all()


@pytest.mark.parametrize(
    ("dim", "group", "page", "window", "cap"),
    [
        (64, 4, 16, None, None),
        (80, 1, 16, None, 5.0),
        (96, 3, 8, 20, None),
        (128, 8, 16, None, None),
        (64, 2, 32, 9, 3.0),
    ],
)
def test_prefill(dim: int, group: int, page: int, window: int | None, cap: float | None) -> None:
    q, k, v, batch = paged([1, 37, 5, 64, 17], [1, 37, 70, 64, 90], 2, group, dim, page)
    expected = reference.paged_attention(q, k, v, batch, 0.1, window, cap)
    out = torch.full_like(expected, float("nan"))
    config = PrefillConfig(block_m=32, block_n=16, warps=1, stages=2)
    prefill_attention(
        q,
        k,
        v,
        batch.block_tables,
        batch.seq_lens,
        batch.query_start,
        0.1,
        window,
        cap,
        out=out,
        config=config,
    )
    assert error(out, expected) < 1e-5


@pytest.mark.parametrize("window", [None, 40])
def test_mixed_rows_are_split_between_the_kernels(window: int | None) -> None:
    q, k, v, batch = paged([1, 19, 1, 1], [77, 50, 130, 1], 2, 4, 64, 16)
    expected = reference.paged_attention(q, k, v, batch, 0.125, window)
    assert error(paged_attention(q, k, v, batch, 0.125, window), expected) < 1e-5


def test_single_chunk_of_a_long_context_and_half_precision() -> None:
    q, k, v, batch = paged([20], [200], 1, 4, 64, 16, dtype=torch.float16)
    expected = reference.paged_attention(q.float(), k.float(), v.float(), batch, 0.125, None)
    assert error(paged_attention(q, k, v, batch, 0.125, None), expected) < 2e-3


def test_slopes() -> None:
    """ALiBi, in rows of one token and of many, with and without the soft cap."""
    q, k, v, batch = paged([1, 19, 1, 1], [77, 50, 130, 1], 2, 3, 64, 16)
    alibi_slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01])
    for cap in (None, 4.0):
        expected = reference.paged_attention(q, k, v, batch, 0.125, None, cap, alibi_slopes)
        assert (
            error(paged_attention(q, k, v, batch, 0.125, None, cap, alibi_slopes), expected) < 1e-5
        )


@pytest.mark.parametrize(
    ("dim", "group", "normed", "window"),
    [(64, 3, False, None), (80, 1, True, None), (128, 4, True, 20)],
)
@pytest.mark.parametrize("config", [SMALL, None])
def test_decode_with_rope(
    dim: int, group: int, normed: bool, window: int | None, config: DecodeConfig | None
) -> None:
    """The last token's key and value are not in the cache before; they are written by this
    launch."""
    lengths, hkv = [1, 37, 64, 65, 150, 1], 2
    _, k, v, batch = paged([1] * 6, lengths, hkv, group, dim, 16)
    qkv = torch.randn(6, (group + 2) * hkv * dim)
    cos_sin = torch.randn(200, dim)
    weights = (torch.randn(dim), torch.randn(dim)) if normed else (None, None)
    batch.seq_lens[5] = 0
    batch.slot_mapping[5] = -1
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    roped = reference.rope_and_cache(qkv.clone(), cos_sin, *weights, 1e-6, *theirs, batch)
    expected = reference.paged_attention(roped[:5], *theirs, _first(batch, 5), 0.1, window)
    rope = Rope(cos_sin, *weights, 1e-6)
    out = decode_attention(
        qkv, *ours, batch.block_tables, batch.seq_lens, 0.1, window, rope=rope, config=config
    )
    assert error(out[:5], expected) < 1e-5
    assert out[5].eq(0).all()
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isnan(), wanted.isnan())
        assert error(mine.nan_to_num(), wanted.nan_to_num()) < 1e-6


@pytest.mark.parametrize(
    ("dim", "group", "normed", "window", "cap"),
    [
        (64, 3, False, None, None),
        (80, 1, True, None, 5.0),
        (128, 4, True, 20, None),
        (128, 8, False, 33, 3.0),
        (96, 15, True, None, None),
    ],
)
@pytest.mark.parametrize(
    "config", [FewConfig(16, 32, 1, 2, 4), FewConfig(32, 16, 2, 2, 32), FewConfig(64, 64, 2, 1, 2)]
)
def test_few_rows(
    dim: int, group: int, normed: bool, window: int | None, cap: float | None, config: FewConfig
) -> None:
    """Contexts that end with a tile and that begin one, of one split and of many; a row of
    padding. What the caches hold where nothing was written is no number."""
    lengths, hkv = [1, 2, 37, 64, 65, 150, 1], 2
    _, k, v, batch = paged([1] * 7, lengths, hkv, group, dim, 16)
    qkv = torch.randn(7, (group + 2) * hkv * dim)
    cos_sin = torch.randn(200, dim)
    weights = (torch.randn(dim), torch.randn(dim)) if normed else (None, None)
    batch.seq_lens[6] = 0
    batch.slot_mapping[6] = -1
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    roped = reference.rope_and_cache(qkv.clone(), cos_sin, *weights, 1e-6, *theirs, batch)
    expected = reference.paged_attention(roped[:6], *theirs, _first(batch, 6), 0.1, window, cap)
    out = torch.full((7, group * hkv * dim), float("nan"))
    rope = Rope(cos_sin, *weights, 1e-6)
    decode_few(qkv, *ours, batch.block_tables, batch.seq_lens, 0.1, window, cap, rope, out, config)
    assert error(out[:6], expected) < 1e-5
    assert out[6].eq(0).all()
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isnan(), wanted.isnan())
        assert error(mine.nan_to_num(), wanted.nan_to_num()) < 1e-6


@pytest.mark.parametrize("normed", [False, True])
def test_few_rows_of_16_bits_are_decoded_so(normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And others are not."""
    seen = list[int]()
    monkeypatch.setattr(
        attention_decode,
        "decode_few",
        lambda qkv, *rest: (seen.append(len(qkv)), decode_few(qkv, *rest)),
    )
    for dtype, rows in ((torch.bfloat16, 2), (torch.bfloat16, 5), (torch.float32, 2)):
        _, k, v, batch = paged([1] * rows, [70, 33, 5, 9, 4][:rows], 2, 4, 64, 16)
        caches = k.to(dtype), v.to(dtype)
        theirs = tuple(cache.float() for cache in caches)
        qkv = torch.randn(rows, 6 * 2 * 64).to(dtype)
        cos_sin = torch.randn(100, 64)
        weights = (torch.ones(64, dtype=dtype),) * 2 if normed else (None, None)
        rope = Rope(cos_sin, *weights, 1e-6)
        out = decode_attention(qkv, *caches, batch.block_tables, batch.seq_lens, 0.1, rope=rope)
        wide = [None if weight is None else weight.float() for weight in weights]
        roped = reference.rope_and_cache(qkv.float(), cos_sin, *wide, 1e-6, *theirs, batch)
        expected = reference.paged_attention(roped, *theirs, batch, 0.1, None)
        assert error(out.float(), expected) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert seen == [2]


def _first(batch: Batch, rows: int) -> Batch:
    cut = replace(batch, positions=batch.positions[:rows], slot_mapping=batch.slot_mapping[:rows])
    return replace(
        cut,
        query_start=batch.query_start[: rows + 1],
        seq_lens=batch.seq_lens[:rows],
        block_tables=batch.block_tables[:rows],
    )
