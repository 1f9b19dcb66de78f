"""Masks that the device takes out of the host's memory by itself: those whose tags say that they are
the wanted ones, and nothing of the others."""

import numpy as np
import pytest
import torch
from pagewire.grammar.shared import SharedMasks, tag_of
from pagewire_kernels import awaited_masks
from pagewire_kernels.awaited_masks import NOWHERE, AwaitedRows, TakenMasks
from pagewire_kernels.masked_sampling import LATE, sample_masked
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

    def run(self) -> tuple[list[int], torch.Tensor]:
        """(late rows, sampled tokens) after a step that has sampled 9 for each slot and row, and then
        the first token that its mask allows for each of the `count`."""
        count = self.count
        sampled_tokens = torch.full((MOST,), 9, dtype=torch.int32)
        awaited_masks.begin(self.state, self.taken)
        self.state.last_token.fill_(9)
        awaited_masks.take(self.rows, count, True, self.state, self.taken)
        held = self.taken.sampled(self.rows, count, False)
        late_rows = self.taken.late_rows(self.rows, count, self.state, self.shared.told_offsets)
        logits = torch.zeros(MOST, 32 * self.shared.masks.shape[1])
        sample_masked(logits, held, self.state.last_token, sampled_tokens, late_rows)
        late = self.taken.late[:count]
        assert set(late.tolist()) <= {0, 1}
        return late.nonzero()[:, 0].tolist(), sampled_tokens

    def first_allowed(self) -> torch.Tensor:
        """[count]: the first token of each row's mask."""
        bits = np.unpackbits(
            self.shared.masks[: self.count].copy().view(np.uint8), axis=1, bitorder="little"
        )
        return torch.from_numpy(bits.argmax(1)).int()


@pytest.mark.parametrize(("count", "words"), [(1, 3), (8, 3), (5, 1536), (8, 4749)])
def test_masks_that_are_there_are_taken(count: int, words: int) -> None:
    step = Step(count, words)
    late, sampled_tokens = step.run()
    assert late == []
    rows, slots = step.rows.rows[:count].long(), step.rows.slots[:count].long()
    assert torch.equal(sampled_tokens[rows], step.first_allowed())
    assert torch.equal(step.state.last_token[slots], step.first_allowed())
    assert int((step.state.last_token == 9).sum()) >= SLOTS - count
    got = step.taken.words[:count, :words].numpy().view(np.uint32)
    assert (got == step.shared.masks[:count]).all()
    assert (step.taken.words[count:] == 77).all()
    wanted = PROMPT_LEN + step.positions[:count] - 1
    assert step.taken.positions[:count].tolist() == wanted.tolist()


def test_rows_are_late_whose_tags_are_not_the_wanted_ones_and_their_slots_are_put_back() -> None:
    step = Step(7, 40)
    tags, openings, positions = step.shared.tags, step.openings, step.positions
    tags[1] = tag_of(openings[1:2], positions[1:2] - 1)[0]  # the mask of the token before
    tags[2] = tag_of(openings[2:3], positions[2:3] + 1)[0]
    tags[3] = tag_of(openings[3:4] + np.uint64(1), positions[3:4])[0]  # of another stream
    tags[4] = tag_of(openings[4:5], np.array([-1]))[0]  # none yet
    step.rows.tag_at[5] = NOWHERE
    computed = step.state.num_computed.clone()
    late, sampled_tokens = step.run()
    assert late == [1, 2, 3, 4, 5]
    slots, rows = step.rows.slots[late].long(), step.rows.rows[late].long()
    assert (sampled_tokens[rows] == LATE).all() and int((sampled_tokens == LATE).sum()) == 5
    assert step.state.last_token[slots].tolist() == (100 + slots).tolist()
    on_time = step.rows.slots[[0, 6]].long()
    assert torch.equal(step.state.last_token[on_time], step.first_allowed()[[0, 6]])
    computed[slots] -= 1
    assert torch.equal(step.state.num_computed, computed)
    assert (step.taken.words[late] == -1)[:, :40].all()  # what is sampled there is some token


def test_the_next_step_of_a_late_row_wants_the_same_mask() -> None:
    step = Step(2, 40)
    tag = step.shared.tags[1].copy()
    step.shared.tags[1] = 0
    assert step.run()[0] == [1]
    step.state.num_computed[2:4] += 1  # computed once more
    step.shared.tags[0] = tag_of(step.openings[:1], step.positions[:1] + 1)[0]
    step.shared.tags[1] = tag
    assert step.run()[0] == []


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
