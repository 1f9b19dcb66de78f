"""Which launch shapes are chosen for a card, and what happens when the card refuses one. What they
need is for test_shapes_fit.py."""

import logging

import pytest
import torch
from ops import hopper_shapes
from pagewire_kernels import attention_prefill, decode_shapes, gemm, sampling, shapes
from pagewire_kernels.attention_prefill import PrefillConfig
from pagewire_kernels.decode_shapes import DecodeConfig
from pagewire_kernels.gemm import SkinnyConfig
from pagewire_kernels.shapes import KIB_99, KIB_163, KIB_227, Candidate, Choice
from triton.runtime.errors import OutOfResources

CPU = torch.device("cpu")


def test_hopper_keeps_the_measured_shapes() -> None:
    with shapes.pretend(KIB_227):
        for what, chosen, measured in hopper_shapes.choices(CPU):
            assert chosen == measured, what


@pytest.mark.parametrize(
    ("limit", "shape"),
    [(KIB_163, (128, 64, 8, 2)), (KIB_99, (64, 32, 4, 2)), (65_536, (32, 32, 4, 1))],
)
def test_less_memory_takes_smaller_shapes(limit: int, shape: tuple[int, int, int, int]) -> None:
    with shapes.pretend(limit):
        assert attention_prefill.choose(256, 2, 2).first(CPU) == PrefillConfig(*shape)
        assert attention_prefill.choose(128, 2, 2).first(CPU).stages == (3 if limit > 65_536 else 2)
    assert attention_prefill.choose(256, 2, 2).first(CPU) == hopper_shapes.PREFILL[256]


@pytest.mark.parametrize(("limit", "dim", "itemsize", "tile"), [
    (KIB_163, 256, 2, (32, 2, 4)),
    (KIB_99, 256, 2, (32, 2, 3)),
    (KIB_227, 256, 4, (32, 2, 4)),
    (KIB_163, 256, 4, (32, 2, 3)),
    (KIB_99, 256, 4, (32, 2, 2)),
    (KIB_163, 128, 4, (64, 2, 3)),
    (KIB_99, 128, 4, (64, 2, 2)),
])  # fmt: skip
def test_decode_gives_up_stages_before_tiles_and_never_splits(
    limit: int, dim: int, itemsize: int, tile: tuple[int, int, int]
) -> None:
    choice = decode_shapes.choose(dim, 4, 8, itemsize, itemsize)
    with shapes.pretend(limit):
        assert choice.first(CPU) == DecodeConfig(*tile, 64, 32)
    assert {(candidate.shape.chunk, candidate.shape.splits) for candidate in choice.candidates} == {
        (64, 32)
    }


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_smallest_cards_get_what_they_have_room_for(itemsize: int) -> None:
    best = SkinnyConfig(64, 128, 4, 4, 5)
    with shapes.pretend(KIB_99):
        assert gemm.choose(best, 8, itemsize).first(CPU).stages == (5 if itemsize == 2 else 3)
        assert sampling.choose_block(itemsize).first(CPU) == (8192 if itemsize == 2 else 4096)


BIG, MIDDLE, SMALL = 3, 2, 1


@pytest.fixture
def ladder() -> Choice[int]:
    return Choice("a kernel", (Candidate(BIG, KIB_163), Candidate(MIDDLE), Candidate(SMALL)))


class Card:
    """Refuses shapes above `most`, as Triton does."""

    def __init__(self, most: int) -> None:
        self.most, self.seen, self.ran = most, list[int](), list[int]()

    def __call__(self, shape: int) -> None:
        self.seen.append(shape)
        if shape > self.most:
            raise OutOfResources(131_072, KIB_99, "shared memory")
        self.ran.append(shape)


def test_a_refused_shape_gives_way_and_is_not_tried_again(
    ladder: Choice[int], caplog: pytest.LogCaptureFixture
) -> None:
    card = Card(MIDDLE)
    with caplog.at_level(logging.WARNING):
        ladder.launch(CPU, card)
        ladder.launch(CPU, card)
    assert card.seen == [BIG, MIDDLE, MIDDLE] and card.ran == [MIDDLE, MIDDLE]
    assert [record.getMessage() for record in caplog.records] == [
        "a kernel: 3 does not fit this GPU (131,072 of 101,376 of shared memory); 2 is used"
    ]
    assert ladder.first(CPU) == MIDDLE
    assert Choice("another kernel", ladder.candidates).first(CPU) == BIG
    with shapes.pretend(KIB_163):
        assert ladder.first(CPU) == BIG  # another card


def test_what_is_left_after_the_last_shape_names_the_kernel(ladder: Choice[int]) -> None:
    for tried in ([BIG, MIDDLE, SMALL], [SMALL]):
        card = Card(0)
        with pytest.raises(OutOfResources) as raised:
            ladder.launch(CPU, card)
        assert card.seen == tried
        assert raised.value.__notes__ == ["a kernel"]


def test_other_errors_do_not_lead_to_another_shape(ladder: Choice[int]) -> None:
    def run(shape: int) -> None:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such"):
        ladder.launch(CPU, run)
    assert ladder.first(CPU) == BIG


def test_pretending_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="over"), shapes.pretend(KIB_163), shapes.pretend(KIB_99):
        assert shapes.limit(CPU) == KIB_99
        raise ValueError("over")
    assert shapes.limit(CPU) == KIB_227


def test_the_limit_is_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = KIB_163

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    shapes._optin.cache_clear()
    assert shapes.limit(torch.device("cuda", 0)) == KIB_163
    shapes._optin.cache_clear()
