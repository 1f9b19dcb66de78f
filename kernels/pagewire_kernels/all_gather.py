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
    slots = own_slots(words_at, generation, limit, SIZE)
    for tile in range(program, rows * chunks, tl.num_programs(0)):
        column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
        at = (tile // chunks) * width + column
        send_packed(x, peers, rank, slots, at, column < width, limit, generation, SIZE)
    for tile in range(program, rows * chunks, tl.num_programs(0)):
        column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
        row = tile // chunks
        at = row * width + column
        for peer in range(SIZE):
            word = word_of(x, peers, rank, peer, slots, at, column < width, limit, generation, control, report,
                           OPERATION, SIZE, POLLS)  # fmt: skip
            tl.store(out + (row * SIZE + peer) * width + column, word, mask=column < width)
    end_generation(control, generation, PROGRAMS)


@triton.jit(do_not_specialize=["rank"])
def _one_shot(x, out, peers, control, report, rank, rows, width, chunks, data_at, limit, BLOCK: tl.constexpr,
              OPERATION: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr,
              POLLS: tl.constexpr):  # fmt: skip
    WORD: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    generation = next_generation(control)
    if program < rows * chunks:
        buffer = own_buffer(data_at, generation, limit)
        own = peer_pointer(peers, rank, buffer, WORD)
        for tile in range(program, rows * chunks, tl.num_programs(0)):
            column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
            at = (tile // chunks) * width + column
            tl.store(own + at, tl.load(x + at, mask=column < width), mask=column < width)
        signal(peers, rank, generation, 0, SIZE, PAD, PROGRAMS)
        wait(peers, rank, generation, control, report, OPERATION, 0, SIZE, PAD, PROGRAMS, POLLS)
        for tile in range(program, rows * chunks, tl.num_programs(0)):
            column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
            row = tile // chunks
            at = row * width + column
            for step in range(SIZE):
                peer = (rank + step) % SIZE
                word = tl.load(peer_pointer(peers, peer, buffer, WORD) + at, mask=column < width)
                tl.store(out + (row * SIZE + peer) * width + column, word, mask=column < width)
    end_generation(control, generation, PROGRAMS)


def takes_low_latency(memory: SymmetricMemory, x: Tensor, dim: int) -> bool:
    """Whether x fits, in whole words."""
    return x.nbytes <= memory.layout.packed_bytes and _word_bytes(x, dim) == 4


def takes_buffers(memory: SymmetricMemory, x: Tensor) -> bool:
    """Whether x fits the buffers of `one_shot`."""
    return x.nbytes <= memory.layout.buffer_bytes


def low_latency(memory: SymmetricMemory, x: Tensor, dim: int) -> Tensor:
    """All ranks' x, contiguous and not empty, behind each other along `dim`, in the order of the
    ranks. Must fit: `takes_low_latency`."""
    return _launch(memory, x, dim, _low_latency, memory.layout.packed_area)


def one_shot(memory: SymmetricMemory, x: Tensor, dim: int) -> Tensor:
    """See low_latency. Must fit: `takes_buffers`."""
    return _launch(memory, x, dim, _one_shot, memory.layout.buffer_area)


def _word_bytes(x: Tensor, dim: int) -> int:
    """Of the largest words that every piece of x which stays together has a whole number of."""
    together = x[(0,) * dim].numel() * x.element_size()
    return next(size for size in WORDS if together % size == 0 and x.data_ptr() % size == 0)


def _launch(
    memory: SymmetricMemory, x: Tensor, dim: int, kernel: Any, area: tuple[int, int]
) -> Tensor:
    dim %= x.ndim
    shape = list(x.shape)
    shape[dim] *= memory.size
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    word_bytes = _word_bytes(x, dim)
    words, gathered = (each.view(-1).view(torch.uint8).view(WORDS[word_bytes]) for each in (x, out))
    rows = x.shape[:dim].numel()
    width = words.numel() // rows
    block = min(WIDEST, triton.next_power_of_2(width))
    chunks = triton.cdiv(width, block)
    memory.launch(
        kernel,
        rows * chunks,
        (words, gathered),
        (rows, width, chunks, *area),
        BLOCK=block,
        OPERATION=ALL_GATHER,
        num_warps=max(1, min(8, block // 512)),
    )
    return out
