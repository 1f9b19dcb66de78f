"""The next token of rows whose masks other processes write into memory of the host
(awaited_masks.py), in one launch: masks are read there while noise is drawn, and nothing is copied.

Several programs share a row, of whose mask each reads a part. The one that is done last looks at the
tag once more, since the stream may have gone elsewhere meanwhile, and settles the row. That all of
them look at it takes three times as long: the bus brings the same line once at a time. The random
map is that of `sampling.sample` on masked logits, bit for bit. Rows with top-k, top-p or min-p go
another way.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .awaited_masks import AwaitedRows, TakenMasks, ordered
from .masked_sampling import LATE, merged, settle, wanted_tag
from .sampling import gumbel, scale_of
from .sampling_map import TEMPERATURE
from .slot_state import SlotState
from .workspace import counters

WARPS: Final = 4
THREADS: Final = 32 * WARPS
SPAN: Final = 32 * THREADS
"""Logits of a program: each of its threads has one word of the mask."""


@triton.jit
def _is_there(address, tag, THREADS: tl.constexpr):
    """Whether `tag` is at `address` of the host's memory. One thread asks, and all have its answer:
    threads that saw different tags could not go on together."""
    asks = tl.arange(0, THREADS) == 0
    at = (address + tl.zeros([THREADS], tl.int64)).to(tl.pointer_type(tl.int64))
    word = tl.load(at, mask=asks, other=0, volatile=True)
    return tl.max((asks & (word == tag)).to(tl.int32), 0) != 0


@triton.jit
def _sample_awaited(logits, rows, slots, prompt_lens, tag_keys, tag_at, mask_at, temperatures, seeds, late, numbers, ids, arrived,
                    last_token, kept_token, num_computed, sampled_tokens, token_offset, told_offset, width, stride,
                    SPAN: tl.constexpr, THREADS: tl.constexpr, S_PAD: tl.constexpr, ON_DEVICE: tl.constexpr,
                    LATE: tl.constexpr):  # fmt: skip
    held = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slices = tl.num_programs(1)
    is_late = tl.load(late + held) != 0
    mask = tl.multiple_of(tl.load(mask_at + held).to(tl.pointer_type(tl.int32)), 16)
    w = part * THREADS + tl.arange(0, THREADS)
    wanted = (w < tl.cdiv(width, 32)) & (is_late == 0)
    words = tl.load(mask + w, mask=wanted, other=0, volatile=True)

    # What follows takes about as long as the bus.
    slot = tl.load(slots + held).to(tl.int64)
    row = tl.load(rows + held).to(tl.int64)
    computed = tl.load(num_computed + slot)
    lo = part * SPAN
    i = lo + tl.arange(0, SPAN)
    x = tl.load(logits + row * stride + i, mask=i < width, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + held)
    noise = tl.zeros([SPAN], tl.float32)
    if temperature >= 1e-5:
        position = (computed - 1).to(tl.int64)
        noise = gumbel(tl.load(seeds + held), position, lo, SPAN, ON_DEVICE)

    bits = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, [SPAN])
    x = tl.where(bits != 0, x, float("-inf"))
    bad = tl.max((x != x).to(tl.int32), 0)
    x = tl.where(x != x, float("-inf"), x)
    score = x * scale_of(temperature)
    if temperature >= 1e-5:
        score += noise
    winner = tl.max(score, 0)
    out = held * slices + part
    tl.store(numbers + out * 2, winner)
    tl.store(numbers + out * 2 + 1, bad.to(tl.float32))
    tl.store(ids + out, tl.min(tl.where(score == winner, i, 2147483647), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + held, 1) == slices - 1:
        tl.store(arrived + held, 0)
        token, flag = merged(numbers, ids, held, slices, S_PAD)
        result = tl.where(flag > 0, -1, token)
        address = tl.load(tag_at + held)
        tag = wanted_tag(computed, tl.load(prompt_lens + held), tl.load(tag_keys + held))
        if is_late == 0:
            # All parts of the mask have come before their programs said so. A fence in each of them
            # would take half of the launch's time.
            if ON_DEVICE:
                ordered()
            is_late = _is_there(address, tag, THREADS) == 0
        token, result = settle(slot, token, result, is_late, computed, tag, address, kept_token, num_computed,
                               token_offset, told_offset, LATE, ON_DEVICE)  # fmt: skip
        tl.store(last_token + slot, token)
        tl.store(sampled_tokens + row, result)


def sample_awaited(
    logits: Tensor,
    awaited: AwaitedRows,
    count: int,
    state: SlotState,
    taken: TakenMasks,
    sampled_tokens: Tensor,
    told_offsets: tuple[int, int],
) -> None:
    """Behind `awaited_masks.look`: one token for each of the first `count` of `awaited`, from its row
    of logits [R, V] (float32, float16 or bfloat16; rows may be strided). sampled_tokens int32 [R]:
    the rows' tokens, -1 where an allowed logit is NaN, LATE of late ones: their slots are put back.
    The others' last tokens are overwritten, and their matchers are told; told_offsets: bytes from
    the tag of a row's mask to where its token is written, and to the token's tag. Rows and slots
    differ."""
    width, device = logits.shape[1], logits.device
    slices = triton.cdiv(width, SPAN)
    numbers = torch.empty(count * slices * 2, dtype=torch.float32, device=device)
    ids = torch.empty(count * slices, dtype=torch.int32, device=device)
    _sample_awaited[(count, slices)](logits, awaited.rows, awaited.slots, awaited.prompt_lens, awaited.tag_keys, awaited.tag_at,
        awaited.mask_at, awaited.values[TEMPERATURE], awaited.seeds, taken.late, numbers, ids, counters(device, "awaited sampling", count),
        state.last_token, state.kept_token, state.num_computed, sampled_tokens, *told_offsets, width, logits.stride(0),
        SPAN=SPAN, THREADS=THREADS, S_PAD=triton.next_power_of_2(slices), ON_DEVICE=device.type == "cuda", LATE=LATE,
        num_warps=WARPS)  # fmt: skip
