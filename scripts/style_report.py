"""Prints a table of what can be counted about Python sources: sizes, density, names, prose. A
report to compare trees with, no gate.

    python scripts/style_report.py                # this tree: its source roots and their packages
    python scripts/style_report.py DIRECTORY ...  # any directories, and the packages in them
    python scripts/style_report.py --no-packages DIRECTORY ...

It needs the standard library alone, so it runs on any checkout. `--help` says how each column is
counted.
"""

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("protocol", "kernels", "services")
WIDE = 100
GENERIC = frozenset(
    (
        *("asked", "at", "found", "given", "got", "it", "kind", "known"),
        *("met", "one", "ones", "other", "others", "own", "part", "parts"),
        *("place", "rest", "said", "seen", "shown", "some", "stuff", "such"),
        *("that", "thing", "things", "this", "told", "wanted"),
    )
)
"""Names that say nothing of the value they stand for."""
COLUMNS = {
    "files": "Python files",
    "lines": "lines of the files, all of them",
    "function": "lines of a function or method, nested ones too: median / 90th percentile / longest",
    "class": "lines of the longest class",
    "file": "lines of a file: median / longest",
    "nodes": "syntax nodes (ast.walk) of a function: median / 90th percentile",
    "nodes/line": "syntax nodes for each line that is not blank",
    f">{WIDE}": f"lines of more than {WIDE} columns, of those that are not blank",
    "tuples": "assignments of a tuple to a tuple (a, b = c, d) for each 1,000 lines not blank",
    "generic": "of all names bound by assignments, loops and parameters, those that are one of: "
    + " ".join(sorted(GENERIC)),
    "docs": "lines of docstrings, those of attributes included, of all lines",
    "comments": "lines with a comment, of all lines",
    "public docs": "functions and classes whose names begin with no underscore that have a docstring",
    "parameters": "longest parameter list, self and cls left out",
}

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = (*Function, ast.ClassDef)


@dataclass
class Counts:
    """What was counted in some files."""

    file_lines: list[int] = field(default_factory=list)
    filled_lines: int = 0
    wide_lines: int = 0
    comment_lines: int = 0
    docstring_lines: int = 0
    nodes: int = 0
    function_lines: list[int] = field(default_factory=list)
    function_nodes: list[int] = field(default_factory=list)
    class_lines: list[int] = field(default_factory=list)
    tuple_assignments: int = 0
    names: int = 0
    generic_names: int = 0
    public: int = 0
    public_with_docstring: int = 0
    parameters: int = 0

    def add_source(self, text: str) -> None:
        """Count one file. Raises SyntaxError."""
        tree = ast.parse(text)
        lines = text.splitlines()
        filled = [line for line in lines if line.strip()]
        self.file_lines.append(len(lines))
        self.filled_lines += len(filled)
        self.wide_lines += sum(len(line) > WIDE for line in filled)
        self.comment_lines += count_comments(text)
        for node in ast.walk(tree):
            self.nodes += 1
            self._add_node(node)

    def _add_node(self, node: ast.AST) -> None:
        if isinstance(node, Definition):
            self._add_definition(node)
        elif is_string(node):
            self.docstring_lines += length(node)
        elif is_tuple_assignment(node):
            self.tuple_assignments += 1
        for name in bound_names(node):
            self.names += 1
            self.generic_names += name.strip("_") in GENERIC

    def _add_definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        if not node.name.startswith("_"):
            self.public += 1
            self.public_with_docstring += ast.get_docstring(node) is not None
        if isinstance(node, ast.ClassDef):
            self.class_lines.append(length(node))
            return
        self.function_lines.append(length(node))
        self.function_nodes.append(sum(1 for _ in ast.walk(node)))
        self.parameters = max(self.parameters, len(parameters_of(node)))

    def row(self) -> list[str]:
        """The cells of the table, in the order of COLUMNS."""
        lines = sum(self.file_lines)
        return [
            f"{len(self.file_lines):,}",
            f"{lines:,}",
            f"{middle(self.function_lines)}/{tail(self.function_lines)}/{top(self.function_lines)}",
            f"{top(self.class_lines)}",
            f"{middle(self.file_lines)}/{top(self.file_lines)}",
            f"{middle(self.function_nodes)}/{tail(self.function_nodes)}",
            f"{share(self.nodes, self.filled_lines):.1f}",
            f"{100 * share(self.wide_lines, self.filled_lines):.1f}%",
            f"{1000 * share(self.tuple_assignments, self.filled_lines):.1f}",
            f"{100 * share(self.generic_names, self.names):.1f}%",
            f"{100 * share(self.docstring_lines, lines):.1f}%",
            f"{100 * share(self.comment_lines, lines):.1f}%",
            f"{100 * share(self.public_with_docstring, self.public):.0f}%",
            f"{self.parameters}",
        ]


def middle(values: Sequence[int]) -> str:
    """The median."""
    return f"{statistics.median(values):g}" if values else "0"


def tail(values: Sequence[int]) -> int:
    """The 90th percentile: nine tenths of the values are no larger."""
    return sorted(values)[min(len(values) - 1, int(0.9 * len(values)))] if values else 0


def top(values: Sequence[int]) -> int:
    """The largest value."""
    return max(values, default=0)


def share(part: int, whole: int) -> float:
    """0 of nothing is 0."""
    return part / whole if whole else 0.0


def length(node: ast.AST) -> int:
    """Lines from the first to the last, decorators left out."""
    return node.end_lineno - node.lineno + 1


def count_comments(text: str) -> int:
    """Lines with a comment, alone or behind code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def is_string(node: ast.AST) -> bool:
    """Whether a statement is a string alone: a docstring, or what describes the attribute above."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_tuple_assignment(node: ast.AST) -> bool:
    """Whether several values are assigned in one statement: a, b = c, d."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def bound_names(node: ast.AST) -> Iterator[str]:
    """The name that this node binds, if any; `self` and `_` are no names here."""
    name = ""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        name = node.id
    elif isinstance(node, ast.arg):
        name = node.arg
    if name not in ("", "_", "self", "cls"):
        yield name


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of the parameters, those of *args and **kwargs left out."""
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def count(files: Iterable[Path]) -> Counts:
    """Counts of some Python files."""
    counts = Counts()
    for file in files:
        counts.add_source(file.read_text())
    return counts


def rows_of(directory: Path, with_packages: bool) -> Iterator[tuple[str, Counts]]:
    """A name and the counts of a directory; then of each folder in it that has Python files, those
    of its own folders left out."""
    files = sorted(directory.rglob("*.py"))
    yield f"**{directory.name}**", count(files)
    if not with_packages:
        return
    for folder in sorted({file.parent for file in files}):
        own_files = [file for file in files if file.parent == folder]
        if any(file.stat().st_size for file in own_files):
            yield folder.relative_to(directory.parent).as_posix(), count(own_files)


def table(rows: Iterable[tuple[str, Counts]]) -> str:
    """The rows in Markdown."""
    lines = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *counts.row()] for name, counts in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """The command line."""
    about = "\n".join(f"  {name:<12} {meaning}" for name, meaning in COLUMNS.items())
    parser = argparse.ArgumentParser(
        description="Counts about Python sources, as a Markdown table.",
        epilog=f"columns:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories", nargs="*", type=Path, default=[ROOT / name for name in ROOTS]
    )
    parser.add_argument(
        "--no-packages", action="store_true", help="a row for each directory, none for its folders"
    )
    options = parser.parse_args()
    rows: list[tuple[str, Counts]] = []
    for directory in options.directories:
        rows += rows_of(directory.resolve(), not options.no_packages)
    print(table(rows))


if __name__ == "__main__":
    main()
