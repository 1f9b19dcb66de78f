"""Sampling under masks in one launch, against the sampling kernel on logits that were masked
before: the same tokens, bit for bit."""

from typing import Any

import pytest
import torch
from pagewire_kernels.masked_sampling import MaskedSamplingRows, sample_masked
from pagewire_kernels.reference import apply_token_masks
from pagewire_kernels.sampling import sample
from pagewire_kernels.sampling_map import PARAMETERS, SamplingRows

STEP_ROWS, SLOTS, MOST = 9, 12, 8
PLAIN = {"temperature": [1.0, 0.0, 0.7, 2.0, 1.0, 0.3, 1.0, 0.0]}
FILTERED = {
    **PLAIN,
    "top_k": [0, 0, 5, 40, 0, 1, 3, 7],
    "top_p": [0.9, 1, 1, 0.8, 0.5, 1, 0.95, 0.1],
    "min_p": [0, 0, 0.1, 0, 0.02, 0, 0, 0.5],
}


def held_rows(count: int, width: int, seed: int, filtered: bool) -> MaskedSamplingRows:
    """Rows of every kind; the second one's mask leaves one token."""
    make = torch.Generator().manual_seed(seed)
    words = -(-width // 32)
    memory = torch.full((MaskedSamplingRows.num_bytes(MOST, words, MOST),), 255, dtype=torch.uint8)
    held = MaskedSamplingRows.views(memory, MOST, words)
    held.rows[:count] = torch.randperm(STEP_ROWS, generator=make)[:count].int()
    held.slots[:count] = torch.randperm(SLOTS, generator=make)[:count].int()
    held.masks[:count] = torch.randperm(MOST, generator=make)[:count].int()
    shape = (MOST, words)
    held.words[:] = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=make)
    if count > 1:
        second = int(held.masks[1])
        held.words[second] = 0
        held.words[second, (width - 2) // 32] = 1 << ((width - 2) % 32)
    given: Any = FILTERED if filtered else PLAIN
    named = SamplingRows.named(held.sampling.seeds, held.sampling.positions, **given)
    held.sampling.values.copy_(named.values)
    held.sampling.seeds[:count] = torch.randint(0, 2**62, (count,), generator=make)
    held.sampling.positions[:count] = torch.randint(0, 2**34, (count,), generator=make)
    return held.first(count, filtered)


def masked(logits: torch.Tensor, held: MaskedSamplingRows) -> torch.Tensor:
    rows = logits[held.rows.long()].float()
    apply_token_masks(rows, torch.arange(len(rows)), held.words[held.masks.long()])
    return rows


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "width"), [(1, 300), (8, 300), (5, 4111), (8, 3072)])
def test_tokens_are_those_of_sampling_masked_logits(count, width, dtype, filtered) -> None:
    held = held_rows(count, width, count + width, filtered)
    logits = (torch.randn(STEP_ROWS, width + 3)[:, :width] * 3).to(dtype)
    wanted = sample(masked(logits, held), held.sampling)
    before = logits.clone()
    last_token = torch.full((SLOTS,), -7, dtype=torch.int32)
    sampled_tokens = torch.full((STEP_ROWS,), -7, dtype=torch.int32)
    for _ in range(2):  # it leaves its counters as they were
        sample_masked(logits, held, last_token, sampled_tokens)
        assert torch.equal(sampled_tokens[held.rows.long()], wanted.tokens.int())
        assert torch.equal(last_token[held.slots.long()], wanted.tokens.int())
    assert int((sampled_tokens == -7).sum()) == STEP_ROWS - count
    assert int((last_token == -7).sum()) == SLOTS - count
    assert torch.equal(logits, before)
    for word, token in zip(held.words[held.masks.long()], wanted.tokens.tolist(), strict=True):
        assert (int(word[token // 32]) >> (token % 32)) & 1


def test_the_same_row_draws_the_same_in_every_batch() -> None:
    width = 1300
    held = held_rows(8, width, 1, filtered=True)
    logits = torch.randn(STEP_ROWS, width)
    last_token = torch.zeros(SLOTS, dtype=torch.int32)
    together = torch.zeros(STEP_ROWS, dtype=torch.int32)
    sample_masked(logits, held, last_token, together)
    for i in range(8):
        sampling = held.sampling.at(torch.tensor([i]))
        rows, slots, masks = (part[i : i + 1] for part in (held.rows, held.slots, held.masks))
        one = MaskedSamplingRows(rows, slots, masks, held.words, sampling)
        alone = torch.zeros(STEP_ROWS, dtype=torch.int32)
        sample_masked(logits, one, last_token, alone)
        row = int(held.rows[i])
        assert alone[row] == together[row]


def test_only_a_nan_that_the_mask_allows_spoils_a_row() -> None:
    width = 300
    held = held_rows(8, width, 2, filtered=False)
    logits = torch.randn(STEP_ROWS, width)
    held.words[:] = 2  # token 1 of each word
    logits[int(held.rows[0]), 33] = float("nan")
    logits[int(held.rows[1]), 34] = float("nan")
    wanted = sample(masked(logits, held), held.sampling)
    assert wanted.bad.tolist() == [True] + [False] * 7
    last_token = torch.zeros(SLOTS, dtype=torch.int32)
    sampled_tokens = torch.zeros(STEP_ROWS, dtype=torch.int32)
    sample_masked(logits, held, last_token, sampled_tokens)
    tokens = sampled_tokens[held.rows.long()]
    assert tokens[0] == -1 and torch.equal(tokens[1:], wanted.tokens[1:].int())
    assert torch.equal(last_token[held.slots.long()], wanted.tokens.int())


def test_one_piece_holds_all_parts_apart() -> None:
    for most, words in ((1, 1), (3, 5), (256, 1536)):
        size = MaskedSamplingRows.num_bytes(most, words, most)
        held = MaskedSamplingRows.views(torch.zeros(size, dtype=torch.uint8), most, words)
        sampling = held.sampling
        parts = [held.rows, held.slots, held.masks, held.words, *sampling.values]
        parts += [sampling.seeds, sampling.positions]
        assert len(sampling.values) == len(PARAMETERS)
        for i, part in enumerate(parts, 1):
            part[:] = i
        for i, part in enumerate(parts, 1):
            assert (part == i).all() and part.data_ptr() % part.element_size() == 0
        assert size - MaskedSamplingRows.num_bytes(most, words, most - 1) == 4 * words
