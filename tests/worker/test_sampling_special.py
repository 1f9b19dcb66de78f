"""The GPU's eager resampling on CPU tensors, several steps ahead of the host: the rows of a
captured step's logits against transformers."""

import numpy as np
import pytest
import torch
from pagewire.worker.gpu.resample import StepLogprobs
from pagewire_protocol.messages import unpack
from pagewire_protocol.sampling import Sampling
from worker.sampling_reference import words
from worker.special_rows import VOCAB, Device, Rows


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_every_kind_against_transformers(seed):
    rows = Rows(seed)
    for _ in range(25):
        logits, slots, tokens, extra = rows.step()
        check_logprobs(extra, logits, slots, tokens, rows.given)


def check_logprobs(extra, logits, slots, tokens, given):
    asked = [i for i, slot in enumerate(slots) if given[slot].logprobs >= 0]
    if not asked:
        assert extra is None
        return
    columns = extra.columns(np.array(tokens, np.int32))
    rows, counts, ranks, ids = (
        unpack("i", c).tolist() for c in (columns.rows, columns.counts, columns.ranks, columns.ids)
    )
    assert rows == asked and counts == [given[slots[i]].logprobs + 1 for i in asked]
    exact, at = torch.log_softmax(logits.double(), -1), 0
    values = unpack("f", columns.values).tolist()
    for row, count, rank in zip(rows, counts, ranks, strict=True):
        mine = ids[at : at + count]
        assert mine[0] == tokens[row] and rank == 1 + int(
            (exact[row] > exact[row, tokens[row]]).sum()
        )
        assert values[at : at + count] == pytest.approx(exact[row, mine].tolist(), abs=1e-5)
        assert values[at + 1 : at + count] == pytest.approx(
            exact[row].topk(count - 1).values.tolist(), abs=1e-5
        )
        at += count


def test_batches_without_special_rows_are_left_alone():
    device = Device()
    device.admit(0, [5], Sampling(0, 9))
    report = torch.tensor([7], dtype=torch.int32)
    assert (
        device.special.resample(torch.full((1, VOCAB), float("nan")), np.array([0]), report) is None
        and report.item() == 7
    )


def test_a_broken_row_is_flagged_and_its_neighbours_go_on():
    device = Device()
    for slot in range(3):
        device.admit(
            slot,
            [5, 6],
            Sampling(
                0, 9, temperature=0.0, logprobs=1, bad_words=words([7]), frequency_penalty=1.0
            ),
        )
    logits = torch.zeros(3, VOCAB)
    logits[:, 7], logits[:, 9], logits[1, 30] = 5.0, 4.0, float("nan")
    tokens, extra = device.step(logits, [0, 1, 2])
    assert tokens == [9, -1, 9] and extra is not None
    assert len(extra.columns(np.array(tokens, np.int32)).ranks) == 12


def test_prompts_are_scored_from_the_steps_logits():
    device, torch_logits = Device(), torch.randn(40, VOCAB)
    prompt = [5, 9, 11, 3, 8]
    device.admit(0, [4, 4, 4], Sampling(0, 9))
    device.admit(1, prompt, Sampling(0, 9, prompt_logprobs=2))
    extra = StepLogprobs()
    run, first, end = np.array([0, 1]), np.array([0, 1]), np.array([3, 5])
    device.special.prompt_hook(run, first, end, extra)(lambda rows: torch_logits[rows])
    (found,) = extra.prompt_logprobs()
    assert (found.slot, found.first) == (1, 2) and unpack("i", found.counts).tolist() == [3, 3, 3]
    exact = torch.log_softmax(torch_logits.double(), -1)
    ids, values = unpack("i", found.ids).tolist(), unpack("f", found.values).tolist()
    for i, token in enumerate(
        prompt[2:]
    ):  # positions 1 to 3 of the slot are tokens 3 to 5 of the step
        assert (
            ids[3 * i] == token
            and ids[3 * i + 1 : 3 * i + 3] == exact[3 + i].topk(2).indices.tolist()
        )
        assert values[3 * i : 3 * i + 3] == pytest.approx(
            exact[3 + i, ids[3 * i : 3 * i + 3]].tolist(), abs=1e-5
        )
    assert device.special.prompt_hook(run, np.array([0, 4]), np.array([3, 5]), extra) is None
