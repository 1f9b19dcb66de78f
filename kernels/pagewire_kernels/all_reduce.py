"""Sums over ranks, alone and fused with the residual addition and the norm after them.

Three kernels for three sizes, whose sums and residuals are the same bits: every sum is taken in
float32 in the order of the ranks and rounded once to the type of its parts, before a residual is
added. Norms are the same bits on all ranks and in every run of one kernel; between kernels the last
bit may differ.

- `low_latency`: each rank writes its part, as words that bring their own signal, to all others and
  reads what came. One way over the link and no fence; twice the bytes. For the rows of a decode.
- `one_shot`: each rank reads all parts from where they were computed. One signal, two ways.
- `two_shot`: each rank sums its share of the rows, then all gather the sums: 2 / size of the
  bytes, and one more signal. `reduce_scatter` is its first half. With `scattered` the residual and
  the norm are of the rank's share alone, as in sequence parallelism.

A row belongs to one program, so a norm needs no second kernel and program p waits for programs p of
other ranks only. Launches have no more programs than a GPU has multiprocessors, and let no kernel in
before they end: programs that wait would otherwise keep those from running that they wait for.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm import normalized
from .signals import (
    end_generation,
    next_generation,
    own_buffer,
    own_slots,
    peer_pointer,
    send_packed,
    signal,
    wait,
    word_of,
)
from .symmetric_memory import SymmetricMemory

ALL_REDUCE: Final = 1
REDUCE_SCATTER: Final = 2
NO_NORM, WHOLE, SHARE = range(3)
"""Whether a norm follows, and of which rows: all, or those of the rank's share."""
CHUNK: Final = 4096
"""Elements of a row where a sum stands alone: then only their number counts."""
WIDEST: Final = 1 << 14
"""The widest rows that fit a program's registers."""


@dataclass(frozen=True)
class AddNorm:
    """What follows a sum: added to residual [T, H], which is overwritten, and normed by weight [H]
    and `eps`. `centre` and `bias` [H]: a layer norm. residual must be contiguous."""

    residual: Tensor
    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centre: bool = False


@triton.jit
def _add_norm(value, residual, i, inside, w, bias, eps, DTYPE: tl.constexpr, H: tl.constexpr, CENTRE: tl.constexpr,
              BIAS: tl.constexpr):  # fmt: skip
    """value, a sum in the type of its parts, with the row of the residual that `residual` points to:
    normed."""
    total = value.to(tl.float32) + tl.load(residual + i, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(residual.dtype.element_ty)
    tl.store(residual + i, rounded, mask=inside)
    return normalized(rounded.to(tl.float32), w, i, inside, bias, eps, H, CENTRE, BIAS).to(DTYPE)


@triton.jit
def _sum_of_ranks(peers, buffer, at, inside, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """float32."""
    total = tl.load(peer_pointer(peers, 0, buffer, DTYPE) + at, mask=inside, other=0.0)
    total = total.to(tl.float32)
    for peer in tl.static_range(1, SIZE):
        part = tl.load(peer_pointer(peers, peer, buffer, DTYPE) + at, mask=inside, other=0.0)
        total += part.to(tl.float32)
    return total


@triton.jit
def _halves(word, DTYPE: tl.constexpr):
    """The two 16-bit numbers of each word, as float32."""
    low = (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = ((word >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit(do_not_specialize=["rank"])
def _low_latency(x, residual, weight, bias, out, peers, control, report, rank, count, rows, eps, words_at, limit, H: tl.constexpr,
                 BLOCK: tl.constexpr, A_WORD: tl.constexpr, NORM: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr,
                 OPERATION: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr,
                 POLLS: tl.constexpr):  # fmt: skip
    """A_WORD: elements a word. `limit`: words that one rank may write."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    generation = next_generation(control)
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK // A_WORD)
    words = x.to(tl.pointer_type(tl.int32))
    slots = own_slots(words_at, generation, limit, SIZE)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * (H // A_WORD) + j
        inside = (j < H // A_WORD) & (at < count // A_WORD)
        send_packed(words, peers, rank, slots, at, inside, limit, generation, SIZE)
    w = i
    if NORM:
        w = tl.load(weight + i, mask=i < H, other=0.0).to(tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * (H // A_WORD) + j
        inside = (j < H // A_WORD) & (at < count // A_WORD)
        low = tl.zeros((BLOCK // A_WORD,), tl.float32)
        high = low
        for peer in tl.static_range(0, SIZE):
            word = word_of(words, peers, rank, peer, slots, at, inside, limit, generation, control, report,
                           OPERATION, SIZE, POLLS)  # fmt: skip
            if A_WORD == 2:
                part, part_high = _halves(word, DTYPE)
            else:
                part = word.to(DTYPE, bitcast=True)
                part_high = part
            if peer == 0:
                low = part
                high = part_high
            else:
                low += part
                high += part_high
        if A_WORD == 2:  # noqa: SIM108
            total = tl.interleave(low, high)
        else:
            total = low
        value = total.to(DTYPE)
        inside_row = (i < H) & (row * H + i < count)
        if NORM:
            value = _add_norm(value, residual + row * H, i, inside_row, w, bias, eps, DTYPE, H, CENTRE, BIAS)  # fmt: skip
        tl.store(out + row * H + i, value, mask=inside_row)
    end_generation(control, generation, PROGRAMS)


@triton.jit(do_not_specialize=["rank"])
def _one_shot(x, residual, weight, bias, out, peers, control, report, rank, count, rows, eps, data_at, limit, H: tl.constexpr,
              BLOCK: tl.constexpr, NORM: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, OPERATION: tl.constexpr,
              SIZE: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr, POLLS: tl.constexpr):  # fmt: skip
    """`limit`: bytes of a buffer. x is copied into this rank's buffer here, and not written there by
    the product before: which buffer it is, only the device knows."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    generation = next_generation(control)
    if program < rows:
        i = tl.arange(0, BLOCK)
        buffer = own_buffer(data_at, generation, limit)
        own = peer_pointer(peers, rank, buffer, DTYPE)
        for row in range(program, rows, tl.num_programs(0)):
            inside = (i < H) & (row * H + i < count)
            value = tl.load(x + row * H + i, mask=inside, other=0.0)
            tl.store(own + row * H + i, value, mask=inside)
        signal(peers, rank, generation, 0, SIZE, PAD, PROGRAMS)
        w = i
        if NORM:
            w = tl.load(weight + i, mask=i < H, other=0.0).to(tl.float32)
        wait(peers, rank, generation, control, report, OPERATION, 0, SIZE, PAD, PROGRAMS, POLLS)
        for row in range(program, rows, tl.num_programs(0)):
            inside = (i < H) & (row * H + i < count)
            value = _sum_of_ranks(peers, buffer, row * H + i, inside, DTYPE, SIZE).to(DTYPE)
            if NORM:
                value = _add_norm(value, residual + row * H, i, inside, w, bias, eps, DTYPE, H, CENTRE, BIAS)  # fmt: skip
            tl.store(out + row * H + i, value, mask=inside)
    end_generation(control, generation, PROGRAMS)


@triton.jit(do_not_specialize=["rank"])
def _two_shot(x, residual, weight, bias, out, peers, control, report, rank, count, share, eps, data_at, limit, H: tl.constexpr,
              BLOCK: tl.constexpr, NORM: tl.constexpr, GATHER: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr,
              OPERATION: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr,
              POLLS: tl.constexpr):  # fmt: skip
    """`share`: rows of each rank; the last ones may lie beyond the end. Sums replace this rank's
    parts in its own buffer: of its share nobody else reads them."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    generation = next_generation(control)
    if program < share:
        i = tl.arange(0, BLOCK)
        buffer = own_buffer(data_at, generation, limit)
        own = peer_pointer(peers, rank, buffer, DTYPE)
        for line in range(program, share, tl.num_programs(0)):
            for owner in range(SIZE):
                at = (owner * share + line) * H + i
                inside = (i < H) & (at < count)
                tl.store(own + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)
        signal(peers, rank, generation, 0, SIZE, PAD, PROGRAMS)
        w = i
        if NORM != 0:
            w = tl.load(weight + i, mask=i < H, other=0.0).to(tl.float32)
        wait(peers, rank, generation, control, report, OPERATION, 0, SIZE, PAD, PROGRAMS, POLLS)
        for line in range(program, share, tl.num_programs(0)):
            at = (rank * share + line) * H + i
            inside = (i < H) & (at < count)
            value = _sum_of_ranks(peers, buffer, at, inside, DTYPE, SIZE).to(DTYPE)
            if NORM == 2:
                value = _add_norm(value, residual + line * H, i, inside, w, bias, eps, DTYPE, H, CENTRE, BIAS)  # fmt: skip
            if GATHER:
                tl.store(own + at, value, mask=inside)
            else:
                tl.store(out + line * H + i, value, mask=i < H)
        if GATHER:
            signal(peers, rank, generation, 1, SIZE, PAD, PROGRAMS)
            wait(peers, rank, generation, control, report, OPERATION, 1, SIZE, PAD, PROGRAMS, POLLS)
            for line in range(program, share, tl.num_programs(0)):
                for step in range(SIZE):
                    owner = (rank + step) % SIZE
                    at = (owner * share + line) * H + i
                    inside = (i < H) & (at < count)
                    there = peer_pointer(peers, owner, buffer, DTYPE)
                    value = tl.load(there + at, mask=inside, other=0.0)
                    if NORM == 1:
                        row = residual + (owner * share + line) * H
                        value = _add_norm(value, row, i, inside, w, bias, eps, DTYPE, H, CENTRE, BIAS)  # fmt: skip
                    tl.store(out + at, value, mask=inside)
    end_generation(control, generation, PROGRAMS)


def share_of(rows: int, size: int) -> int:
    """Rows that each of `size` ranks sums; the last ranks may have fewer."""
    return -(-rows // size)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def _check(x: Tensor, norm: AddNorm | None) -> None:
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(
            "the parts of a sum must be contiguous and begin at a multiple of 16 bytes"
        )
    if norm is not None and not norm.residual.is_contiguous():
        raise ValueError("the residual must be contiguous")


def _geometry(x: Tensor, norm: AddNorm | None) -> dict[str, Any]:
    """How x is cut into rows, with what follows, as all kernels take it."""
    return _rows_of(CHUNK if norm is None else x.shape[-1], norm)


def _rows_of(width: int, norm: AddNorm | None) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {
        "H": width,
        "BLOCK": block,
        "CENTRE": norm is not None and norm.centre,
        "BIAS": norm is not None and norm.bias is not None,
        "num_warps": _warps(block),
    }


def _launch(
    memory: SymmetricMemory,
    kernel: Any,
    x: Tensor,
    out: Tensor,
    norm: AddNorm | None,
    rows: int,
    area: tuple[int, int],
    **options: Any,
) -> Tensor:
    """`out`, which `kernel` fills. rows: of x, or of each rank's share. area: where in a region the
    kernel's data are, and how much fits."""
    follows = (None, None, None) if norm is None else (norm.residual, norm.weight, norm.bias)
    eps = 0.0 if norm is None else norm.eps
    memory.launch(kernel, rows, (x, *follows, out), (x.numel(), rows, eps, *area), **options)
    return out


def takes_low_latency(memory: SymmetricMemory, x: Tensor) -> bool:
    """Whether x fits, in whole words."""
    whole = x.shape[-1] * x.element_size() % 4 == 0 and x.element_size() in (2, 4)
    return whole and x.nbytes <= memory.layout.packed_bytes


def takes_buffers(memory: SymmetricMemory, x: Tensor) -> bool:
    """Whether x fits the buffers of `one_shot` and `two_shot`."""
    return x.nbytes <= memory.layout.buffer_bytes


def pieces(memory: SymmetricMemory, x: Tensor) -> list[slice]:
    """Along the first dimension of x, as much at a time as the buffers take, each piece from a
    multiple of 16 bytes on; none where that cannot be."""
    if takes_buffers(memory, x):
        return [slice(None)]
    row_bytes = x[0].nbytes
    rows = memory.layout.buffer_bytes // row_bytes
    if not rows or row_bytes % 16:
        return []
    return [slice(at, at + rows) for at in range(0, len(x), rows)]


def takes_norm(x: Tensor) -> bool:
    """Whether rows are narrow enough for a norm in the same kernel."""
    return x.shape[-1] <= WIDEST


def low_latency(
    memory: SymmetricMemory, x: Tensor, norm: AddNorm | None = None, out: Tensor | None = None
) -> Tensor:
    """The sum of all ranks' x, of any shape; with `norm`, x is [T, H], and the result is normed. x
    is contiguous, and not empty, as for all kernels here. `out`: for the result, like x. Must fit:
    `takes_low_latency`."""
    words = 4 // x.element_size()
    return _whole(memory, _low_latency, x, norm, out, memory.layout.packed_area, A_WORD=words)


def one_shot(
    memory: SymmetricMemory, x: Tensor, norm: AddNorm | None = None, out: Tensor | None = None
) -> Tensor:
    """See low_latency. Must fit: `takes_buffers`."""
    return _whole(memory, _one_shot, x, norm, out, memory.layout.buffer_area)


def _whole(
    memory: SymmetricMemory,
    kernel: Any,
    x: Tensor,
    norm: AddNorm | None,
    out: Tensor | None,
    area: tuple[int, int],
    **options: Any,
) -> Tensor:
    """A sum of which each rank computes all rows."""
    _check(x, norm)
    geometry = _geometry(x, norm)
    rows = triton.cdiv(x.numel(), geometry["H"])
    options |= {"NORM": norm is not None, "OPERATION": ALL_REDUCE, **geometry}
    out = torch.empty_like(x) if out is None else out
    return _launch(memory, kernel, x, out, norm, rows, area, **options)


def _shared(
    memory: SymmetricMemory,
    x: Tensor,
    out: Tensor,
    norm: AddNorm | None,
    normed_rows: int,
    geometry: dict[str, Any],
    *,
    gather: bool,
) -> Tensor:
    """A sum of which each rank computes its share of the rows."""
    rows = share_of(triton.cdiv(x.numel(), geometry["H"]), memory.size)
    operation = ALL_REDUCE if gather else REDUCE_SCATTER
    options = {"NORM": normed_rows, "GATHER": gather, "OPERATION": operation, **geometry}
    return _launch(memory, _two_shot, x, out, norm, rows, memory.layout.buffer_area, **options)


def two_shot(
    memory: SymmetricMemory, x: Tensor, norm: AddNorm | None = None, out: Tensor | None = None
) -> Tensor:
    """See low_latency. Must fit: `takes_buffers`."""
    _check(x, norm)
    normed_rows = NO_NORM if norm is None else WHOLE
    out = torch.empty_like(x) if out is None else out
    return _shared(memory, x, out, norm, normed_rows, _geometry(x, norm), gather=True)


def scattered(memory: SymmetricMemory, x: Tensor, norm: AddNorm) -> Tensor:
    """two_shot where each rank adds and norms only its share of the rows: norm.residual [share, H]
    are those from rank * share on (`share_of`), and what lies beyond the last row is left alone.
    The result is whole: x [T, H] -> [T, H]."""
    _check(x, norm)
    return _shared(memory, x, torch.empty_like(x), norm, SHARE, _geometry(x, norm), gather=True)


def reduce_scatter(memory: SymmetricMemory, x: Tensor) -> Tensor:
    """This rank's share of the sum of all ranks' x [T, H]: rows from rank * share on, [share, H]
    (`share_of`); those beyond the last are zeros."""
    _check(x, None)
    rows, width = x.shape
    out = torch.empty(share_of(rows, memory.size), width, dtype=x.dtype, device=x.device)
    return _shared(memory, x, out, None, NO_NORM, _rows_of(width, None), gather=False)
