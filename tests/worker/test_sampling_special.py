"""The GPU's eager resampling on CPU tensors, several steps ahead of the host: the rows of a captured step's logits against transformers."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pagewire.worker.slots import Slots
from pagewire.worker.special import Extra, Kernels, SpecialRows
from pagewire_kernels.penalties import apply_penalties_reference, count_tokens_reference
from pagewire_kernels.sampling import Sampled, SamplingRows
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.messages import Admission, pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.sampling_reference import bias, restricted, words

VOCAB, SLOTS, EOS = 60, 8, (2,)


def draw(logits: torch.Tensor, rows: SamplingRows) -> Sampled:
    """Greedy, as every row here is; and what the kernel says of rows that are not finite."""
    assert not rows.temperature.any()
    return Sampled(logits.argmax(-1), logits.amax(-1), logits.isnan().any(-1))


class Device:
    """Slots on both sides, and steps whose tokens the host does not look at."""

    def __init__(self) -> None:
        self.slots = Slots(SLOTS, 200, 8)
        self.state = SlotState.empty(SLOTS, 32, "cpu")
        loaded = SimpleNamespace(decoder=SimpleNamespace(arch=SimpleNamespace(vocab_size=VOCAB)), eos_token_ids=EOS)
        uploads = SimpleNamespace(up=lambda values, out=None: torch.from_numpy(np.ascontiguousarray(values).copy()))
        kernels = Kernels(draw, apply_penalties_reference, count_tokens_reference)
        self.special = SpecialRows(loaded, self.slots, self.state, uploads, kernels)

    def admit(self, slot: int, prompt: list[int], given: Sampling, output: tuple[int, ...] = ()) -> None:
        blocks = pack("i", range(20))
        self.slots.admit(Admission(slot, 1, pack("i", prompt), pack("i", output), blocks, 0, given))
        self.special.admit(np.array([slot]))

    def step(self, logits: torch.Tensor, slots: list[int]) -> tuple[list[int], Extra | None]:
        """What the graph wrote, then the special rows; the host counts the tokens and keeps none of them."""
        report, which = logits.argmax(-1).int(), np.array(slots)
        report[logits.isnan().any(-1)] = -1
        self.state.last_token[which] = report.clamp(min=0)
        extra = self.special.resample(logits, which, report)
        self.slots.known[which] += 1
        assert ((self.state.last_token[which] == report) | (report < 0)).all()
        return report.tolist(), extra


def settings(seed: int) -> list[dict]:
    make = random.Random(seed)
    some = lambda count: make.sample(range(VOCAB), count)  # noqa: E731
    return [
        {},
        {"logprobs": 3},
        {"allowed_ids": pack("i", some(5)), "logprobs": 0},
        {**bias({token: make.uniform(-4, 4) for token in some(12)})},
        {"bad_words": words(*[[token] for token in some(20)], *[some(2) for _ in range(25)])},
        {"min_tokens": 7, "stop_token_ids": tuple(some(9))},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.4, "bad_words": words(some(3))},
        {
            **bias({token: make.uniform(-4, 4) for token in some(12)}),
            "allowed_ids": pack("i", some(30)),
            "bad_words": words(*[some(1) for _ in range(8)], *[some(2) for _ in range(60)]),
            "min_tokens": 5,
            "stop_token_ids": tuple(some(4)),
            "repetition_penalty": 0.8,
            "frequency_penalty": -0.6,
            "logprobs": 20,
        },
    ]


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_every_kind_against_transformers(seed):
    make, device = random.Random(seed), Device()
    torch.manual_seed(seed)
    given = [Sampling(0, 100, **{"temperature": 0.0, **extra}) for extra in settings(seed)]
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 30))] for _ in given]
    outputs = [[make.randrange(VOCAB) for _ in range(make.choice([0, 3, 70]))] for _ in given]
    for slot, (prompt, sampling) in enumerate(zip(prompts, given, strict=True)):
        device.admit(slot, prompt, sampling, tuple(outputs[slot]))
    for _ in range(25):
        slots = make.sample(range(SLOTS), make.randrange(1, SLOTS + 1))
        logits = (torch.randn(len(slots), VOCAB) * 2).bfloat16().float()
        wanted = [int(restricted(row, prompts[s], outputs[s], given[s], EOS).argmax()) for s, row in zip(slots, logits, strict=True)]
        got, extra = device.step(logits.clone(), slots)
        assert got == wanted
        check_logprobs(extra, logits, slots, got, given)
        for slot, token in zip(slots, got, strict=True):
            outputs[slot].append(token)


def check_logprobs(extra, logits, slots, tokens, given):
    asked = [i for i, slot in enumerate(slots) if given[slot].logprobs >= 0]
    if not asked:
        assert extra is None
        return
    columns = extra.columns(np.array(tokens, np.int32))
    rows, counts, ranks, ids = (unpack("i", c).tolist() for c in (columns.rows, columns.counts, columns.ranks, columns.ids))
    assert rows == asked and counts == [given[slots[i]].logprobs + 1 for i in asked]
    exact, at = torch.log_softmax(logits.double(), -1), 0
    values = unpack("f", columns.values).tolist()
    for row, count, rank in zip(rows, counts, ranks, strict=True):
        mine = ids[at : at + count]
        assert mine[0] == tokens[row] and rank == 1 + int((exact[row] > exact[row, tokens[row]]).sum())
        assert values[at : at + count] == pytest.approx(exact[row, mine].tolist(), abs=1e-5)
        assert values[at + 1 : at + count] == pytest.approx(exact[row].topk(count - 1).values.tolist(), abs=1e-5)
        at += count


def test_batches_without_special_rows_are_left_alone():
    device = Device()
    device.admit(0, [5], Sampling(0, 9))
    report = torch.tensor([7], dtype=torch.int32)
    assert device.special.resample(torch.full((1, VOCAB), float("nan")), np.array([0]), report) is None and report.item() == 7


def test_a_broken_row_is_flagged_and_its_neighbours_go_on():
    device = Device()
    for slot in range(3):
        device.admit(slot, [5, 6], Sampling(0, 9, temperature=0.0, logprobs=1, bad_words=words([7]), frequency_penalty=1.0))
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
    extra = Extra()
    run, first, end = np.array([0, 1]), np.array([0, 1]), np.array([3, 5])
    device.special.prompt_tap(run, first, end, extra)(lambda rows: torch_logits[rows])
    (found,) = extra.prompt_logprobs()
    assert (found.place, found.first) == (1, 2) and unpack("i", found.counts).tolist() == [3, 3, 3]
    exact = torch.log_softmax(torch_logits.double(), -1)
    ids, values = unpack("i", found.ids).tolist(), unpack("f", found.values).tolist()
    for i, token in enumerate(prompt[2:]):  # positions 1 to 3 of the slot are tokens 3 to 5 of the step
        assert ids[3 * i] == token and ids[3 * i + 1 : 3 * i + 3] == exact[3 + i].topk(2).indices.tolist()
        assert values[3 * i : 3 * i + 3] == pytest.approx(exact[3 + i, ids[3 * i : 3 * i + 3]].tolist(), abs=1e-5)
    assert device.special.prompt_tap(run, np.array([0, 4]), np.array([3, 5]), extra) is None
