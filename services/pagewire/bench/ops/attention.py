"""Attention over paged keys and values: decode, prefill, groups with common blocks, and both kinds
of row in one batch."""

import functools
from dataclasses import replace
from typing import Any

import torch
from pagewire_kernels import cuda, reference
from pagewire_kernels.attention_decode import DecodeConfig, decode_attention
from pagewire_kernels.attention_prefill import PrefillConfig, prefill_attention
from pagewire_kernels.batch import Batch, make_batch
from pagewire_kernels.cascade import Groups, cascade_attention
from torch import Tensor

from . import inputs
from .case import Case, Job
from .inputs import HKV, PAGE, error, int32, nan, oracle, pool, rand, tables

KV_BYTES = HKV * 4
"""Of a token's keys and values, for each element of the head size."""


class Decode(Case):
    def __init__(self, rows: int, length: int, heads: int, dim: int, window: int | None) -> None:
        self._rows = rows
        self._length = length
        self._dim = dim
        self._window = window
        self._k, self._v = pool(dim)
        self._tables = tables(rows, length)
        self._lens = int32([length] * rows)
        self._q = rand(rows, heads, dim)
        self.sets = len(self._tables)

    def launch(
        self, i: int, config: Any = None, lens: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        lens = self._lens if lens is None else lens
        scale = self._dim**-0.5
        return decode_attention(
            self._q,
            self._k,
            self._v,
            self._tables[i],
            lens,
            scale,
            self._window,
            config=config,
            out=out,
        )

    def check(self, config: Any = None) -> float:
        ragged = torch.randint(
            1, self._length + 1, (self._rows,), device=inputs.DEVICE, dtype=torch.int32
        )
        ragged[0] = self._length
        out = self.launch(0, config, ragged, nan(self._rows, self._q.shape[1] * self._dim))
        picked = sorted({0, self._rows - 1, self._rows // 2})
        table = self._tables[0]
        ref = torch.cat(
            [
                oracle(self._q[i : i + 1], table[i], ragged[i : i + 1] - 1, self._dim, self._window)
                for i in picked
            ]
        )
        return max(error(out[picked], ref), 0.0) if out.isfinite().all() else float("nan")


def decode_shapes(rows: int, length: int, dim: int) -> list[DecodeConfig]:
    """Launch shapes worth trying."""
    if rows >= 256:
        splits = [(512, 1), (2048, 2), (4096, 2)]
    elif rows >= 64:
        splits = [(512, 1), (512, 8), (1024, 8), (2048, 8)]
    elif rows >= 16:
        splits = [(n, 16) for n in (256, 512, 1024)]
    else:
        splits = [(n, 64) for n in (64, 128, 256, 512, 1024, 2048) if n <= length // 4]
    tiles = ((64, 2, 3), (32, 2, 4), (64, 4, 4))
    if dim != 128:
        tiles = (
            (32, 2, 4),
            (64, 2, 4),
            (64, 4, 3),
            (32, 4, 3),
            (64, 4, 4),
            (128, 4, 3),
            (32, 4, 4),
            (16, 2, 4),
            (64, 2, 3),
        )
    return [DecodeConfig(*tile, *split) for tile in tiles for split in splits]


def decode(
    rows: int,
    length: int,
    heads: int = 32,
    dim: int = 128,
    target: float | None = None,
    window: int | None = None,
) -> Job:
    shape = f"{rows}x{length} {heads}q d{dim}" + (f" w{window}" if window else "")
    seen = length if window is None else min(window, length)
    make = functools.partial(Decode, rows, length, heads, dim, window)
    shapes = decode_shapes(rows, length, dim)
    return Job("decode", shape, make, rows * seen * dim * KV_BYTES, target=target, configs=shapes)


class Prefill(Case):
    """`rows` requests of `count` new tokens each, the last ones of `length`."""

    hopper = True
    """Whether the kernel for Hopper GPUs may be taken."""

    def __init__(self, rows: int, count: int, length: int, heads: int, dim: int) -> None:
        self._rows = rows
        self._new = count
        self._length = length
        self._dim = dim
        self._k, self._v = pool(dim)
        self._tables = tables(rows, length)[:4]
        self._lens = int32([length] * rows)
        self._starts = int32(list(range(0, rows * count + 1, count)))
        self._q = rand(rows * count, heads, dim)
        self.sets = len(self._tables)

    def launch(
        self, i: int, config: Any = None, lens: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        lens = self._lens if lens is None else lens
        scale = self._dim**-0.5
        return prefill_attention(
            self._q,
            self._k,
            self._v,
            self._tables[i],
            lens,
            self._starts,
            scale,
            config=config,
            out=out,
            hopper=self.hopper,
        )

    def check(self, config: Any = None) -> float:
        lens = torch.randint(
            self._new, self._length + 1, (self._rows,), device=inputs.DEVICE, dtype=torch.int32
        )
        out = self.launch(0, config, lens, nan(len(self._q), self._q.shape[1] * self._dim))
        at = torch.randint(0, self._new, (48,), device=inputs.DEVICE)
        at[0] = 0
        at[1] = self._new - 1
        worst = 0.0
        for i in {0, self._rows - 1}:
            ref = oracle(
                self._q[i * self._new + at], self._tables[0][i], lens[i] - self._new + at, self._dim
            )
            worst = max(worst, error(out[i * self._new + at], ref))
        return worst if out.isfinite().all() else float("nan")


PREFILL_SHAPES = [(64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 3)]
OTHER_SHAPES = [
    (64, 32, 4, 3),
    (64, 32, 4, 2),
    (128, 32, 8, 2),
    (128, 32, 8, 3),
    (128, 64, 4, 3),
    (64, 128, 4, 3),
    (128, 128, 8, 3),
]
"""Tried as well at head sizes other than 128."""


def prefill(
    rows: int, count: int, length: int, heads: int = 32, dim: int = 128, target: float | None = None
) -> Job:
    shapes = [
        PrefillConfig(*shape)
        for shape in (PREFILL_SHAPES if dim == 128 else PREFILL_SHAPES + OTHER_SHAPES)
    ]
    flops = 4.0 * heads * dim * rows * count * (length - count / 2)
    shape = f"{rows}x{count} of {length} {heads}q d{dim}"
    return Job(
        "prefill",
        shape,
        lambda: Prefill(rows, count, length, heads, dim),
        flops,
        "TFLOP/s",
        target,
        shapes,
    )


class Ragged(Case):
    """Requests of all sizes in one launch, beside a row that decodes, one without new tokens and
    padding; all past their ends is NaN."""

    EMPTY = (0,) * 33
    """More rows than a warp has threads."""
    COUNTS = (300, 1, 0, 700, 37, 128, 5, *EMPTY)
    LENGTHS = (1000, 50, 9, 700, 37, 4000, 0, *EMPTY)
    DECODES, PADDING = 1, 6

    def __init__(self, heads: int, page: int, dtype: torch.dtype) -> None:
        pages = [-(-length // page) for length in self.LENGTHS]
        shape = (sum(pages) + 1, HKV, page, 128)
        order = iter((torch.randperm(sum(pages)) + 1).tolist())
        self._k, self._v = (
            torch.full(shape, float("nan"), device=inputs.DEVICE, dtype=dtype) for _ in range(2)
        )
        tables = [[next(order) for _ in range(count)] for count in pages]
        for table, length in zip(tables, self.LENGTHS, strict=True):
            for i, block in enumerate(table):
                used = min(page, length - i * page)
                self._k[block, :, :used] = rand(HKV, used, 128)
                self._v[block, :, :used] = rand(HKV, used, 128)
        self._batch = make_batch(
            list(self.COUNTS),
            list(self.LENGTHS),
            [table or [0] for table in tables],
            page,
            inputs.DEVICE,
        )
        self._q = rand(sum(self.COUNTS), heads, 128).to(dtype)

    def launch(self, i: int, config: Any = None, out: Tensor | None = None) -> Tensor:
        b = self._batch
        scale = 128**-0.5
        return prefill_attention(
            self._q,
            self._k,
            self._v,
            b.block_tables,
            b.seq_lens,
            b.query_start,
            scale,
            skip_one=True,
            config=config,
            out=out,
        )

    def check(self, config: Any = None) -> float:
        """That of the rows it computes; NaN also where the row that decodes was touched, or padding
        is not zero."""
        out = self.launch(0, config, torch.full_like(self._q.flatten(1), float("nan")))
        parts = out.split(list(self.COUNTS))
        if not parts[self.DECODES].isnan().all() or not parts[self.PADDING].eq(0).all():
            return float("nan")
        known = replace(
            self._batch,
            query_start=self._batch.query_start[: self.PADDING + 1],
            seq_lens=self._batch.seq_lens[: self.PADDING],
        )
        q, k, v = (x.float() for x in (self._q, self._k, self._v))
        ref = reference.paged_attention(q, k, v, known, 128**-0.5, None).split(list(self.COUNTS))
        return max(error(parts[i], ref[i]) for i in (0, 3, 4, 5))


def ragged(heads: int, page: int, dtype: torch.dtype) -> Job:
    pairs = sum(
        count * (length - count / 2)
        for count, length in zip(Ragged.COUNTS, Ragged.LENGTHS, strict=True)
        if length
    )
    shape = f"ragged {heads}q d128 pages of {page} {str(dtype)[6:]}"
    return Job(
        "prefill", shape, lambda: Ragged(heads, page, dtype), 4.0 * heads * 128 * pairs, "TFLOP/s"
    )


class Cascade(Case):
    """`parts` groups of equal size over `rows` rows that begin with `common` tokens of their
    group."""

    def __init__(self, rows: int, common: int, own: int, parts: int) -> None:
        self._k, self._v = pool(128)
        self._table = tables(rows, common + own)[0].clone()
        size = rows // parts
        for row in range(rows):
            self._table[row, : common // PAGE] = self._table[row // size * size, : common // PAGE]
        self._lens = int32([common + own] * rows)
        self._q = rand(rows, 32, 128)
        starts = int32(list(range(0, rows + 1, size)))
        self._groups = Groups(
            int32(list(range(rows))), starts, int32([common] * parts), int32([common] * rows)
        )

    def launch(self, i: int, config: Any = None) -> Tensor:
        return cascade_attention(
            self._q, self._k, self._v, self._table, self._lens, self._groups, 128**-0.5
        )

    def check(self, config: Any = None) -> float:
        return error(self.launch(0), self.other(0))

    def other(self, i: int) -> Tensor:
        return decode_attention(self._q, self._k, self._v, self._table, self._lens, 128**-0.5)


def cascade(rows: int, common: int, own: int, parts: int = 1) -> Job:
    work = (parts * common + rows * own) * 128.0 * KV_BYTES
    shape = f"{rows}x({common}+{own}) {parts} groups"
    return Job(
        "cascade", shape, lambda: Cascade(rows, common, own, parts), work, peer="plain decode"
    )


class Mixed(Case):
    """One chunk beside many decode rows: both kernels, against the prefill kernel for all."""

    def __init__(self, decodes: int, length: int, count: int, context: int) -> None:
        self._k, self._v = pool(128)
        width = max(length, context) // PAGE
        self._table = torch.randint(
            0, inputs.PAGES, (decodes + 1, width), dtype=torch.int32, device=inputs.DEVICE
        )
        self._lens = int32([length] * decodes + [context])
        self._starts = int32([*range(decodes + 1), decodes + count])
        self._q = rand(decodes + count, 32, 128)
        unused = torch.empty(0, dtype=torch.int64, device=inputs.DEVICE)
        self._batch = Batch(unused, unused, self._starts, self._lens, self._table, count, context)

    def launch(self, i: int, config: Any = None) -> Tensor:
        return cuda.paged_attention(self._q, self._k, self._v, self._batch, 128**-0.5, None)

    def check(self, config: Any = None) -> float:
        return error(self.launch(0), self.other(0))

    def other(self, i: int) -> Tensor:
        return prefill_attention(
            self._q, self._k, self._v, self._table, self._lens, self._starts, 128**-0.5
        )


def mixed(decodes: int, length: int, count: int, context: int) -> Job:
    work = (decodes * length + context) * 128.0 * KV_BYTES
    shape = f"{decodes}x{length} + {count} of {context}"
    return Job(
        "mixed",
        shape,
        lambda: Mixed(decodes, length, count, context),
        work,
        peer="prefill kernel alone",
    )
