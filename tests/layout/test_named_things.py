"""What the pages name exists: classes and their fields, functions, settings, flags, files, metrics,
and in the picture of docs/architecture.md messages."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from pagewire_protocol import messages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARENTS = (
    *(ROOT, ROOT / "docs", ROOT / "tests", ROOT / "services" / "pagewire"),
    *(ROOT / "kernels" / "pagewire_kernels", ROOT / "protocol" / "pagewire_protocol"),
)
BINARY = (".png", ".gguf", ".safetensors")
WORD = re.compile(r"[A-Za-z_]\w*")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
NOT_HERE = {
    "CHANGELOG.md": {"pagewire:frontend_streams_parked"},
    "CONTRIBUTING.md": {"formats/NAME.py"},
    "http.md": {"ipython"},
    "quantization.md": {"bitblas"},
    "ray.md": {"max_queued_requests", "serveConfigV2"},
}
"""Ends of names, names that are gone and said to be, and what other programs and standards name."""


@cache
def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


@cache
def matches(pattern: re.Pattern[str]) -> frozenset[str]:
    """Everything of this form in the tree outside of its pages and of this file."""
    sources = [
        path for path in tracked() if path.suffix not in (".md", *BINARY) and path != Path(__file__)
    ]
    return frozenset(
        match for path in sources for match in pattern.findall(path.read_text(errors="replace"))
    )


@cache
def members() -> dict[str, set[str]]:
    """By the name of each class of the sources: its fields, methods and attributes."""
    found: dict[str, set[str]] = {}
    for root in ("protocol", "kernels", "services"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, set()).update(members_of(node))
    return found


def members_of(definition: ast.ClassDef) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def missing(quoted: str) -> list[str]:
    """What a text in backticks names that is not there."""
    field = re.fullmatch(r"([A-Z]\w*)\.(\w+)", quoted)
    if field and field[1] in members():
        return [] if field[2] in members()[field[1]] else [quoted]
    gone = [quoted] if WORD.fullmatch(quoted) and not is_word(quoted) else []
    gone += [flag for flag in FLAG.findall(quoted) if not is_flag(flag)]
    gone += [path for path in re.findall(r"(?:[\w.-]+/)+[\w-]+\.\w+", quoted) if not is_file(path)]
    metrics = re.findall(r"\bpagewire:\w+", quoted)
    return gone + [name for name in metrics if not is_word(name.removeprefix("pagewire:"))]


def is_word(name: str) -> bool:
    """Whether the sources have it; of a metric without what is put before and behind its name, of a
    variable the setting."""
    bare = name.removeprefix("scheduler_").removeprefix("process_").removesuffix("_total")
    setting = name.removeprefix("PAGEWIRE_").lower()
    return not {name, bare, setting, bare.strip("_")}.isdisjoint(matches(WORD))


def is_flag(flag: str) -> bool:
    """A field of the settings, or written somewhere."""
    fields = {name.replace("-", "_") for name in (flag[2:], flag.removeprefix("--no-"))}
    return flag in matches(FLAG) or not fields.isdisjoint(matches(WORD))


def is_file(name: str) -> bool:
    if Path(name).suffix not in (".py", ".md", ".yaml", ".toml"):
        return True
    name = name.replace("kernels/.../", "")
    return any((parent / name).exists() for parent in PARENTS) or any(
        path.as_posix().endswith(f"/{name}") for path in tracked()
    )


def quoted_in(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    gone = {name for quoted in quoted_in(page) for name in missing(quoted)}
    assert gone == NOT_HERE.get(page.name, set())


def test_the_picture_shows_messages() -> None:
    picture = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.S)[0]
    named = set(re.findall(r"\b[A-Z][a-z]\w+", picture))
    assert len(named) > 8
    assert not [name for name in named if not hasattr(messages, name)]


@pytest.mark.parametrize(
    "quoted",
    ["RequestOwner.on_rooster", "NoSuchThing", "--never-a-flag", "worker/nothing.py"],
)
def test_what_is_not_there_is_found(quoted: str) -> None:
    assert missing(quoted) == [quoted]


@pytest.mark.parametrize(
    "quoted",
    [
        *("RequestOwner.on_roster", "StepResult.counts", "--max-step-ms", "worker/gpu/runner.py"),
        *("--no-enable-prefix-caching", "kernels/.../cpu.py", "PAGEWIRE_WATCHDOG_TIMEOUT"),
        "pagewire:scheduler_service_deaths_total",
    ],
)
def test_what_is_there_is_found(quoted: str) -> None:
    assert not missing(quoted)
