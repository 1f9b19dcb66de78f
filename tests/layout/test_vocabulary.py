"""docs/vocabulary.md is true: the files that it names exist, and the names occur in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "vocabulary.md"
ROW = re.compile(r"^\| (?P<word>[^|]+) \| (?P<meaning>[^|]+) \| (?P<where>[^|]+) \|$", re.M)
ROWS = [
    (match["word"], match["where"])
    for match in ROW.finditer(PAGE.read_text())
    if match["word"] not in ("word", "---")
]


def places(where: str) -> list[tuple[list[str], Path]]:
    """The code names in backticks and the file that follows them, for each file of a cell."""
    found: list[tuple[list[str], Path]] = []
    names: list[str] = []
    for quoted in re.findall(r"`([^`]+)`", where):
        if "/" in quoted:
            found.append((names, ROOT / quoted))
            names = []
        else:
            names.append(quoted)
    assert not names, f"no file after {names}"
    return found


@pytest.mark.parametrize(("word", "where"), ROWS, ids=[word for word, _ in ROWS])
def test_a_word_lives_where_the_page_says(word: str, where: str) -> None:
    cell = places(where)
    assert cell, f"{word} has no file"
    for names, path in cell:
        assert path.is_file(), f"{word}: there is no {path.relative_to(ROOT)}"
        assert names, f"{word}: {path.relative_to(ROOT)} is named without a name in it"
        for name in names:
            text = path.read_text()
            assert re.search(rf"\b{re.escape(name)}\b", text), f"{word}: no {name} in {path.name}"


def test_every_line_of_the_tables_was_read() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    headers = [line for line in lines if line.startswith("| word |")]
    assert len(ROWS) == len(lines) - len(headers) > 50


def test_each_word_stands_once() -> None:
    words = [word for cell, _ in ROWS for word in cell.split(", ")]
    assert len(words) == len(set(words))


def test_a_cell_is_read_right() -> None:
    cell = "`Inbox`, `Outbox` in `a/b.py`, `Step` in `c/d.py`"
    assert places(cell) == [(["Inbox", "Outbox"], ROOT / "a/b.py"), (["Step"], ROOT / "c/d.py")]
