"""The size budget: prose does not hold it, a test does. Files, classes and functions stay small enough to be read in one go."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for root in ("protocol", "services", "kernels") for path in (ROOT / root).rglob("*.py"))
MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_MEDIAN = 300, 200, 40, 8
MAX_DEVICE_FUNCTION = 120
"""A Triton kernel is one program for one device: cutting it up costs what it was written for."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def length(node: ast.stmt) -> int:
    """Lines from `def` or `class` to the last one, decorators not counted."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def is_triton(node: Function) -> bool:
    """Decorated with `triton.jit` or `jit`, called or not."""
    names = [ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator) for decorator in node.decorator_list]
    return any(name in ("triton.jit", "jit") for name in names)


def too_long(tree: ast.AST) -> list[str]:
    found = [f"class {n.name}: {length(n)} lines" for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and length(n) > MAX_CLASS]
    for node in functions(tree):
        limit = MAX_DEVICE_FUNCTION if is_triton(node) else MAX_FUNCTION
        if length(node) > limit:
            found.append(f"{node.name}: {length(node)} lines, at most {limit}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_class_and_function_lengths(path: Path) -> None:
    text = path.read_text()
    lines = text.count("\n") + (not text.endswith("\n") and text != "")
    assert lines <= MAX_FILE, f"{name_of(path)} has {lines} lines, at most {MAX_FILE}"
    assert not (found := too_long(ast.parse(text))), f"{name_of(path)}: {found}"


def test_median_function() -> None:
    lengths = [length(node) for path in SOURCES for node in functions(ast.parse(path.read_text()))]
    assert statistics.median(lengths) <= MAX_MEDIAN


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no module docstring"


def test_the_budget_can_fail() -> None:
    body = "\n".join(["    x = 1"] * MAX_FUNCTION)
    assert too_long(ast.parse(f"def f():\n{body}\n"))
    assert not too_long(ast.parse(f"@triton.jit\ndef f():\n{body}\n"))
    assert too_long(ast.parse("class C:\n" + "\n".join(["    x = 1"] * MAX_CLASS)))
