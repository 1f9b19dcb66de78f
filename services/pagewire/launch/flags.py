"""The command line of `pagewire serve` and `pagewire run-batch`: own settings, vLLM's, and a file
of either. Starts nothing."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import structs

from ..cli import Parser, add_model, hide, new_parser, positive, read_all, take_model
from ..config import (
    SWITCH,
    VARIABLE_PREFIX,
    BadSetting,
    FrontendConfig,
    ModelConfig,
    RunConfig,
    SchedulerConfig,
    TokenizerConfig,
    WorkerConfig,
    add_flags,
    setting_of,
    template_defaults,
    variable_of,
)
from ..frontend.auth import KEYS_VARIABLE
from ..process import processors
from . import stack
from .vllm_compat import ALIASES, FOREIGN, Refused, judge_all

EPILOG = (
    "--help=FLAG, --help=GROUP or --help=WORD shows a part of this. "
    "Numbers may end in k, m, g (thousands) or K, M, G (powers of 1,024). What becomes of vLLM's other flags: docs/flags.md."
)
RUN_DIR_HELP = (
    "directory of the services' sockets; default: PAGEWIRE_RUN_DIR, or one of this stack's own"
)
GROUPS: dict[str, tuple[type[Any], ...]] = {
    # title in the help: settings
    "model": (ModelConfig, TokenizerConfig),
    "HTTP": (FrontendConfig,),
    "scheduling": (SchedulerConfig,),
    "device and memory": (WorkerConfig,),
    "processes and logs": (RunConfig,),
}
STRUCTS: tuple[type[Any], ...] = (
    RunConfig,
    ModelConfig,
    FrontendConfig,
    TokenizerConfig,
    SchedulerConfig,
    WorkerConfig,
)
REPLICAS = ("num_frontends", "num_tokenizers", "num_workers")
INTERNAL = ("socket_fd", "name", "run_dir")


def new(
    command: str,
    description: str,
    hidden: tuple[str, ...] = (),
    parser_class: type[Parser] = Parser,
) -> Parser:
    """A parser for everything that a stack is started with. What was not given is absent from its
    namespace. `hidden`: settings that the help does not show."""
    parser = new_parser(command, description, parser_class)
    parser.epilog = EPILOG
    add_model(parser)
    parser.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML file of settings by these names; flags and variables win",
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for title, settings in GROUPS.items():
        add_flags(groups[title], *settings, skip=INTERNAL)
    processes = groups["processes and logs"]
    processes.add_argument("--run-dir", default=argparse.SUPPRESS, metavar="STR", help=RUN_DIR_HELP)
    for name in REPLICAS:
        usual = (
            "1" if name == "num_workers" else "more than 1 beside a GPU, where there are 8 cores"
        )
        about = f"how many {name.removeprefix('num_')} (default: {usual})"
        processes.add_argument(
            "--" + name.replace("_", "-"),
            type=positive,
            default=argparse.SUPPRESS,
            metavar="N",
            help=about,
        )
    hide(parser, hidden)
    _add_aliases(parser)
    _add_foreign(parser)
    return parser


def _add_aliases(parser: argparse.ArgumentParser) -> None:
    actions = {action.dest: action for action in parser._actions}
    for alias, name in ALIASES.items():
        value_type: Any = actions[name].type
        parser.add_argument(
            "--" + alias.replace("_", "-"),
            dest=name,
            type=value_type,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument(
        "--disable-cascade-attn", dest="enable_cascade", action="store_false", **hidden
    )
    parser.add_argument("--hf-token", **hidden)


def _add_foreign(parser: Parser) -> None:
    own_names = {action.dest for action in parser._actions}
    for name, foreign in FOREIGN.items():
        if name in own_names:
            continue
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": argparse.SUPPRESS,
        }
        boolean: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if foreign.switch else {}
        )
        parser.add_argument("--" + name.replace("_", "-"), *foreign.short, **options, **boolean)
        verdict = "refused" if foreign.refused else "accepted without effect"
        parser.notes[name] = f"vLLM's flag, {verdict}: {foreign.why}"


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    say: Callable[[str], None],
    runs_here: bool = True,
) -> tuple[stack.StackConfig, argparse.Namespace]:
    """The stack's settings, and everything that was given. Exits with status 2 and one line on what
    is wrong; `say` gets a line for each setting that is accepted without effect. `runs_here`: the
    stack will run on this machine, whose GPUs have to suffice for it."""
    options = parser.parse_args(arguments)
    take_model(parser, options)
    if "config" in options:
        options = _with_file(parser, options)
    for line in _lines_about(parser, options):
        say(line)
    if token := getattr(options, "hf_token", None):
        os.environ["HF_TOKEN"] = token
    config = configure(parser, options, runs_here)
    for line in stack.notes(config.worker, _as_flag):
        say(line)
    return config, options


def configure(
    parser: argparse.ArgumentParser, options: argparse.Namespace, runs_here: bool = True
) -> stack.StackConfig:
    run, model, frontend, tokenizer, scheduler, worker = read_all(parser.error, STRUCTS, options)
    if not hasattr(options, "run_dir") and not os.environ.get("PAGEWIRE_RUN_DIR"):
        run = structs.replace(run, run_dir="")
    for name in REPLICAS:
        if (text := os.environ.get(variable_of(name))) and not hasattr(options, name):
            try:
                setattr(options, name, positive(text))
            except argparse.ArgumentTypeError as error:
                return parser.error(f"{variable_of(name)}: {error}")
    usual = (*stack.replicas(processors.usable(), worker.device, stack.has_gpu()), 1)
    counts = {
        name: getattr(options, name, default) for name, default in zip(REPLICAS, usual, strict=True)
    }
    config = stack.StackConfig(run, model, tokenizer, scheduler, worker, frontend, **counts)
    try:
        template_defaults(tokenizer)
        return stack.check_workers(config) if runs_here else config
    except BadSetting as error:
        return parser.error(str(error))


def _lines_about(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """What the user should know of the settings that have no effect here."""
    own_names = {name for struct in STRUCTS for name in struct.__struct_fields__}
    try:
        lines = judge_all(vars(options), own_names, _as_flag, os.environ)
    except Refused as refusal:
        return parser.error(f"{_as_flag(refusal.name, refusal.value)}: {refusal}")
    return [*lines, *_mistyped({*own_names, *REPLICAS})]


def _as_flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if isinstance(value, bool) else f"{flag} {value}"


def _mistyped(own_names: set[str]) -> list[str]:
    """A line for each variable that is nearly a setting's."""
    variables = [variable_of(name) for name in sorted(own_names)]
    lines: list[str] = []
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLE_PREFIX) and value and name not in (*variables, KEYS_VARIABLE):
            close = difflib.get_close_matches(name, variables, 1, 0.9)
            lines += [f"{name} is no setting; did you mean {close[0]}?"] if close else []
    return lines


def _with_file(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """The settings of the file without those that the environment gives, and over them what the
    command line says."""
    arguments = _from_file(parser, options.config)
    filed = parser.parse_args(arguments)
    take_model(parser, filed)
    left = {name: value for name, value in vars(filed).items() if not setting_of(name, os.environ)}
    return argparse.Namespace(**{**left, **vars(options)})


def add_file(
    parser: argparse.ArgumentParser, structs: tuple[type[Any], ...], options: argparse.Namespace
) -> None:
    """Put what the file `options.config` says of the settings in `structs` into `options`, where
    neither a flag nor a variable says it. `parser` is that of one service, and the file is for all
    of them: exits with one line for a name or a value that no service could take."""
    whole = new(parser.prog.partition(" ")[2], "")
    filed = whole.parse_args(_from_file(whole, options.config))
    take_model(whole, filed)
    for line in _lines_about(whole, filed):
        warn(line)
    read_all(whole.error, STRUCTS, filed)
    for name in REPLICAS:
        if hasattr(filed, name):
            warn(f"{name} in {options.config} is for `pagewire serve`; here each service is one")
    if token := getattr(filed, "hf_token", None):
        os.environ.setdefault("HF_TOKEN", token)
    own = {name for struct in structs for name in struct.__struct_fields__}
    for name, value in vars(filed).items():
        if name in own and not hasattr(options, name) and not setting_of(name, os.environ):
            setattr(options, name, value)


def _from_file(parser: argparse.ArgumentParser, name: str) -> list[str]:
    """A YAML mapping as flags. Exits with one line when it is none, or has a key that is no
    setting."""
    try:
        import yaml
    except ImportError:
        return parser.error("--config needs PyYAML: pip install pyyaml")
    try:
        mapping = yaml.safe_load(Path(name).expanduser().read_text())
    except (OSError, UnicodeDecodeError) as error:
        return parser.error(f"--config {name}: {getattr(error, 'strerror', None) or error}")
    except yaml.YAMLError as error:
        return parser.error(f"--config {name}: {' '.join(str(error).split())}")
    if mapping is not None and not isinstance(mapping, dict):
        return parser.error(
            f"--config {name}: a mapping of settings to values is needed, not a {type(mapping).__name__}"
        )
    return from_mapping(parser, f"--config {name}", mapping or {})


def from_mapping(
    parser: argparse.ArgumentParser, source: str, mapping: Mapping[str, Any]
) -> list[str]:
    """Settings by their names as flags. Exits with one line, which begins with `source`, for a name
    that is no setting."""
    return [
        flag
        for key, value in mapping.items()
        for flag in _as_flags(parser, source, str(key), value)
    ]


def _as_flags(parser: argparse.ArgumentParser, source: str, key: str, value: Any) -> list[str]:
    actions = parser._option_string_actions
    flag = "--" + key.replace("_", "-")
    if flag not in actions or key in ("config", "help"):
        others = actions.keys() - {"--config", "--help"}
        close = difflib.get_close_matches(flag, others, 1, 0.75)
        hint = f"; did you mean {close[0][2:]}?" if close else ""
        return parser.error(f"{source}: unknown setting {key}{hint}")
    if value is None:
        return []
    takes_none = actions[flag].nargs == 0
    if takes_none and isinstance(value, str):
        value = SWITCH.get(value.lower(), value)
    if isinstance(value, bool):
        return (
            [flag if value else f"--no-{key.replace('_', '-')}"]
            if takes_none
            else [f"{flag}={str(value).lower()}"]
        )
    if isinstance(value, list):
        return [f"{flag}={item}" for item in value]
    return [f"{flag}={value}"]


def warn(line: str) -> None:
    print(f"pagewire: {line}", file=sys.stderr, flush=True)
