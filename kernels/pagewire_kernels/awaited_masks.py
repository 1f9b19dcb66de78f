"""Masks of tokens that other processes write into memory of the host while a step is computed: the
device takes them when the step's logits are there, so that nobody who launches steps has to wait.

Of each row a tag, one word in that memory, says whose mask there is and for which position; it is
written after the mask. A row whose mask is not there in time is late: it gets no token, and its slot
is put back to where it was before the step. The tokens of the others go to that memory as well, each
before a tag of its own: the same word as that of its mask.

Behind what computes the step comes `look`, and then `awaited_sampling.sample_awaited`; or, where some
row has top-k, top-p or min-p, `take`, which copies masks, and `masked_sampling.sample_masked`.
`begin` comes before the step, where rows are waited for or prompts are computed.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masked_sampling import (
    LateRows,
    Layout,
    MaskedSamplingRows,
    columns,
    columns_bytes,
    wanted_tag,
)
from .sampling_map import PARAMETERS, SamplingRows
from .signals import now
from .slot_state import SlotState

NOWHERE: Final = 0
"""The address of the tag of a row for which no mask can come: it is late at once."""
BLOCK: Final = 2048
"""Words of a mask that are copied together."""
SLOTS: Final = 1024
"""That `begin` looks at together."""
LONGEST_NS: tl.constexpr = tl.constexpr(50_000_000)
"""Most that a row is waited for, however long its step took."""


@dataclass
class AwaitedRows:
    """G rows of a step. rows, slots, prompt_lens int32 [G]: which rows of the logits they are,
    whose, and how many tokens of each slot are prompt. tag_keys, tag_at, mask_at int64 [G]: the upper
    half of the tag that each wants, the address of its tag in the host's memory (or NOWHERE), and
    that of its mask, which has whole pieces of 16 bytes. values float32 [PARAMETERS, G], seeds int64 [G]: sampling parameters."""

    rows: Tensor
    slots: Tensor
    prompt_lens: Tensor
    tag_keys: Tensor
    tag_at: Tensor
    mask_at: Tensor
    seeds: Tensor
    values: Tensor

    @classmethod
    def num_bytes(cls, most: int) -> int:
        """Of memory for `most` rows."""
        return columns_bytes(most, _COLUMNS)

    @classmethod
    def views(cls, memory: Tensor, most: int) -> "AwaitedRows":
        """The parts of `memory`, uint8 of num_bytes(most) on any device."""
        longs, values, ints = columns(memory, most, _COLUMNS)
        return cls(*ints.unbind(0), *longs.unbind(0), values)


_COLUMNS: Final[Layout] = ((torch.int64, 4), (torch.float32, len(PARAMETERS)), (torch.int32, 3))


@dataclass
class TakenMasks:
    """What the device keeps for steps of at most M rows. words int32 [M, W]: masks, of
    which the first num_words, ceil(V / 32), count; W is a multiple of 16. positions int64 [M]: of the
    tokens that are computed; late int32 [M]: 1 where there is no mask; order int32 [M]: 0 to M - 1.
    clock int64 [2]: when the step began, in nanoseconds, and how many masks have been taken."""

    words: Tensor
    num_words: int
    positions: Tensor
    late: Tensor
    order: Tensor
    clock: Tensor

    @classmethod
    def empty(cls, most: int, words: int, state: SlotState) -> "TakenMasks":
        """For steps of `most` rows and masks of `words` words, on the device of `state`."""
        device = state.last_token.device
        return cls(
            torch.full((most, -(-words // 16) * 16), -1, dtype=torch.int32, device=device),
            words,
            torch.zeros(most, dtype=torch.int64, device=device),
            torch.zeros(most, dtype=torch.int32, device=device),
            torch.arange(most, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )

    def late_rows(
        self, awaited: AwaitedRows, count: int, state: SlotState, told_offsets: tuple[int, int]
    ) -> LateRows:
        """Of the first `count` rows; told_offsets: bytes from the tag of a row's mask to where its
        token is written, and to the token's tag."""
        return LateRows(
            self.late[:count],
            state.kept_token,
            state.num_computed,
            awaited.tag_keys[:count],
            awaited.tag_at[:count],
            awaited.prompt_lens[:count],
            *told_offsets,
        )

    def sampled(self, awaited: AwaitedRows, count: int) -> MaskedSamplingRows:
        """The first `count` rows as they are sampled, some of which restrict the vocabulary."""
        return MaskedSamplingRows(
            awaited.rows[:count],
            awaited.slots[:count],
            self.order[:count],
            self.words,
            SamplingRows(
                awaited.values[:, :count],
                awaited.seeds[:count],
                self.positions[:count],
                True,
            ),
        )


@triton.jit
def _begin(last_token, kept_token, clock, slots, BLOCK: tl.constexpr, ON_DEVICE: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    tl.store(kept_token + slot, tl.load(last_token + slot, mask=inside, other=0), mask=inside)
    if tl.program_id(0) == 0:
        if ON_DEVICE:
            tl.store(clock, now())
        tl.store(clock + 1, tl.full([], 0, tl.int64))


@triton.jit
def _acquired(address, ON_DEVICE: tl.constexpr):
    """The word at `address` of the host's memory; what was written before it is seen after it."""
    if ON_DEVICE:
        word = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];",
            "=l,l",
            [address],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    else:
        word = tl.load(address.to(tl.pointer_type(tl.int64)), volatile=True)
    return word


@triton.jit
def ordered():
    """What was read before is read before what follows."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _nap():
    """A microsecond or so, between two looks over the bus."""
    tl.inline_asm_elementwise(
        "nanosleep.u32 1000; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _look(slots, prompt_lens, tag_keys, tag_at, num_computed, positions, late, clock,
          PATIENT: tl.constexpr, ON_DEVICE: tl.constexpr):  # fmt: skip
    """One warp a row: threads that saw different tags could not go on together."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    address = tl.load(tag_at + row)
    computed = tl.load(num_computed + tl.load(slots + row).to(tl.int64))
    tl.store(positions + row, (computed - 1).to(tl.int64))
    tag = wanted_tag(computed, tl.load(prompt_lens + row), tl.load(tag_keys + row))
    there = tl.full([], 0, tl.int1)
    if address != 0:
        there = _acquired(address, ON_DEVICE) == tag
        if PATIENT and ON_DEVICE:
            began = now()
            computing = tl.minimum(began - tl.load(clock), LONGEST_NS)
            waits = there == 0
            while waits:
                _nap()
                there = _acquired(address, ON_DEVICE) == tag
                # As long as it would take to compute the rows that are missing once more.
                missing = rows - tl.load(clock + 1, volatile=True)
                waits = (there == 0) & ((now() - began) * rows < computing * missing)
            if there:
                tl.atomic_add(clock + 1, tl.full([], 1, tl.int64))
    tl.store(late + row, 1 - there.to(tl.int32))


@triton.jit
def _take(slots, prompt_lens, tag_keys, tag_at, mask_at, num_computed, words, late, num_words,
          stride, BLOCK: tl.constexpr, ON_DEVICE: tl.constexpr):  # fmt: skip
    """One warp a row, as above."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.multiple_of(words + row * stride, 16)
    end = tl.cdiv(num_words, 4) * 4
    there = tl.load(late + row) == 0
    if there:
        mask = tl.multiple_of(tl.load(mask_at + row).to(tl.pointer_type(tl.int32)), 16)
        for start in range(0, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < end
            tl.store(own + i, tl.load(mask + i, mask=inside, other=0, volatile=True), mask=inside)
        if ON_DEVICE:
            ordered()
        # The stream may have gone elsewhere meanwhile, and another one have its place.
        computed = tl.load(num_computed + tl.load(slots + row).to(tl.int64))
        tag = wanted_tag(computed, tl.load(prompt_lens + row), tl.load(tag_keys + row))
        there = _acquired(tl.load(tag_at + row), ON_DEVICE) == tag
        tl.store(late + row, 1 - there.to(tl.int32))
    if there == 0:
        for start in range(0, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(own + i, tl.full([BLOCK], -1, tl.int32), mask=i < end)


def begin(state: SlotState, taken: TakenMasks) -> None:
    """Before a step is computed whose rows are waited for, or which computes more than the last
    tokens of slots: decode steps alone keep these themselves."""
    slots = state.last_token.shape[0]
    _begin[(triton.cdiv(slots, SLOTS),)](
        state.last_token, state.kept_token, taken.clock, slots, BLOCK=SLOTS, ON_DEVICE=state.last_token.is_cuda
    )  # fmt: skip


def look(
    awaited: AwaitedRows, count: int, patient: bool, state: SlotState, taken: TakenMasks
) -> None:
    """Which of the first `count` of `awaited` have a mask, and which are late: their logits are
    there, and their slots count what the step has computed. patient: masks are waited for, as long as
    it would take to compute so many rows again."""
    _look[(count,)](awaited.slots, awaited.prompt_lens, awaited.tag_keys, awaited.tag_at, state.num_computed,
        taken.positions, taken.late, taken.clock, PATIENT=patient, ON_DEVICE=state.last_token.is_cuda, num_warps=1)  # fmt: skip


def take(awaited: AwaitedRows, count: int, state: SlotState, taken: TakenMasks) -> None:
    """Behind `look`: copy the masks of the first `count` of `awaited` that are not late."""
    _take[(count,)](awaited.slots, awaited.prompt_lens, awaited.tag_keys, awaited.tag_at, awaited.mask_at,
        state.num_computed, taken.words, taken.late, taken.num_words, taken.words.stride(0),
        BLOCK=BLOCK, ON_DEVICE=state.last_token.is_cuda, num_warps=1)  # fmt: skip
