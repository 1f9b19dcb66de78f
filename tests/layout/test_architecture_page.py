"""docs/architecture.md leads to where things are: the files that it names exist, and the names that
follow a file in a table occur in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FILE = re.compile(r"`([\w./-]+\.py)`")
FILE_WITH_NAMES = re.compile(r"`([\w./-]+\.py)`: ((?:`\w+`(?:, )?)+)")
PARENTS = (ROOT, ROOT / "services" / "pagewire", ROOT / "kernels", ROOT / "protocol")
NAMES = {
    path.name
    for parent in ("services", "kernels", "protocol")
    for path in (ROOT / parent).rglob("*.py")
}


def path_of(name: str) -> Path | None:
    name = name.replace("/.../", "/pagewire_kernels/")
    return next((parent / name for parent in PARENTS if (parent / name).is_file()), None)


@pytest.mark.parametrize("name", sorted(set(FILE.findall(PAGE))))
def test_a_file_exists(name: str) -> None:
    assert path_of(name) if "/" in name else name in NAMES, f"there is no {name}"


def test_names_are_in_their_files() -> None:
    pointers = FILE_WITH_NAMES.findall(PAGE)
    folder = Path()
    assert len(pointers) > 20
    for name, quoted in pointers:
        # `peers.py` after `scheduler/state.py` is in the same folder.
        path = path_of(name) or path_of(str(folder / name))
        assert path, f"there is no {name}"
        if "/" in name:
            folder = Path(name).parent
        text = path.read_text()
        for word in re.findall(r"`(\w+)`", quoted):
            assert re.search(rf"\b{word}\b", text), f"no {word} in {name}"
