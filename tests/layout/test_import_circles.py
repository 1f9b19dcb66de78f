"""No file of Pagewire imports itself by way of others: what it needs can be read before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "pagewire": ROOT / "services" / "pagewire",
    "pagewire_protocol": ROOT / "protocol" / "pagewire_protocol",
    "pagewire_kernels": ROOT / "kernels" / "pagewire_kernels",
}


def modules(package: str, folder: Path) -> dict[str, Path]:
    """Every file of a package by its module's name."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, source: str, known: set[str]) -> set[str]:
    """The modules of `known` that `module` imports when it is loaded or checked: at its top level,
    under `if` and `try` too, which includes TYPE_CHECKING; not inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from package import name` loads the package's file only where the name is not a file.
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                names.add(inner if inner in known else base)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return {name for name in names if name in known} - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that can all reach each other (Tarjan's strongly connected components
    of two modules or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_import_circles(package: str) -> None:
    files = modules(package, PACKAGES[package])
    graph = {
        name: imported(name, path, path.read_text(), set(files)) for name, path in files.items()
    }
    assert sum(map(len, graph.values())) > len(graph) / 2, "the imports were not found"
    assert circles(graph) == []


def test_a_circle_is_found_even_when_it_is_for_types_only() -> None:
    known = {"p", "p.a", "p.b", "p.c"}
    sources = {
        "p": "",
        "p.a": "from . import b",
        "p.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import C\n",
        "p.c": "import p.a\ndef f():\n    from . import nothing\n",
    }
    graph = {
        name: imported(name, Path("p/__init__.py" if name == "p" else "x.py"), source, known)
        for name, source in sources.items()
    }
    assert graph == {"p": set(), "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}}
    assert circles(graph) == [["p.a", "p.b", "p.c"]]
    graph["p.c"] = set()
    assert circles(graph) == []
