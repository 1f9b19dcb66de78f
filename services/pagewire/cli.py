"""The `pagewire` command: finds the subcommand and hands it the rest of the line.

Each subcommand's module is imported only when it is called, so that `pagewire --version` and the
small services start fast.
"""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .config import (
    FrontendConfig,
    ModelConfig,
    RunConfig,
    SchedulerConfig,
    TokenizerConfig,
    WorkerConfig,
    add_flags,
    read,
    read_environment,
)
from .process import last_words, logs
from .process.errors import EXPECTED, error_line
from .process.imports import imported
from .version import __version__

COMMANDS = {
    # command: (module, what it does)
    "serve": (
        "launch.serve",
        "start every service on this machine behind an OpenAI-compatible endpoint",
    ),
    "run-batch": ("commands.run_batch", "answer the requests of a file"),
    "chat": ("commands.chat", "talk to a running server in the terminal"),
    "complete": ("commands.complete", "let a running server continue texts, in the terminal"),
    "fetch": ("commands.fetch", "download a model and print where its files are"),
    "bench": (
        "bench",
        "measure a server under load, the offline API, one request, or the GPU kernels",
    ),
    "doctor": ("commands.doctor", "check this machine and say in plain words what is wrong"),
}
MANY_FLAGS = 15
IMAGE_VARIABLE = "PAGEWIRE_IMAGE"
"""Says, in one of Pagewire's images, which of them it is: the name of a service, or all."""
OTHER_NAMES = {"collect-env": "doctor"}
"""What vLLM calls a command."""
SERVICES: dict[str, tuple[str, tuple[type[Any], ...], str]] = {
    # command: (module, what `run` takes, what it does)
    "frontend": ("frontend.service", (RunConfig, ModelConfig, FrontendConfig), "HTTP endpoint"),
    "tokenizer": (
        "tokenizer.service",
        (RunConfig, ModelConfig, TokenizerConfig),
        "text to tokens and back",
    ),
    "scheduler": (
        "scheduler.loop",
        (RunConfig, ModelConfig, SchedulerConfig),
        "batching and KV blocks",
    ),
    "worker": (
        "worker.loop",
        (RunConfig, ModelConfig, SchedulerConfig, WorkerConfig),
        "the model on its device",
    ),
}
HUB_FILES = (
    "model",
    "tokenizer",
    "revision",
    "tokenizer_revision",
    "download_dir",
    "load_format",
    "skip_tokenizer_init",
    "trust_remote_code",
)
"""Settings that say which files a model has, and where."""
READ: dict[str, dict[type[Any], Collection[str]]] = {
    # service: the settings that it reads, of a Struct that it does not read whole
    "frontend": {ModelConfig: ("model", "tokenizer")},
    "tokenizer": {ModelConfig: (*HUB_FILES, "generation_config", "chat_template")},
    "scheduler": {ModelConfig: ()},
    "worker": {
        ModelConfig: (*HUB_FILES, "quantization", "chat_template", "max_model_len", "seed"),
        SchedulerConfig: (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_step_ms",
            "enable_cascade",
            "steps_in_flight",
        ),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command `argv`, by default the command line's. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    command = OTHER_NAMES.get(command, command)
    if command in ("--version", "-V", "-v", "version"):
        print(f"pagewire {__version__}")
        return 0
    if command == "help" and len(arguments) > 1:
        return _help(arguments[1], arguments[2:])
    if command in ("--help", "-h", "help"):
        print(usage())
        return 0
    if command not in COMMANDS and command not in SERVICES:
        close = difflib.get_close_matches(command, [*COMMANDS, *SERVICES, *OTHER_NAMES], 1)
        hint = f"did you mean `pagewire {close[0]}`? " if close else ""
        print(
            f"pagewire: unknown command {command!r}; {hint}`pagewire --help` lists them",
            file=sys.stderr,
        )
        return 2
    return _guarded(command, arguments[1:])


def _help(command: str, words: list[str]) -> int:
    """`pagewire help COMMAND`: what COMMAND prints with --help. A word after it is a kind of
    benchmark, or a part of a flag's name. Returns the exit status."""
    if command == "bench":
        return main([command, *words, "--help"])
    return main([command, f"--help={words[0]}" if words else "--help"])


def usage() -> str:
    """What `pagewire --help` prints."""
    rows = [(name, text) for name, (_, text) in COMMANDS.items()]
    rows += [(name, f"this service alone: {text}") for name, (_, _, text) in SERVICES.items()]
    lines = [f"  pagewire {name:<10} {text}" for name, text in rows]
    return "\n".join(
        [
            "usage: pagewire COMMAND [flags]",
            "",
            *lines,
            "",
            "`pagewire COMMAND --help` lists the flags, `--help=WORD` those with WORD in their names; `pagewire --version`.",
        ]
    )


def _guarded(command: str, arguments: list[str]) -> int:
    try:
        if command in SERVICES:
            return run_service(command, arguments)
        if command == "doctor" and os.environ.get(IMAGE_VARIABLE):
            return imported("commands.doctor_container").main(arguments)
        return imported(COMMANDS[command][0]).main(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except ModuleNotFoundError as error:
        if (error.name or __package__ or "").startswith("pagewire"):
            raise
        return report_error(command, error)
    except EXPECTED as error:
        return report_error(command, error)


def report_error(command: str, error: Exception) -> int:
    """Print one line, and the traceback with --log-level debug. Returns the exit status."""
    if "--log-level=debug" in sys.argv or ("--log-level", "debug") in zip(
        sys.argv, sys.argv[1:], strict=False
    ):
        logging.getLogger("pagewire").exception("details")
    has_line = isinstance(error, (ModuleNotFoundError, PermissionError))
    words = error_line(error) if has_line else str(error) or type(error).__name__
    last_words.say(command, words)
    return 1


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: a usage text of fifty flags above it would only
    hide the reason. `--help=WORD` shows one flag, a group of them, or all with WORD in their
    names."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.notes: dict[str, str] = {}
        """What `--help=FLAG` says of flags that the help does not show, by destination."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Flags with underscores are taken for those with dashes, as vLLM takes them."""
        words = [dashed(word) for word in (sys.argv[1:] if args is None else args)]
        for word in words:
            if word.startswith("--help="):
                self._show(word.removeprefix("--help=").strip().lstrip("-").replace("_", "-"))
        return super().parse_known_args(words, namespace)

    def format_help(self) -> str:
        """The usage of a command with many flags does not list them a second time."""
        if self.usage is None and len(self._actions) > MANY_FLAGS:
            named = any(not action.option_strings for action in self._actions)
            self.usage = f"{self.prog} {'[MODEL] ' if named else ''}[flags]"
        return super().format_help()

    def _show(self, word: str) -> NoReturn:
        """Print the help of the flags that `word` names, and exit."""
        flag = f"--{word.lower()}"
        exact = self._option_string_actions.get(flag)
        if exact is not None and exact.help is argparse.SUPPRESS:
            note = self.notes.get(exact.dest, f"another name of --{exact.dest.replace('_', '-')}")
            print(f"{flag}: {note}")
            self.exit(0)
        title, actions = (None, [exact]) if exact else self._flags_of(word.lower())
        if not actions:
            self.exit(2, f"{self.prog}: no flag has {word!r} in its name; {self._hint_for(flag)}\n")
        formatter = self._get_formatter()
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
        self._print_message(formatter.format_help(), sys.stdout)
        self.exit(0)

    def _flags_of(self, word: str) -> tuple[str | None, list[argparse.Action]]:
        """The group with the title `word` and its flags; else no title, and the flags that are
        shown and have `word` in their names. Lower case."""
        for group in self._action_groups:
            if (group.title or "").lower() == word and group._group_actions:
                return group.title, group._group_actions
        shown = [action for action in self._actions if action.help is not argparse.SUPPRESS]
        return None, [a for a in shown if any(word in flag for flag in a.option_strings)]

    def _hint_for(self, flag: str) -> str:
        """The flag most like `flag`, which does not exist; else the titles of all groups."""
        close = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.6)
        if close:
            return f"did you mean {close[0]}?"
        # The first two are argparse's own.
        return f"the groups are {', '.join(group.title or '' for group in self._action_groups[2:])}"

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, with the closest flag for one that does not exist."""
        words = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments: "):
            flag = words[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.75)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"{'unknown flag' if flag.startswith('-') else 'one argument too many:'} {flag}{hint}"
        self.exit(
            2,
            f"{self.prog}: {message.removeprefix('argument ')} (`{self.prog} --help` lists the flags)\n",
        )


def dashed(word: str) -> str:
    """A flag with dashes for underscores, its value unchanged; any other word as it is."""
    name, sign, value = word.partition("=")
    return name.replace("_", "-") + sign + value if name.startswith("--") else word


def new_parser(command: str, description: str, parser_class: type[Parser] = Parser) -> Parser:
    """The parser of a command, without flags yet."""
    return parser_class(f"pagewire {command}", description=description, allow_abbrev=False)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model without its flag, as in `pagewire serve MODEL`; `take_model` reads it."""
    parser.add_argument("positional", nargs="?", metavar="MODEL", help="the same as --model")


def take_model(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """Move a model that was named without its flag to `namespace.model`. Exits with one line when
    --model names another one."""
    positional = vars(namespace).pop("positional")
    if positional is not None and positional != getattr(namespace, "model", positional):
        parser.error(f"two models given: {positional} and --model {namespace.model}")
    if positional is not None:
        namespace.model = positional


def hide(parser: Parser, names: Collection[str]) -> None:
    """Leave flags out of the help that a command takes, since one stack's settings may be given to
    all commands, and does not use."""
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS
            parser.notes[action.dest] = f"accepted without effect by `{parser.prog}`"


def unread(read: Mapping[type[Any], Collection[str]]) -> list[str]:
    """The settings of the Structs in `read` of which it does not say that they are read."""
    return [
        name
        for struct, names in read.items()
        for name in struct.__struct_fields__
        if name not in names
    ]


def positive(text: str) -> int:
    """A flag's number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is needed")
    return int(text)


def parse_structs(
    command: str,
    description: str,
    structs: tuple[type[Any], ...],
    arguments: list[str],
    read: Mapping[type[Any], Collection[str]] | None = None,
) -> list[Any]:
    """The Structs as given on the command line. `read`: the settings that the command reads, as in
    READ; None: all. Exits with status 2 and one line on a bad flag or value."""
    parser = new_parser(command, description)
    parser.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML file of the whole stack's settings, of which this service takes its own; flags and variables win",
    )
    add_flags(parser, *structs)
    hide(parser, unread(read or {}))
    namespace = parser.parse_args(arguments)
    if "config" in namespace:
        imported("launch.flags").add_file(parser, structs, namespace)
    return read_all(parser.error, structs, namespace)


def read_all(
    refuse: Callable[[str], Any], structs: tuple[type[Any], ...], namespace: argparse.Namespace
) -> list[Any]:
    """The Structs with the values of `namespace`, and of the environment where it has none.
    `refuse` is called with one line on a bad value; it does not return."""
    from .process.parent import Started

    try:
        if not Started.by_parent:
            read_environment(structs, namespace, os.environ)
        return [read(struct, namespace) for struct in structs]
    except ValueError as error:
        return refuse(str(error))


def run_service(command: str, arguments: list[str]) -> int:
    """One service in this process, until a signal ends it. Returns the exit status."""
    from .process import alive, liveness, watchdog
    from .process.group import PLACE_VARIABLE
    from .process.parent import Started, die_with_parent

    die_with_parent()
    module, structs, description = SERVICES[command]
    configs = parse_structs(command, description, structs, arguments, READ[command])
    run = configs[0]
    logs.set_up(run.log_level, run.log_format, run.name or command)
    liveness.own.settle(run.watchdog_timeout)
    if command == "worker" and configs[-1].world_size > 1 and not Started.by_parent:
        return imported("launch.rank_group").run(*configs)
    if PLACE_VARIABLE in os.environ and configs[-1].distributed_executor_backend == "ray":
        return imported("launch.ray_ranks.proxy").run(run, configs[-1], arguments)
    if Started.by_parent or not run.watchdog_timeout:
        liveness.own.inherit()
        return imported(module).run(*configs)

    def report(ending: watchdog.Ending) -> None:
        _announce_end(command, run, ending)

    # A frontend does this by itself. The others go on as long as there are only frontends that
    # finish what they have: where a whole stack is stopped, what runs can still end.
    is_frontend = command == "frontend"
    stop = watchdog.Stop(
        0.0 if is_frontend else run.shutdown_delay,
        lambda: alive.living(Path(run.run_dir), "frontend"),
    )
    return watchdog.run_watched(command, lambda: imported(module).run(*configs), report, stop)


def _announce_end(command: str, run: RunConfig, ending: Any) -> None:
    """A service that nobody supervises has ended (process.watchdog.Ending). Whoever starts
    containers will start it again, after an end in order as well: new requests wait for that. The
    libraries for this are only loaded now: until then this process does nothing but wait."""
    from pagewire_protocol.messages import Role

    from .process.announce import Announcer

    role = Role[command.upper()]
    if ending.in_order and role not in (Role.WORKER, Role.TOKENIZER):
        return  # nobody waits for these
    announcer = Announcer(run.run_dir)
    announcer.announce(
        role,
        run.name or f"{command}-{ending.pid}",
        ending.incarnation,
        ending.cause,
        failures=0 if ending.in_order else 1,
    )
    announcer.close(linger_ms=500)
