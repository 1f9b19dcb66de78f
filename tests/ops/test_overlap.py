"""Kernels that overlap (workspace.overlap) keep its rules."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pagewire_kernels
import pytest

SOURCES = sorted(Path(pagewire_kernels.__file__).parent.glob("*.py"))


Place = tuple[int, int]
"""Line and column."""


def calls(function: ast.stmt, name: str) -> list[Place]:
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


def broken(body: list[ast.stmt], waited: bool) -> tuple[str, bool]:
    """What breaks a rule in some statements, empty if nothing does; and whether they have waited.
    Conditions are those of compilation, of which any may hold."""
    for statement in body:
        if isinstance(statement, ast.If):
            found, inside = broken(statement.body, waited)
            otherwise, beside = broken(statement.orelse, waited)
            if found or otherwise:
                return found or otherwise, waited
            waited = inside or beside
        elif isinstance(statement, ast.For):
            found, waited = broken(statement.body, waited)
            if found:
                return found, waited
        elif calls(statement, "gdc_wait"):
            waited = True
        elif calls(statement, "gdc_launch_dependents") and not waited:
            return f"line {statement.lineno} lets the next kernel in before the wait", waited
        elif isinstance(statement, ast.Return) and not waited:
            return f"line {statement.lineno} ends without a wait", waited
    return "", waited


def rule_broken(function: ast.FunctionDef) -> str:
    """Empty, if none is."""
    waits, lets_in = calls(function, "gdc_wait"), calls(function, "gdc_launch_dependents")
    if not waits or not lets_in:
        return f"{function.name} waits in {waits} and lets the next in in {lets_in}"
    found, _ = broken(function.body, False)
    return f"{function.name}: {found}" if found else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_kernels_wait_and_then_let_the_next_in(path: Path) -> None:
    found = [rule_broken(function) for function in overlapping(ast.parse(path.read_text()))]
    assert [one for one in found if one] == []


@pytest.mark.parametrize(
    "body",
    [
        "gdc_launch_dependents(); gdc_wait()",
        "gdc_wait()",
        "gdc_launch_dependents()",
        "\n    if x: return\n    gdc_wait(); gdc_launch_dependents()",
        "\n    if x: gdc_launch_dependents()\n    gdc_wait()",
    ],
)
def test_a_kernel_that_breaks_them_is_found(body: str) -> None:
    (function,) = overlapping(ast.parse(f"def kernel(x): {body}"))
    assert rule_broken(function)


def test_there_are_such_kernels() -> None:
    found = [one.name for path in SOURCES for one in overlapping(ast.parse(path.read_text()))]
    assert {"_decode", "_decode_few", "_token_down", "_row", "_row_int4", "_norm"} <= set(found)
