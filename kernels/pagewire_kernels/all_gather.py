"""All ranks' tensors behind each other. Types don't matter: what is copied are words.

`low_latency` writes words that bring their own signal to all ranks; `one_shot` reads all ranks'
buffers after one signal. See all_reduce.py.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .signals import (
    arrived,
    end_generation,
    next_generation,
    packed,
    peer_pointer,
    signal,
    wait,
)
from .symmetric_memory import SymmetricMemory

ALL_GATHER: Final = 3
WIDEST: Final = 4096
"""Words that a program copies at a time."""
WORDS: Final = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit(do_not_specialize=["rank"])
def _low_latency(x, out, peers, control, report, rank, rows, width, chunks, words_at, limit, BLOCK: tl.constexpr,
                 OPERATION: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr,
                 POLLS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    generation = next_generation(control)
    slots = words_at + (generation % 2) * SIZE * limit * 8
    for tile in range(program, rows * chunks, PROGRAMS):
        column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
        at = (tile // chunks) * width + column
        sent = packed(tl.load(x + at, mask=column < width, other=0), generation)
        for step in tl.static_range(1, SIZE):
            slot = slots + rank * limit * 8
            to = peer_pointer(peers, (rank + step) % SIZE, slot, tl.int64)
            tl.store(to + at, sent, mask=column < width)
    for tile in range(program, rows * chunks, PROGRAMS):
        column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
        row = tile // chunks
        at = row * width + column
        for peer in range(SIZE):
            if peer == rank:
                word = tl.load(x + at, mask=column < width, other=0)
            else:
                slot = peer_pointer(peers, rank, slots + peer * limit * 8, tl.int64)
                word = arrived(slot + at, column < width, generation, peer, control, report, OPERATION, SIZE, POLLS)  # fmt: skip
            tl.store(out + (row * SIZE + peer) * width + column, word, mask=column < width)
    end_generation(control, generation)


@triton.jit(do_not_specialize=["rank"])
def _one_shot(x, out, peers, control, report, rank, rows, width, chunks, data_at, limit, BLOCK: tl.constexpr,
              OPERATION: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr,
              POLLS: tl.constexpr):  # fmt: skip
    WORD: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    generation = next_generation(control)
    if program < rows * chunks:
        buffer = data_at + (generation % 2) * limit
        own = peer_pointer(peers, rank, buffer, WORD)
        for tile in range(program, rows * chunks, PROGRAMS):
            column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
            at = (tile // chunks) * width + column
            tl.store(own + at, tl.load(x + at, mask=column < width), mask=column < width)
        signal(peers, rank, generation, 0, SIZE, PAD, PROGRAMS)
        wait(peers, rank, generation, control, report, OPERATION, 0, SIZE, PAD, PROGRAMS, POLLS)
        for tile in range(program, rows * chunks, PROGRAMS):
            column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
            row = tile // chunks
            at = row * width + column
            for step in range(SIZE):
                peer = (rank + step) % SIZE
                word = tl.load(peer_pointer(peers, peer, buffer, WORD) + at, mask=column < width)
                tl.store(out + (row * SIZE + peer) * width + column, word, mask=column < width)
    end_generation(control, generation)


def takes_low_latency(memory: SymmetricMemory, x: Tensor, dim: int) -> bool:
    """Whether x fits, in whole words."""
    return x.nbytes <= memory.layout.packed_bytes and _word_bytes(x, dim) == 4


def takes_buffers(memory: SymmetricMemory, x: Tensor) -> bool:
    """Whether x fits the buffers of `one_shot`."""
    return x.nbytes <= memory.layout.buffer_bytes


def low_latency(memory: SymmetricMemory, x: Tensor, dim: int) -> Tensor:
    """All ranks' x, contiguous and not empty, behind each other along `dim`, in the order of the
    ranks. Must fit: `takes_low_latency`."""
    layout = memory.layout
    return _launch(memory, x, dim, _low_latency, layout.words_at, layout.packed_bytes // 4)


def one_shot(memory: SymmetricMemory, x: Tensor, dim: int) -> Tensor:
    """See low_latency. Must fit: `takes_buffers`."""
    layout = memory.layout
    return _launch(memory, x, dim, _one_shot, layout.data_at, layout.buffer_bytes)


def _word_bytes(x: Tensor, dim: int) -> int:
    """Of the largest words that every piece of x which stays together has a whole number of."""
    together = x[(0,) * dim].numel() * x.element_size()
    return next(size for size in WORDS if together % size == 0 and x.data_ptr() % size == 0)


def _launch(
    memory: SymmetricMemory,
    x: Tensor,
    dim: int,
    kernel: Any,
    offset: int,
    limit: int,
) -> Tensor:
    dim %= x.ndim
    shape = list(x.shape)
    shape[dim] *= memory.size
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    word_bytes = _word_bytes(x, dim)
    words = x.view(-1).view(torch.uint8).view(WORDS[word_bytes])
    rows = x.shape[:dim].numel()
    width = words.numel() // rows
    block = min(WIDEST, triton.next_power_of_2(width))
    kernel[(memory.layout.programs,)](
        words, out.view(-1).view(torch.uint8).view(WORDS[word_bytes]), memory.peers, memory.control, memory.report, memory.rank,
        rows, width, triton.cdiv(width, block), offset, limit, BLOCK=block, OPERATION=ALL_GATHER,
        num_warps=max(1, min(8, block // 512)), **memory.constants())  # fmt: skip
    return out
