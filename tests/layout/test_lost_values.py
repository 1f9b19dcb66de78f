"""No variable is assigned twice in a row with nothing that reads it between: the first value is
lost, as where two variables were given one name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("protocol", "services", "kernels", "bench", "scripts")


def blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def assigned(statement: ast.stmt) -> str | None:
    """The variable, where the statement does nothing else than assign one."""
    target: ast.expr | None = None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target = statement.target
    return target.id if isinstance(target, ast.Name) else None


def read(statement: ast.stmt) -> set[str]:
    """What any part of it reads. A function may be called from anywhere, so its body counts."""
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def lost_values(source: str) -> Iterator[str]:
    for block in blocks(ast.parse(source)):
        unread: dict[str, int] = {}
        for statement in block:
            for name in read(statement):
                unread.pop(name, None)
            name = assigned(statement)
            if name is None:
                continue
            if name in unread:
                yield f"line {unread[name]}: {name} is assigned again in line {statement.lineno}"
            unread[name] = statement.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_value_is_lost(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}, {lost}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for lost in lost_values(path.read_text())
    ]
    assert found == []


def test_a_lost_value_is_seen() -> None:
    source = "def f():\n    check = 1\n    check = get()\n    return check\n"
    assert list(lost_values(source)) == ["line 2: check is assigned again in line 3"]
    assert not list(lost_values(source.replace("get()", "check + 1")))
