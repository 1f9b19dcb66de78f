"""The next token of rows that masks restrict, from the logits of a whole step: masks are applied
while logits are read, and the tokens go where the step has put those that it sampled without them.

One launch, or three where some row has top-k, top-p or min-p: those look at what the mask leaves.
The random map is that of `sampling.sample` on logits in float32 of which the excluded ones are
minus infinity, bit for bit. Everything that changes from step to step is read from the device, in
one piece (`MaskedSamplingRows.views`), so that a step uploads once.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling import _slice, slices_of, thresholds
from .sampling_map import PARAMETERS, SamplingRows
from .workspace import counters

BLOCK: Final = 1024
"""Logits that a program looks at together."""
ALIGNED: Final = 16
"""Bytes: where the parts of the one piece begin."""
Layout = tuple[tuple[torch.dtype, int], ...]
"""Of memory that is brought to the device in one piece: columns of each dtype."""
LATE: Final = -2
"""In place of a token, of a row that goes without one."""


@dataclass
class MaskedSamplingRows:
    """G rows of a step. rows, slots, masks: int32 [G]: which rows of the logits they are, whose, and
    which rows of `words` are theirs. words: int32 [M, ceil(V / 32)]: bit i % 32 of word i // 32 is
    set where token i may come; of those that are theirs at least one is. sampling: of the G
    rows."""

    rows: Tensor
    slots: Tensor
    masks: Tensor
    words: Tensor
    sampling: SamplingRows

    @classmethod
    def num_bytes(cls, most: int, words: int, count: int) -> int:
        """Bytes before the end of the `count`th mask, in memory for `most` rows and masks."""
        return columns_bytes(most, _HEAD) + 4 * words * count

    @classmethod
    def views(cls, memory: Tensor, most: int, words: int) -> "MaskedSamplingRows":
        """The parts of `memory`, uint8 of num_bytes(most, words, most) on any device, for `most`
        rows and masks. Masks come last: of fewer, the beginning is all that is needed."""
        longs, values, ints = columns(memory, most, _HEAD)
        at = columns_bytes(most, _HEAD)
        masks = memory[at : at + 4 * words * most].view(torch.int32).view(most, words)
        sampling = SamplingRows(values, longs[0], longs[1], False)
        return cls(ints[0], ints[1], ints[2], masks, sampling)

    def first(self, count: int, filtered: bool) -> "MaskedSamplingRows":
        """A view of the first `count` rows; filtered: some of them restrict the vocabulary."""
        sampling = self.sampling
        return MaskedSamplingRows(
            self.rows[:count],
            self.slots[:count],
            self.masks[:count],
            self.words,
            SamplingRows(
                sampling.values[:, :count],
                sampling.seeds[:count],
                sampling.positions[:count],
                filtered,
            ),
        )


@dataclass
class LateRows:
    """Which of the G rows go without a token: late int32 [G], 1 for those. Their slots are put back
    to where they were before the step: kept_token int32 [S], their last tokens then; num_computed
    int32 [S], which the step has counted up.

    Of the others, tokens are written to the host's memory, where their next masks are computed, and
    then their tags. tag_keys, tag_at int64 [G], prompt_lens int32 [G]: see
    awaited_masks.AwaitedRows; token_offset, told_offset: bytes from the tag of a row's mask to its
    token and to the token's tag."""

    late: Tensor
    kept_token: Tensor
    num_computed: Tensor
    tag_keys: Tensor
    tag_at: Tensor
    prompt_lens: Tensor
    token_offset: int
    told_offset: int

    def arguments(self) -> tuple[Tensor | int, ...]:
        """In order, of the kernel."""
        return (self.late, self.kept_token, self.num_computed, self.tag_keys, self.tag_at, self.prompt_lens,
                self.token_offset, self.told_offset)  # fmt: skip


_NONE_LATE: Final = (None,) * 8
_HEAD: Final[Layout] = ((torch.int64, 2), (torch.float32, len(PARAMETERS)), (torch.int32, 3))
"""What comes before the masks: seeds and positions, sampling parameters, indices."""


def columns(memory: Tensor, most: int, layout: Layout) -> list[Tensor]:
    """Parts of `memory`, uint8 of columns_bytes(most, layout) or more: [columns, most] of each dtype."""
    at = 0
    parts: list[Tensor] = []
    for dtype, count in layout:
        size = count * most * dtype.itemsize
        parts.append(memory[at : at + size].view(dtype).view(count, most))
        at += _aligned(size)
    return parts


def columns_bytes(most: int, layout: Layout) -> int:
    """Of memory for `columns`."""
    return sum(_aligned(count * most * dtype.itemsize) for dtype, count in layout)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@triton.jit
def _gather(logits, rows, masks, words, out, width, stride, num_words, BLOCK: tl.constexpr):
    """Logits that masks leave, in float32; minus infinity for the others."""
    held = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + held).to(tl.int64)
    own = words + tl.load(masks + held).to(tl.int64) * num_words
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    word = tl.load(own + i // 32, mask=inside, other=0)
    x = tl.load(logits + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(((word >> (i % 32)) & 1) != 0, x, float("-inf"))
    tl.store(out + held * width + i, x, mask=inside)


@triton.jit
def _tell(token_address, token, tag_address, tag, ON_DEVICE: tl.constexpr):
    """Write to the host's memory; who sees the tag there sees the token."""
    if ON_DEVICE:
        # All threads write the same, each in this order: no other one need be waited for.
        tl.inline_asm_elementwise(
            "st.relaxed.sys.global.b64 [$1], $2; st.release.sys.global.b64 [$3], $4; mov.u32 $0, 0;",
            "=r,l,l,l,l",
            [token_address, token, tag_address, tag],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(token_address.to(tl.pointer_type(tl.int64)), token)
        tl.store(tag_address.to(tl.pointer_type(tl.int64)), tag)


@triton.jit
def merged(numbers, ids, row, slices, S_PAD: tl.constexpr):
    """(the token of the best score, the largest flag) of a row whose slices have written both, and
    their ids: numbers float32 [rows, slices, 2], ids int32 [rows, slices]."""
    s = tl.arange(0, S_PAD)
    found = row * slices + s
    inside = s < slices
    score = tl.load(numbers + found * 2, mask=inside, other=float("-inf"), cache_modifier=".cg")
    flag = tl.load(numbers + found * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
    tokens = tl.load(ids + found, mask=inside, other=2147483647, cache_modifier=".cg")
    token = tl.min(tl.where(score == tl.max(score, 0), tokens, 2147483647), 0)
    return token, tl.max(flag, 0)


@triton.jit
def wanted_tag(computed, prompt_len, key):
    """Of the mask for the token that is sampled once `computed` tokens are: its position counts in
    the output."""
    return key | (computed - prompt_len + 1).to(tl.int64)


@triton.jit
def settle(slot, token, result, is_late, computed, tag, address, kept_token, num_computed,
           token_offset, told_offset, LATE: tl.constexpr, ON_DEVICE: tl.constexpr):  # fmt: skip
    """The last token and the result of a row that has sampled `token`, or is late: then its slot is
    put back. Else matchers are told."""
    token = tl.where(is_late, tl.load(kept_token + slot), token)
    result = tl.where(is_late, LATE, result)
    tl.store(num_computed + slot, tl.where(is_late, computed - 1, computed))
    if (result >= 0) & (address != 0):
        _tell(address + token_offset, result.to(tl.int64), address + told_offset, tag, ON_DEVICE)
    return token, result


@triton.jit(do_not_specialize=["slices"])
def _sample_masked(logits, rows, slots, masks, words, thresholds, temperatures, seeds, positions, numbers, ids, arrived,
                   last_token, sampled_tokens, late, kept_token, num_computed, tag_keys, tag_at, prompt_lens,
                   token_offset, told_offset, width, stride, num_words, slices,
                   S_PAD: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr, FAST: tl.constexpr,
                   MAY_BE_LATE: tl.constexpr, LATE: tl.constexpr):  # fmt: skip
    held = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.load(rows + held).to(tl.int64)
    span = tl.cdiv(tl.cdiv(width, slices), BLOCK) * BLOCK
    lo = part * span
    hi = tl.minimum(lo + span, width)
    threshold = tl.full([], float("-inf"), tl.float32)
    if FILTERED:
        threshold = tl.load(thresholds + held)
    best, where, _, _, bad = _slice(
        logits + row * stride,
        words + tl.load(masks + held).to(tl.int64) * num_words,
        lo,
        hi,
        threshold,
        tl.load(temperatures + held),
        tl.load(seeds + held),
        tl.load(positions + held),
        True,
        BLOCK,
        FAST,
    )
    winner = tl.max(best, 0)
    out = held * slices + part
    tl.store(numbers + out * 2, winner)
    tl.store(numbers + out * 2 + 1, tl.sum(bad, 0).to(tl.float32))
    tl.store(ids + out, tl.min(tl.where(best == winner, where, 2147483647), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + held, 1) == slices - 1:
        tl.store(arrived + held, 0)
        token, flag = merged(numbers, ids, held, slices, S_PAD)
        result = tl.where(flag > 0, -1, token)
        slot = tl.load(slots + held).to(tl.int64)
        if MAY_BE_LATE:
            is_late = tl.load(late + held) != 0
            computed = tl.load(num_computed + slot)
            address = tl.load(tag_at + held)
            tag = wanted_tag(computed, tl.load(prompt_lens + held), tl.load(tag_keys + held))
            token, result = settle(slot, token, result, is_late, computed, tag, address, kept_token, num_computed,
                                   token_offset, told_offset, LATE, FAST)  # fmt: skip
        tl.store(last_token + slot, token)
        tl.store(sampled_tokens + row, result)


def sample_masked(
    logits: Tensor,
    held: MaskedSamplingRows,
    last_token: Tensor,
    sampled_tokens: Tensor,
    late: LateRows | None = None,
) -> None:
    """One token for each of `held`, from its row of logits [R, V] (float32, float16 or bfloat16;
    rows may be strided). sampled_tokens int32 [R]: the rows' tokens, -1 where an allowed logit is
    NaN, LATE of those that go without; last_token int32 [S]: their slots' too, always a token. Rows
    and slots differ. late: which ones go without a token, and where the others' are written besides;
    None: none, and nowhere."""
    count, width = held.rows.shape[0], logits.shape[1]
    num_words = held.words.shape[1]
    slices = slices_of(count, width, BLOCK)
    device = logits.device
    numbers = torch.empty(count * slices * 2, dtype=torch.float32, device=device)
    ids = torch.empty(count * slices, dtype=torch.int32, device=device)
    sampling = held.sampling
    least = None
    if sampling.filtered:
        left = torch.empty(count, width, dtype=torch.float32, device=device)
        _gather[(count, triton.cdiv(width, 4096))](
            logits,
            held.rows,
            held.masks,
            held.words,
            left,
            width,
            logits.stride(0),
            num_words,
            BLOCK=4096,
        )
        least = thresholds(left, sampling)
    kept = _NONE_LATE if late is None else late.arguments()
    _sample_masked[(count, slices)](logits, held.rows, held.slots, held.masks, held.words, least, sampling.temperature,
        sampling.seeds, sampling.positions, numbers, ids, counters(device, "masked sampling", count), last_token,
        sampled_tokens, *kept, width, logits.stride(0), num_words, slices, S_PAD=triton.next_power_of_2(slices),
        BLOCK=BLOCK, FILTERED=sampling.filtered, FAST=device.type == "cuda", MAY_BE_LATE=late is not None, LATE=LATE,
        num_warps=4)  # fmt: skip
