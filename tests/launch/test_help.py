"""What each command's --help shows: the settings that the command reads, by its source, and no
others. Settings are read as attributes of a Struct; who has one under which name is a convention
of the tree."""

import argparse
import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from pagewire import cli
from pagewire.commands import doctor_container
from pagewire.config import (
    FrontendConfig,
    ModelConfig,
    RunConfig,
    SchedulerConfig,
    TokenizerConfig,
    WorkerConfig,
)

SOURCES = Path(cli.__file__).parent
HOLDERS = {
    # Struct: names of variables and fields that hold one
    RunConfig: {"run", "config", "configs"},
    ModelConfig: {"model", "_model"},
    FrontendConfig: {"frontend", "config"},
    TokenizerConfig: {"config"},
    SchedulerConfig: {"scheduler", "config", "_config", "_scheduler", "steps", "self"},
    WorkerConfig: {"worker", "config", "_config", "self"},
}
SERVICES = ("frontend", "tokenizer", "scheduler", "worker")
STACK = (*SERVICES, "process", "hub", "grammar", "checkpoint", "launch", "cli.py", "config.py")
RANKS = ("worker/load", "worker/models", "launch/stack.py", "config.py", "hub")
READERS = {
    # command line: the files that read settings for it
    "serve": STACK,
    "run-batch": (*STACK, "commands/run_batch.py"),
    "bench offline": STACK,
    "bench latency": STACK,
    "fetch": ("commands/fetch.py", "hub"),
    "doctor": (*SERVICES[1:], "hub", "config.py", "commands/doctor.py", "commands/doctor_ranks.py"),
    "doctor (image)": ("commands/doctor_container.py", "commands/doctor_ranks.py", *RANKS),
    "frontend": ("frontend/service.py", "frontend/tls.py", "frontend/cors.py", "cli.py"),
    "tokenizer": ("tokenizer", "hub", "process/node.py", "cli.py", "config.py"),
    "scheduler": ("scheduler", "process/node.py", "cli.py", "config.py"),
    "worker": ("worker", "hub", "grammar", "process/node.py", "launch", "cli.py", "config.py"),
}
NOT_READ_THERE = {
    # by their holders' names they seem to be: of what the frontend and the supervisor have
    "run-batch": {*FrontendConfig.__struct_fields__, "shutdown_delay"} - {"served_model_name"},
    "bench offline": {"shutdown_delay", "name", "run_dir"},
    "bench latency": {"shutdown_delay", "name", "run_dir"},
    # the worker is asked, and says how long contexts are
    "frontend": {"max_model_len"},
}
BY_NAME = {"allowed_origins", "allowed_methods", "allowed_headers"}
"""Read by getattr."""
SAYS_SO = {"tokenizer_mode"}
"""Nobody reads it, and its help says that it has no effect."""
INTERNAL = {"socket_fd", "name"}
"""Not for users, where a whole stack is started."""


class Shown(Exception):
    """In the place of a printed help."""


@functools.cache
def reads_of(file: Path) -> frozenset[tuple[str, str]]:
    """(holder, attribute) of each attribute in a file."""
    nodes = ast.walk(ast.parse(file.read_text()))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    return frozenset((name_of(node.value), node.attr) for node in attributes)


def name_of(node: ast.expr) -> str:
    match node:
        case ast.Attribute():
            return node.attr
        case ast.Name():
            return node.id
        case ast.Subscript():
            return name_of(node.value)
        case _:
            return ""


def files_of(command: str) -> Iterator[Path]:
    for name in READERS[command]:
        path = SOURCES / name
        assert path.exists(), path
        yield from path.rglob("*.py") if path.is_dir() else (path,)


def read_by(command: str, struct: type) -> set[str]:
    """The settings of `struct` that the command's files read."""
    files = list(files_of(command))
    reads = {read for file in files for read in reads_of(file)}
    if SOURCES / "frontend/cors.py" in files:
        reads |= {("frontend", name) for name in BY_NAME}
    return {
        name
        for name in struct.__struct_fields__
        if any((holder, name) in reads for holder in HOLDERS[struct])
    } - NOT_READ_THERE.get(command, set())


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> cli.Parser:
    """The parser whose help a command prints."""
    printed: list[cli.Parser] = []

    def print_help(parser: cli.Parser, file: object = None) -> None:
        printed.append(parser)
        raise Shown

    monkeypatch.setattr(cli.Parser, "print_help", print_help)
    with pytest.raises(Shown):
        if command == "doctor (image)":
            monkeypatch.setenv(cli.IMAGE_VARIABLE, "worker")
            monkeypatch.setattr(doctor_container, "SETTINGS", "/none")
            doctor_container.main(["--help"])
        cli.main([*command.split(), "--help"])
    return printed[0]


def shown_by(parser: cli.Parser) -> set[str]:
    """What the flags that its help shows are stored as."""
    return {action.dest for action in parser._actions if action.help != argparse.SUPPRESS}


@pytest.mark.parametrize("command", READERS)
def test_the_help_shows_what_the_command_reads(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = parser_of(command, monkeypatch)
    accepted = {action.dest for action in parser._actions}
    shown = shown_by(parser)
    for struct in HOLDERS:
        known = {name for name in struct.__struct_fields__ if name in accepted}
        read = read_by(command, struct)
        assert shown & known - SAYS_SO <= read, f"shown, and not read: {shown & known - read}"
        assert read & known <= shown | INTERNAL, f"read, and not shown: {read & known - shown}"


OWN = {
    # command line: the files that read the flags which are no settings
    "chat": "commands/chat.py",
    "complete": "commands/chat.py",
    "run-batch": "commands/run_batch.py",
    "doctor": "commands/doctor.py",
    "bench serve": "bench",
    "bench offline": "bench",
    "bench latency": "bench",
    "bench path": "bench",
    "bench kernels": "bench",
}


@pytest.mark.parametrize("command", OWN)
def test_flags_of_a_command_s_own_are_read(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SOURCES / OWN[command]
    files = path.rglob("*.py") if path.is_dir() else (path,)
    read = {name for file in files for holder, name in reads_of(file) if holder == "options"}
    settings = {name for struct in HOLDERS for name in struct.__struct_fields__}
    elsewhere = {"help", "config", "positional", "num_tokenizers", "num_workers", *settings}
    assert shown_by(parser_of(command, monkeypatch)) - elsewhere <= read


def test_a_setting_that_a_command_does_not_read_is_taken_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stack's settings may be given to all commands."""
    with pytest.raises(SystemExit):
        cli.main(["fetch", "--help=seed"])
    assert capsys.readouterr().out == "--seed: accepted without effect by `pagewire fetch`\n"
    with pytest.raises(SystemExit):
        cli.main(["scheduler", "--model", "some/model", "--max-num-seqs", "0"])
    assert "--max-num-seqs 0" in capsys.readouterr().err
