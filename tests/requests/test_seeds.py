"""Seeds: what is sent, what is drawn, and how choices differ."""

import random

import pytest
from pagewire.requests.seeds import base_seed, choice_seed


def never(bits: int) -> int:
    raise AssertionError("a seed was drawn")


@pytest.mark.parametrize(
    ("seed", "base"),
    [
        (0, 0),
        (7, 7),
        (2**63 - 1, 2**63 - 1),
        (-2, 2**63 - 2),
        (-(2**63) + 1, 1),
    ],
)
def test_a_seed_is_kept_but_for_its_sign(seed: int, base: int) -> None:
    assert base_seed(seed, never) == base


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_one_of_63_bits_is_drawn(seed: int | None) -> None:
    assert base_seed(seed, lambda bits: bits) == 63


def test_choices_have_unlike_seeds_and_the_first_has_the_requests_own() -> None:
    make = random.Random(3)
    for base in (0, 1, 7, 2**63 - 1, make.getrandbits(63)):
        seeds = [choice_seed(base, choice) for choice in range(1024)]
        assert seeds[0] == base and len(set(seeds)) == 1024
        assert all(0 <= seed < 2**63 for seed in seeds)
        further = [choice_seed(base + 1, choice) for choice in range(1024)]
        assert not set(seeds) & set(further), "neighbouring requests share no seed"


def test_the_derivation_is_splitmix64() -> None:
    """The published outputs for state 1234567, of which the wire keeps 63 bits."""
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert [choice_seed(1234567, choice) for choice in (1, 2, 3)] == [
        value % 2**63 for value in published
    ]
