"""What the pages tell a reader to do exists: commands, flags, targets, files, links, and Python
that compiles."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from pagewire.cli import COMMANDS, SERVICES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def command_lines(page: Path) -> list[list[str]]:
    """The words of every command of a page's bash blocks; `A && B` is two."""
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [
        words
        for line in re.split(r"\n|&&", re.sub(r"'[^']*'", "''", joined))
        if (words := shlex.split(line, comments=True))
    ]


def inline(page: Path) -> list[list[str]]:
    return [
        shlex.split(text)
        for text in re.findall(r"`((?:pagewire|make|docker) [^`]+)`", page.read_text())
    ]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@cache
def flags_of(command: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-m", "pagewire", command, "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", result.stdout))


def subcommand(words: list[str]) -> list[str]:
    """What follows `pagewire`, if the line calls it; else nothing."""
    names = [word.rsplit("/", 1)[-1] for word in words]
    if names[0] == "pagewire":
        return words[1:]
    if (
        names[0] == "make"
        and "serve" in names
        and (given := [w for w in words if w.startswith("ARGS=")])
    ):
        return ["serve", *given[0].removeprefix("ARGS=").split()]
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    for words in command_lines(page) + inline(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= make_targets(), words
        called = subcommand(words)
        if called and called[0] not in ("--version", "--help", "COMMAND"):
            command = called[0].rstrip(",")
            assert command in {*COMMANDS, *SERVICES}, words
            given = {word.partition("=")[0] for word in called if word.startswith("--")}
            assert not given or given <= flags_of(command), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_commands_exist(page: Path) -> None:
    for words in command_lines(page):
        named = [
            word
            for word in words
            if re.fullmatch(r"(scripts|compose|docs|bench|tests|\.ci)/[\w./-]+", word)
        ]
        assert all((ROOT / word).exists() for word in named), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_compile_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = __import__(node.module, fromlist=["x"])
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_flags_named_in_the_readme_exist() -> None:
    known = set().union(*(flags_of(command) for command in ("serve", *SERVICES)))
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`(--[a-z-]+)[ `]", text)) - {"--help", "--version"}
    assert named and named <= known, named - known


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [
        name
        for name in {*COMMANDS, *SERVICES} - {"fetch"}
        if f"`{name}`" not in text and f"pagewire {name}" not in text
    ]


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
