"""Columns carry numbers exactly, in the byte order that the page promises."""

import struct
import sys
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire_protocol.messages import pack, unpack

BOUNDS: dict[str, tuple[int, int]] = {
    "i": (-(2**31), 2**31 - 1),
    "I": (0, 2**32 - 1),
    "Q": (0, 2**64 - 1),
}
ITEM_BYTES = {"i": 4, "I": 4, "Q": 8, "f": 4}


def test_item_sizes_are_those_of_the_wire() -> None:
    assert {code: array(code).itemsize for code in ITEM_BYTES} == ITEM_BYTES
    assert sys.byteorder == "little", "columns are written in native order"


@pytest.mark.parametrize("code", BOUNDS)
def test_integers_come_back(code: str) -> None:
    @given(st.lists(st.integers(*BOUNDS[code]), max_size=40))
    def check(values: list[int]) -> None:
        column = pack(code, values)
        assert column == struct.pack(f"<{len(values)}{code}", *values)
        assert unpack(code, column).tolist() == values

    check()


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=40))
def test_floats_come_back(values: list[float]) -> None:
    assert unpack("f", pack("f", values)).tolist() == values


@pytest.mark.parametrize(
    ("code", "values"), [("i", [2**31]), ("I", [-1]), ("Q", [2**64]), ("i", ["1"])]
)
def test_what_does_not_fit_is_refused(code: str, values: list[Any]) -> None:
    with pytest.raises((OverflowError, TypeError)):
        pack(code, values)


def test_a_ragged_column_is_refused() -> None:
    with pytest.raises(TypeError):
        unpack("i", b"12345")
