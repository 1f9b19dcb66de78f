"""Kernels that overlap (workspace.overlap) keep its rules."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pagewire_kernels
import pytest

SOURCES = sorted(Path(pagewire_kernels.__file__).parent.glob("*.py"))


Place = tuple[int, int]
"""Line and column."""


def calls(function: ast.FunctionDef, name: str) -> list[Place]:
    """Where `name` is called."""
    return [
        (node.lineno, node.col_offset)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def overlapping(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (
            calls(node, "gdc_wait") or calls(node, "gdc_launch_dependents")
        ):
            yield node


def rule_broken(function: ast.FunctionDef) -> str:
    """Empty, if none is."""
    waits, lets_in = calls(function, "gdc_wait"), calls(function, "gdc_launch_dependents")
    if not waits or not lets_in:
        return f"{function.name} waits in {waits} and lets the next in in {lets_in}"
    # a kernel that is let in may read what was written before this one: which must have waited
    if min(lets_in) < max(waits):
        return f"{function.name} lets the next in ({min(lets_in)}) before it waits"
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and (node.lineno, 0) < min(waits):
            return f"{function.name} ends in line {node.lineno} without a wait"
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_kernels_wait_and_then_let_the_next_in(path: Path) -> None:
    found = [rule_broken(function) for function in overlapping(ast.parse(path.read_text()))]
    assert [broken for broken in found if broken] == []


@pytest.mark.parametrize(
    "body",
    [
        "gdc_launch_dependents(); gdc_wait()",
        "gdc_wait()",
        "gdc_launch_dependents()",
        "\n    if x: return\n    gdc_wait(); gdc_launch_dependents()",
    ],
)
def test_a_kernel_that_breaks_them_is_found(body: str) -> None:
    (function,) = overlapping(ast.parse(f"def kernel(x): {body}"))
    assert rule_broken(function)


def test_there_are_such_kernels() -> None:
    found = [one.name for path in SOURCES for one in overlapping(ast.parse(path.read_text()))]
    assert {"_decode", "_decode_few", "_token_down", "_row", "_row_int4", "_norm"} <= set(found)
