"""Masks that the device takes out of the host's memory by itself: those whose tags say that they are
the wanted ones, and nothing of the others."""

import numpy as np
import pytest
import torch
from pagewire.grammar.shared import SharedMasks, tag_of
from pagewire_kernels import awaited_masks
from pagewire_kernels.awaited_masks import NOWHERE, AwaitedRows, TakenMasks
from pagewire_kernels.awaited_sampling import SPAN, sample_awaited
from pagewire_kernels.masked_sampling import LATE, sample_masked
from pagewire_kernels.reference import apply_token_masks
from pagewire_kernels.sampling import sample
from pagewire_kernels.sampling_map import SamplingRows
from pagewire_kernels.slot_state import SlotState

SLOTS, MOST = 12, 8
PROMPT_LEN = 5


class Step:
    """Of `count` rows, each of which has the next token of an output of its own length; row i is of
    slot 2 + i and has place i."""

    def __init__(self, count: int, words: int) -> None:
        self.count = count
        self.shared = SharedMasks(MOST, words, 1, 0)
        make = np.random.default_rng(words)
        self.shared.masks[:] = make.integers(1, 2**32, self.shared.masks.shape, np.uint32)
        self.state = SlotState.empty(SLOTS, 4, "cpu")
        self.state.last_token[:] = torch.arange(100, 100 + SLOTS)
        self.taken = TakenMasks.empty(MOST, words, self.state)
        self.taken.words.fill_(77)
        self.taken.late.fill_(77)
        self.rows = AwaitedRows.views(torch.zeros(AwaitedRows.num_bytes(MOST)).byte(), MOST)
        places = np.arange(MOST)
        self.openings = (places + 1 + (7 << 32)).astype(np.uint64)
        """Only the lower half counts."""
        self.rows.rows[:] = torch.arange(MOST).flip(0)
        self.rows.slots[:] = torch.arange(MOST) + 2
        self.rows.prompt_lens.fill_(PROMPT_LEN)
        keys = tag_of(self.openings, np.full(MOST, -1)).view(np.int64)
        self.rows.tag_keys[:] = torch.from_numpy(keys)
        self.rows.tag_at[:] = torch.from_numpy(self.shared.tag_addresses(places))
        self.rows.mask_at[:] = torch.from_numpy(self.shared.mask_addresses(places))
        self.positions = places * 3
        """In their outputs."""
        self.state.num_computed[2 : 2 + MOST] = torch.from_numpy(PROMPT_LEN + self.positions).int()
        self.shared.tags[:MOST] = tag_of(self.openings, self.positions)

    def run(self, copied: bool) -> tuple[list[int], torch.Tensor]:
        """(late rows, sampled tokens) after a step that has sampled 9 for each slot and row, and then
        the first token that its mask allows for each of the `count`. copied: masks are, before they
        are applied."""
        count = self.count
        sampled_tokens = torch.full((MOST,), 9, dtype=torch.int32)
        awaited_masks.begin(self.state, self.taken)
        self.state.last_token.fill_(9)
        awaited_masks.look(self.rows, count, True, self.state, self.taken)
        logits = torch.zeros(MOST, 32 * self.shared.masks.shape[1])
        offsets = self.shared.told_offsets
        if copied:
            awaited_masks.take(self.rows, count, self.state, self.taken)
            held = self.taken.sampled(self.rows, count)
            late_rows = self.taken.late_rows(self.rows, count, self.state, offsets)
            sample_masked(logits, held, self.state.last_token, sampled_tokens, late_rows)
        else:
            sample_awaited(
                logits, self.rows, count, self.state, self.taken, sampled_tokens, offsets
            )
        late = sampled_tokens[self.rows.rows[:count].long()] == LATE
        if copied:
            assert torch.equal(self.taken.late[:count], late.int())
        return late.nonzero()[:, 0].tolist(), sampled_tokens

    def first_allowed(self) -> torch.Tensor:
        """[count]: the first token of each row's mask."""
        bits = np.unpackbits(
            self.shared.masks[: self.count].copy().view(np.uint8), axis=1, bitorder="little"
        )
        return torch.from_numpy(bits.argmax(1)).int()


both_ways = pytest.mark.parametrize("copied", [False, True])


@both_ways
@pytest.mark.parametrize(("count", "words"), [(1, 3), (8, 3), (5, 1536), (8, 4749)])
def test_masks_that_are_there_are_taken(count: int, words: int, copied: bool) -> None:
    step = Step(count, words)
    late, sampled_tokens = step.run(copied)
    assert late == []
    rows, slots = step.rows.rows[:count].long(), step.rows.slots[:count].long()
    assert torch.equal(sampled_tokens[rows], step.first_allowed())
    assert torch.equal(step.state.last_token[slots], step.first_allowed())
    assert int((step.state.last_token == 9).sum()) >= SLOTS - count
    told = step.shared.told_tokens[:count]
    assert (told == step.first_allowed().numpy()).all() and (
        step.shared.told_tokens[count:] == 0
    ).all()
    wanted_tags = tag_of(step.openings[:count], step.positions[:count])
    assert (step.shared.told_tags[:count] == wanted_tags).all()
    assert (step.shared.told_tags[count:] == 0).all()
    if not copied:
        return
    got = step.taken.words[:count, :words].numpy().view(np.uint32)
    assert (got == step.shared.masks[:count]).all()
    assert (step.taken.words[count:] == 77).all()
    wanted = PROMPT_LEN + step.positions[:count] - 1
    assert step.taken.positions[:count].tolist() == wanted.tolist()


@both_ways
def test_rows_are_late_whose_tags_are_not_the_wanted_ones_and_their_slots_are_put_back(
    copied: bool,
) -> None:
    step = Step(7, 40)
    tags, openings, positions = step.shared.tags, step.openings, step.positions
    tags[1] = tag_of(openings[1:2], positions[1:2] - 1)[0]  # the mask of the token before
    tags[2] = tag_of(openings[2:3], positions[2:3] + 1)[0]
    tags[3] = tag_of(openings[3:4] + np.uint64(1), positions[3:4])[0]  # of another stream
    tags[4] = tag_of(openings[4:5], np.array([-1]))[0]  # none yet
    step.rows.tag_at[5] = NOWHERE
    computed = step.state.num_computed.clone()
    late, sampled_tokens = step.run(copied)
    assert late == [1, 2, 3, 4, 5]
    slots, rows = step.rows.slots[late].long(), step.rows.rows[late].long()
    assert (sampled_tokens[rows] == LATE).all() and int((sampled_tokens == LATE).sum()) == 5
    assert step.state.last_token[slots].tolist() == (100 + slots).tolist()
    on_time = step.rows.slots[[0, 6]].long()
    assert torch.equal(step.state.last_token[on_time], step.first_allowed()[[0, 6]])
    computed[slots] -= 1
    assert torch.equal(step.state.num_computed, computed)
    assert (step.shared.told_tags[late] == 0).all() and (step.shared.told_tags[[0, 6]] != 0).all()
    if copied:  # what is sampled there is some token
        assert (step.taken.words[late] == -1)[:, :40].all()


@both_ways
def test_the_next_step_of_a_late_row_wants_the_same_mask(copied: bool) -> None:
    step = Step(2, 40)
    tag = step.shared.tags[1].copy()
    step.shared.tags[1] = 0
    assert step.run(copied)[0] == [1]
    step.state.num_computed[2:4] += 1  # computed once more
    step.shared.tags[0] = tag_of(step.openings[:1], step.positions[:1] + 1)[0]
    step.shared.tags[1] = tag
    assert step.run(copied)[0] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [90, SPAN - 3, SPAN + 1, 3 * SPAN + 70])
def test_tokens_are_those_of_sampling_masked_logits(width: int, dtype: torch.dtype) -> None:
    """Whatever lies in memory behind masks and logits."""
    count, words = MOST, -(-width // 32)
    step = Step(count, words + 9)
    torch.manual_seed(width)
    logits = torch.full((MOST, width + 5), 1e9, dtype=dtype)[:, :width]
    logits.copy_(3 * torch.randn(MOST, width))
    rows = step.rows
    rows.seeds.random_(0, 2**62)
    rows.values[0] = torch.tensor([1.0, 0.0, 0.7, 2.0, 1.0, 0.3, 1.0, 0.0])
    step.shared.masks[3] = 0  # of one row, a single token
    last = width - 1
    step.shared.masks[3, last // 32] = 1 << last % 32
    masks = torch.from_numpy(step.shared.masks[:, :words].copy().view(np.int32))
    first_row, second_row = rows.rows[:2].tolist()
    spoilt, excluded = (
        int(np.flatnonzero(allowed_of(masks[i], width) == i ^ 1)[0]) for i in (0, 1)
    )
    logits[first_row, spoilt] = logits[second_row, excluded] = torch.nan
    masked = logits[rows.rows.long()].float()
    apply_token_masks(masked, torch.arange(MOST), masks)
    positions = step.state.num_computed[rows.slots.long()].long() - 1
    wanted = sample(masked, SamplingRows(rows.values, rows.seeds, positions, False))
    assert wanted.bad.tolist() == [True] + 7 * [False]
    sampled_tokens = torch.full((MOST,), -7, dtype=torch.int32)
    for _ in range(2):  # it leaves its counters as they were
        step.shared.told_tags[:] = 0
        awaited_masks.look(rows, count, False, step.state, step.taken)
        offsets = step.shared.told_offsets
        sample_awaited(logits, rows, count, step.state, step.taken, sampled_tokens, offsets)
        got = sampled_tokens[rows.rows.long()]
        assert got[0] == -1 and torch.equal(got[1:], wanted.tokens[1:].int())
        assert torch.equal(step.state.last_token[rows.slots.long()], wanted.tokens.int())
        assert step.shared.told_tags[0] == 0 and (step.shared.told_tags[1:] != 0).all()
        assert (step.shared.told_tokens[1:] == got[1:].numpy()).all()


def allowed_of(words: torch.Tensor, width: int) -> np.ndarray:
    """[width] of 0 and 1."""
    return np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[:width]


def test_columns_lie_apart() -> None:
    for most in (1, 3, 256):
        rows = AwaitedRows.views(torch.zeros(AwaitedRows.num_bytes(most)).byte(), most)
        ints = [rows.rows, rows.slots, rows.prompt_lens]
        longs = [rows.tag_keys, rows.tag_at, rows.mask_at, rows.seeds]
        parts = [*ints, *longs, *rows.values]
        for i, part in enumerate(parts, 1):
            part[:] = i
        for i, part in enumerate(parts, 1):
            assert (part == i).all() and part.data_ptr() % part.element_size() == 0
