"""The report about the sources runs and counts right."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "style_report.py"
SNIPPET = f'''"""A module of two functions."""

LIMIT = 3  # nodes
"""Of what."""


class Shelf:
    async def put(self, place, /, *, label=""):
        """Says nothing."""
        first, second = place, label
        return first

    def _open(self, given):
        for one in given:
            yield one
# {"x" * 120}
'''


@pytest.fixture(scope="module")
def report() -> ModuleType:
    specification = importlib.util.spec_from_file_location("style_report", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["style_report"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_a_snippet_is_counted_right(report: ModuleType) -> None:
    counts = report.Counts()
    counts.add_source(SNIPPET)
    assert counts.file_lines == [16]
    assert counts.filled_lines == 12
    assert counts.wide_lines == 1
    assert counts.comment_lines == 2
    assert counts.docstring_lines == 3
    assert counts.class_lines == [9]
    assert sorted(counts.function_lines) == [3, 4]
    assert counts.tuple_assignments == 1
    assert counts.names == 7, "LIMIT, place, label, first, second, given, one"
    assert counts.generic_names == 3, "place, given, one"
    assert (counts.public, counts.public_with_docstring) == (2, 1)
    assert counts.parameters == 2


def test_nodes_are_those_of_the_syntax_tree(report: ModuleType) -> None:
    counts = report.Counts()
    counts.add_source("def double(x):\n    return x + x\n")
    # Module, FunctionDef, arguments, arg, Return, BinOp, Name x 2 with Load x 2, Add
    assert counts.nodes == 11
    assert counts.function_nodes == [10]


def test_the_table_has_a_row_for_each_root_and_package(tmp_path: Path) -> None:
    package = tmp_path / "root" / "package"
    package.mkdir(parents=True)
    (package / "module.py").write_text(SNIPPET)
    (package / "empty").mkdir()
    (package / "empty" / "__init__.py").write_text("")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "root")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    header, line, *rows = result.stdout.splitlines()
    assert header.count("|") == line.count("|") == rows[0].count("|")
    assert [row.split("|")[1].strip() for row in rows] == ["**root**", "root/package"]
    assert "| 3.5/4/4 | 9 |" in rows[1]


def test_this_tree_can_be_reported_on(report: ModuleType) -> None:
    for name in report.ROOTS:
        (_, counts), *packages = report.rows_of(ROOT / name, True)
        assert sum(counts.file_lines) == sum(sum(part.file_lines) for _, part in packages)
