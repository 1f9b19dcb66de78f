"""Every module says what it is responsible for, and every public name of the services what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = ("protocol", "services", "kernels")
SOURCES = sorted(path for root in ROOTS for path in (ROOT / root).rglob("*.py"))
DOCUMENTED = (
    "protocol/pagewire_protocol",
    "services/pagewire/frontend",
    "services/pagewire/process",
    "services/pagewire/requests",
    "services/pagewire/scheduler",
    "services/pagewire/tokenizer",
    "services/pagewire/worker",
)
"""Packages, with all that is in them, whose public functions, classes and methods have
docstrings."""
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Method = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Method | ast.ClassDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def trees(paths: list[Path]) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in paths}


def methods_of(node: ast.ClassDef) -> dict[str, Method]:
    return {child.name: child for child in node.body if isinstance(child, Function)}


def bases_of(node: ast.ClassDef) -> set[str]:
    """The names of the base classes, without their modules and type arguments."""
    expressions = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return {ast.unparse(expression).rpartition(".")[2] for expression in expressions}


class Classes:
    """All classes of the sources, for the question whether a method overrides another."""

    def __init__(self, modules: dict[Path, ast.Module]) -> None:
        self._by_name: dict[str, list[ast.ClassDef]] = {}
        self._protocols: list[set[str]] = []
        for module in modules.values():
            for node in ast.walk(module):
                if isinstance(node, ast.ClassDef):
                    self._by_name.setdefault(node.name, []).append(node)
                    if "Protocol" in bases_of(node) and methods_of(node):
                        self._protocols.append(set(methods_of(node)))

    def overrides(self, node: ast.ClassDef, method: str) -> bool:
        """Whether a base class has the method, or a Protocol all of whose methods `node` has."""
        own = set(methods_of(node))
        if any(method in protocol and protocol <= own for protocol in self._protocols):
            return "Protocol" not in bases_of(node)
        return self._is_inherited(node, method, [])

    def _is_inherited(self, node: ast.ClassDef, method: str, seen: list[ast.ClassDef]) -> bool:
        for name in bases_of(node):
            for base in self._by_name.get(name, []):
                if base is node or base in seen:
                    continue
                if method in methods_of(base) or self._is_inherited(base, method, [*seen, node]):
                    return True
        return False


def undocumented(module: ast.Module, classes: Classes) -> Iterator[str]:
    """The public names of a module that have no docstring and need one."""
    for node in module.body:
        if not isinstance(node, (*Function, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.name
        if isinstance(node, ast.ClassDef):
            for name, method in methods_of(node).items():
                if name.startswith("_") or ast.get_docstring(method) is not None:
                    continue
                if not classes.overrides(node, name):
                    yield f"{node.name}.{name}"


MODULES = trees(SOURCES)
CLASSES = Classes(MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    has_docstring = bool(ast.get_docstring(MODULES[path]))
    assert not text.strip() or has_docstring, f"{name_of(path)} has no module docstring"


@pytest.mark.parametrize("package", DOCUMENTED)
def test_every_public_name_says_what_it_is(package: str) -> None:
    missing = [
        f"{name_of(path)}: {name}"
        for path, module in MODULES.items()
        if name_of(path).startswith(f"{package}/")
        for name in undocumented(module, CLASSES)
    ]
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_the_packages_exist() -> None:
    for folder in DOCUMENTED:
        assert list((ROOT / folder).glob("*.py")), folder


SNIPPET = '''
class Sink(Protocol):
    def take(self, text): """Text."""
    def end(self): ...

class Base:
    """A base."""
    def run(self): """Runs."""

class Mine(Base):
    def run(self): pass
    def stop(self): pass
    def __len__(self): return 0
    def _private(self): pass

class Counter:
    """Takes text."""
    def take(self, text): pass
    def end(self): pass

class Taker:
    """Takes text, and is no Sink."""
    def take(self, text): pass

async def serve(): pass
def _hidden(): pass
'''


def test_what_needs_a_docstring() -> None:
    module = ast.parse(SNIPPET)
    classes = Classes({Path("snippet.py"): module})
    assert list(undocumented(module, classes)) == [
        "Sink",
        "Sink.end",
        "Mine",
        "Mine.stop",
        "Taker.take",
        "serve",
    ]
