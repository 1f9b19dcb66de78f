"""Attention in plain torch against the oracle, at shapes that do not divide; and what it promises:
bounded memory, no look at what others left."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from live_bytes import Live
from ops.triton_cases import error, paged
from pagewire_kernels import attention_torch, attention_torch_plan, cuda, reference
from pagewire_kernels.attention_torch import paged_attention
from pagewire_kernels.attention_torch_plan import Shape, plan
from pagewire_kernels.batch import Batch, make_batch
from pagewire_kernels.capability import attends_by_torch

MIXES = {
    "one token": ([1], [1]),
    "decodes": ([1, 1, 1, 1, 1, 1], [9, 4, 17, 150, 15, 16]),
    "long and short": ([1, 1, 1], [3, 700, 9]),
    "fresh prompts": ([7, 12, 300], [7, 12, 300]),
    "chunks of contexts": ([5, 3, 31], [20, 90, 31]),
    "mixed": ([1, 19, 1, 1, 4], [77, 50, 130, 1, 4]),
    "a chunk longer than a piece": ([600, 1], [641, 12]),
}
SHAPES = [
    (1, 1, 64, 16),
    (2, 4, 64, 16),
    (2, 3, 80, 8),
    (1, 8, 128, 5),
    (4, 1, 256, 16),
    (1, 71, 64, 16),
]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("hkv", "group", "dim", "page"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 20])
def test_against_the_oracle(mix, hkv, group, dim, page, window):
    q, k, v, batch = paged(*MIXES[mix], hkv, group, dim, page)
    expected = reference.paged_attention(q, k, v, batch, 0.1, window)
    assert error(paged_attention(q, k, v, batch, 0.1, window), expected) < 1e-5


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sloped", [False, True])
def test_caps_and_slopes(mix, window, softcap, sloped):
    q, k, v, batch = paged(*MIXES[mix], 2, 3, 64, 16)
    alibi_slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01]) if sloped else None
    expected = reference.paged_attention(q, k, v, batch, 0.1, window, softcap, alibi_slopes)
    assert (
        error(paged_attention(q, k, v, batch, 0.1, window, softcap, alibi_slopes), expected) < 1e-5
    )


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_float16(softcap):
    q, k, v, batch = paged([1, 40, 9], [300, 70, 9], 2, 4, 128, 16, dtype=torch.float16)
    expected = reference.paged_attention(
        q.double(), k.double(), v.double(), batch, 0.09, None, softcap
    )
    out = paged_attention(q, k, v, batch, 0.09, None, softcap)
    assert out.dtype == torch.float16 and error(out, expected) < 2e-3


def test_gemm_choice_beyond_float16_are_scaled_before():
    """The Qwen2 family has keys whose products with queries leave float16's range, though the
    scaled ones do not."""
    q, k, v, batch = paged([1, 5], [30, 9], 1, 2, 128, 16, dtype=torch.float16)
    q, k = q.abs() * 20, k.abs() * 40
    assert (q[0, 0].double() @ k[k.isfinite().all(-1)].double().T).max() > 65504
    for softcap in (None, 5000.0):
        expected = reference.paged_attention(
            q.double(), k.double(), v.double(), batch, 0.01, None, softcap
        )
        assert error(paged_attention(q, k, v, batch, 0.01, None, softcap), expected) < 0.02


def padded(
    counts: list[int], lengths: list[int], more: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
    """As the worker pads a step: `more` tokens of nobody, and two rows without tokens."""
    q, k, v, batch = paged(counts, lengths, 2, 2, 64, 16)
    start = torch.cat((batch.query_start, batch.query_start[-1:].repeat(2)))
    rows = torch.cat((batch.seq_lens, torch.zeros(2, dtype=torch.int32)))
    tables = torch.cat(
        (batch.block_tables, torch.zeros(2, batch.block_tables.shape[1], dtype=torch.int32))
    )
    q = torch.cat((q, torch.full((more, *q.shape[1:]), float("nan"))))
    return q, k, v, replace(batch, query_start=start, seq_lens=rows, block_tables=tables)


def test_padding_gives_zeros_and_changes_nothing():
    q, k, v, batch = padded([1, 19, 1], [77, 50, 130], 11)
    expected = reference.paged_attention(q[:21], k, v, batch, 0.1, 30)
    out = paged_attention(q, k, v, batch, 0.1, 30)
    assert error(out[:21], expected) < 1e-5 and out[21:].eq(0).all()


def test_decoding_rows_of_length_0_give_zeros():
    """Padding of a decode step: a token each, and no context."""
    q, k, v, batch = paged([1, 1, 1], [40, 1, 23], 2, 4, 64, 16)
    expected = reference.paged_attention(q, k, v, batch, 0.1, None).clone()
    batch.seq_lens[1] = 0
    expected[1] = 0
    out = paged_attention(q, k, v, batch, 0.1, None)
    assert error(out, expected) < 1e-5 and out[1].eq(0).all()
    batch.seq_lens[:] = 0
    assert paged_attention(q, k, v, replace(batch, plan=None), 0.1, None).eq(0).all()


def test_the_layers_of_a_step_read_its_lengths_once():
    q, k, v, batch = paged([1, 19, 4], [77, 50, 9], 2, 3, 64, 16)
    for window in (None, 8, None, 8):
        expected = reference.paged_attention(q, k, v, batch, 0.1, window)
        assert error(paged_attention(q, k, v, batch, 0.1, window), expected) < 1e-5
    assert set(batch.plan.groups) == {None, 8}


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("softcap", "sloped"), [(None, False), (3.0, False), (None, True)])
def test_everything_is_computed_where_the_caches_are(window, softcap, sloped):
    """On torch's meta device, whose tensors no operation mixes with those of the CPU; lengths alone
    are on the host."""
    q, k, v, batch = paged([1, 19, 4], [77, 50, 9], 2, 3, 64, 16)
    far = {
        name: getattr(batch, name).to("meta")
        for name in ("positions", "slot_mapping", "query_start", "seq_lens", "block_tables")
    }
    known = attention_torch.Steps(batch.query_start.long(), batch.seq_lens.long(), {})
    batch = replace(batch, plan=known, **far)
    alibi_slopes = torch.ones(6, device="meta") if sloped else None
    for _ in range(2):
        out = paged_attention(
            q.to("meta"), k.to("meta"), v.to("meta"), batch, 0.1, window, softcap, alibi_slopes
        )
        assert (out.device.type, out.shape) == ("meta", (24, 384))


@pytest.fixture
def tight(monkeypatch):
    """Limits that make many pieces of small batches."""
    monkeypatch.setattr(attention_torch_plan, "QUERIES", 8)
    monkeypatch.setattr(attention_torch_plan, "SCORES", 6 * 8 * 64)
    monkeypatch.setattr(attention_torch_plan, "GATHERED", 2 * 64 * 160)
    monkeypatch.setattr(attention_torch_plan, "SHORT", 16)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 20])
def test_many_pieces_give_the_same(mix, window, tight):
    q, k, v, batch = paged(*MIXES[mix], 2, 3, 64, 16)
    expected = reference.paged_attention(q, k, v, batch, 0.1, window)
    assert error(paged_attention(q, k, v, batch, 0.1, window), expected) < 1e-5


def tokens_of(pieces) -> list[int]:
    return [
        token + i
        for token, count in zip(pieces.tokens, pieces.counts, strict=True)
        for i in range(count)
    ]


@pytest.mark.parametrize("window", [None, 5, 4096])
def test_each_token_is_in_one_piece_and_products_are_bounded(window):
    rng = np.random.default_rng(0)
    counts = np.where(rng.random(200) < 0.7, 1, rng.integers(0, 500, 200))
    lengths = np.where(
        counts > 0, counts + rng.integers(0, 20_000, 200) * (rng.random(200) < 0.5), 0
    )
    starts, shape = np.concatenate(([0], counts.cumsum())), Shape(32, 8, 128)
    found = plan(starts, lengths, shape, window)
    assert Counter(token for pieces in found for token in tokens_of(pieces)) == Counter(
        range(counts.sum())
    )
    for pieces in found:
        size = len(pieces.rows)
        assert size * shape.heads * pieces.queries * pieces.span <= attention_torch_plan.SCORES
        assert (
            size == 1
            or size * shape.kv_heads * shape.size * pieces.span <= attention_torch_plan.GATHERED
        )


def test_rows_that_are_alike_go_together():
    starts = np.arange(65)
    assert len(plan(starts, np.full(64, 90) + np.arange(64), Shape(32, 8, 128), None)) == 1
    assert len(plan(starts, np.where(np.arange(64) % 2, 90, 7000), Shape(8, 1, 128), None)) == 3


@pytest.mark.parametrize(
    ("counts", "lengths"), [([1] * 40, [900] * 40), ([700], [1500]), ([64] * 8, [64] * 8)]
)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_workspace_holds_what_it_works_in(counts, lengths, softcap, monkeypatch):
    monkeypatch.setattr(attention_torch_plan, "SCORES", 1 << 19)
    monkeypatch.setattr(attention_torch_plan, "GATHERED", 1 << 18)
    q, k, v, batch = paged(counts, lengths, 2, 3, 64, 16)
    with Live() as seen:
        paged_attention(q, k, v, batch, 0.1, None, softcap)
    limit = attention_torch_plan.workspace(Shape(6, 2, 64), max(lengths), 4, 4)
    worked = seen.peak - 3 * q.nbytes
    assert worked <= limit and (softcap is None or worked > limit / 6), (
        "torch's own attention keeps no scores"
    )


def test_gpus_without_tensor_cores_in_triton_are_served_here(monkeypatch):
    assert [attends_by_torch(c) for c in ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0))] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    called: list[str] = []
    monkeypatch.setattr(cuda.attention_torch, "serves", lambda device: True)
    monkeypatch.setattr(
        cuda,
        "rope_and_cache",
        lambda qkv, *rest: called.append("rope") or qkv.view(len(qkv), -1, 64)[:, :4].contiguous(),
    )
    q, k, v, batch = paged([1, 1], [40, 23], 2, 2, 64, 16)
    expected = reference.paged_attention(q, k, v, batch, 0.125, None)
    assert error(cuda.paged_attention(q, k, v, batch, 0.125, None), expected) < 1e-5
    qkv = torch.cat((q.flatten(1), torch.zeros(2, 4 * 64)), 1)
    assert error(
        cuda.rope_attention(qkv, torch.zeros(1), None, None, 1e-5, k, v, batch, 0.125, None),
        expected,
    ) < 1e-5 and called == ["rope"]
    x, weight = torch.randn(3, 1024), torch.randn(64, 1024)
    torch.testing.assert_close(cuda.linear(x, weight), x @ weight.T)


def test_the_choice_is_by_the_gpus_capability(monkeypatch):
    attention_torch.serves.cache_clear()
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: {0: (7, 5), 1: (8, 6)}[device.index]
    )
    assert [
        attention_torch.serves(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu", "meta")
    ] == [True, False, False, False]
    attention_torch.serves.cache_clear()


def test_common_blocks_make_no_difference():
    batch = make_batch([1, 1], [20, 30], [[1, 2], [1, 3]], 16)
    k, v, q = torch.randn(4, 2, 16, 64), torch.randn(4, 2, 16, 64), torch.randn(2, 4, 64)
    batch.groups = object()
    assert (
        error(
            paged_attention(q, k, v, batch, 0.1, None),
            reference.paged_attention(q, k, v, batch, 0.1, None),
        )
        < 1e-5
    )
