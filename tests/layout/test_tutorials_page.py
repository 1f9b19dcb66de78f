"""docs/tutorials.md: a row for everything, in each row what works and tests that exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "tutorials.md").read_text()
ROWS = [
    line.strip("|").split(" | ")
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| | ")
]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))
COUNTS = {"I": 18, "E": 7, "L": 18, "C": 17, "A": 13}
LATER = {
    "LLaMA 1, 2, 3, Vicuna, Alpaca",
}


def test_nothing_is_missing() -> None:
    found = [row[0].strip() for row in ROWS if re.fullmatch(r"[A-Z]\d+", row[0].strip())]
    assert (
        found
        == [
            f"{letter}{number}"
            for letter, count in COUNTS.items()
            for number in range(1, count + 1)
        ][: len(found)]
    )
    assert len(found) == sum(COUNTS.values()) and len(ROWS) > len(found) + 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_each_row_has_tests_and_only_what_may_follows_later(row: list[str]) -> None:
    assert len(row) == 4 and re.search(r"`[\w/]+\.py::\w+`", row[3]), row
    assert ("**later**" in row[2]) == (row[0].strip() in LATER), row[0]


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_named_tests_exist(path: str, name: str) -> None:
    file = TESTS / path
    assert file.is_file() and re.search(rf"^(async )?def {name}\(", file.read_text(), re.M), (
        f"{path}::{name}"
    )


def test_every_test_of_the_tutorials_is_named() -> None:
    """But those that repeat what another one shows."""
    found = {
        name
        for file in (TESTS / "tutorials").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    unnamed = {
        "test_a_key_made_in_the_shell",
        "test_the_defaults_are_those_of_the_table",
        "test_a_model_that_does_not_exist",
    }
    assert found - {name for _, name in NAMED} == unnamed
