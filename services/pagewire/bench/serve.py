"""`pagewire bench serve`: concurrent streaming load over HTTP on a server that runs, or on one that
is started for it."""

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli import Parser, new_parser, positive
from . import baselines, machine, workloads
from .clients import Clients
from .interleave import Budget, Result, Row, run_interleaved
from .load import Target
from .options import add_common, add_plot, cells, figures_line, say
from .servers import ask_model, metrics, started
from .stats import GRID, distribution, latencies, summarize, table, write_json
from .workloads import AGAINST_SUFFIX

GROUPS = {"standard": workloads.ONLINE, "sweep": workloads.SWEEP}
SHOWN_ALONE = ("out tok/s", "TTFT p50", "TPOT p50")
SHOWN_CLOSED = ("out tok/s", "TTFT p50", "TPOT p50", "gap p99")
SHOWN_OPEN = ("TTFT p50", "TTFT p99", "TPOT p50", "gap p99")
"""Of one stream, of many, and of requests that come at a rate."""
CEILING = "256x128/128"
HEADER = (
    "load",
    "figure",
    "median",
    "least",
    "most",
    "runs",
    "against",
    "ratio",
    "vLLM",
    "goal",
    "of goal",
)
BLIND = "--skip-tokenizer-init"


@dataclass
class Server:
    """A server under load, and its latencies in milliseconds, by load and kind."""

    url: str
    key: str
    model: str
    latencies: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def play(self, clients: Clients, load: workloads.Workload, run: int, vocab: int) -> Row:
        """Raises OSError when a request failed or ended early."""
        samples = clients.run(Target.of(self.url, self.key), self.model, load, run, vocab)
        short = [
            s.error or f"{s.tokens} tokens"
            for s in samples
            if s.error or not load.output[0] <= s.tokens <= load.output[1]
        ]
        if short:
            raise OSError(f"{len(short)} of {len(samples)} answers were not as asked: {short[0]}")
        for kind, values in latencies(samples).items():
            self.latencies.setdefault(load.name, {}).setdefault(kind, []).extend(values)
        return summarize(samples)


def main(arguments: list[str]) -> int:
    options, rest = _parse(arguments)
    budget = Budget(options.budget_s)
    loads = [load.scaled(options.scale) for load in options.loads]
    with contextlib.ExitStack() as cleanup:
        clients = cleanup.enter_context(Clients(options.clients))
        report: dict[str, Any] = {"kind": "serve", "machine": machine.describe(), "settings": rest}
        if not options.no_ceiling and not options.url:
            report["ceiling"] = ceiling(clients, options, rest)
        began = time.monotonic()
        url = options.url or cleanup.enter_context(started(rest))
        servers = {
            "": Server(
                url, options.api_key, options.served_model or ask_model(url, options.api_key)
            )
        }
        report |= describe(servers[""], None if options.url else time.monotonic() - began)
        if options.against:
            model = options.against_model or ask_model(options.against, options.against_key)
            servers[AGAINST_SUFFIX] = Server(options.against, options.against_key, model)
        results = measure(servers, clients, loads, options, budget, report)
    print(tables(report, results, with_baselines=options.scale == 1 and "fake" not in rest))
    if options.plot:
        from .plots import draw

        draw(report, options.plot)
    return 1 if any(result.error for result in results.values()) else 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and the rest of the line, which is the server's."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.url and rest:
        parser.error(f"unknown with --url: {' '.join(rest)}")
    for name in ("url", "against"):
        if url := getattr(options, name):
            try:
                Target.of(url)
            except ValueError as error:
                parser.error(f"--{name} {error}")
    if options.vocab and options.vocab <= workloads.FIRST_ID:
        parser.error(
            f"argument --vocab: {options.vocab}: 0 or more than {workloads.FIRST_ID} is needed"
        )
    try:
        options.loads = workloads.parse_list(options.loads, GROUPS, workloads.ALONE)
    except ValueError as error:
        parser.error(f"argument --loads: {error}")
    return options, rest


def _parser() -> Parser:
    parser = new_parser(
        "bench serve",
        "Streaming load. Without --url, every other flag goes to a `pagewire serve` started for it.",
    )
    parser.add_argument("--url", default="", help="a running server, like http://localhost:8000")
    parser.add_argument("--api-key", default=os.environ.get("PAGEWIRE_API_KEY", ""))
    parser.add_argument(
        "--served-model",
        default="",
        help="model name to ask for (default: the first the server names)",
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="URL",
        help="another OpenAI-compatible server, given the same load in turns",
    )
    parser.add_argument("--against-key", default="", metavar="KEY")
    parser.add_argument("--against-model", default="", metavar="NAME")
    about = "STREAMSxINPUT/OUTPUT[+COMMON] or poissonRATExINPUT/OUTPUT, or `standard` or `sweep` for a list of them (default: standard)"
    parser.add_argument("--loads", default="standard", metavar="LIST", help=about)
    parser.add_argument("--clients", type=positive, default=4, help="client processes (default: 4)")
    about = "prompts of token ids below this instead of words; 0: words (default: 0)"
    parser.add_argument("--vocab", type=int, default=0, metavar="N", help=about)
    parser.add_argument(
        "--no-ceiling",
        action="store_true",
        help="do not measure the path without a model first, which is never done with --url",
    )
    add_common(parser)
    add_plot(parser)
    return parser


def ceiling(clients: Clients, options: argparse.Namespace, rest: list[str]) -> Row:
    """What these clients and the services carry with no model behind them, on this machine."""
    load = workloads.parse(CEILING).scaled(options.scale)
    vocab = options.vocab
    with started([*rest, "--device", "fake", "--log-level", "warning"]) as url:
        server = Server(url, options.api_key, ask_model(url, options.api_key))
        server.play(clients, load.warmup(), -1, vocab)
        row = server.play(clients, load, 0, vocab)
    say(
        f"ceiling, {CEILING} without a model: {row['out tok/s']:,.0f} tok/s, gap p99 {row['gap p99']:.1f} ms"
    )
    return row


def describe(server: Server, ready: float | None) -> dict[str, Any]:
    server_metrics = metrics(server.url)
    blocks = next(
        (value for name, value in server_metrics.items() if name.endswith("kv_blocks_total")), 0
    )
    if ready is not None:
        say(f"{Path(server.model).name} ready in {ready:.1f} s at {server.url}")
    return {
        "model": server.model,
        "url": server.url,
        "ready_s": ready,
        "kv_blocks": blocks,
        "gpu_gib": machine.gpu_memory_gib(),
    }


def measure(
    servers: dict[str, Server],
    clients: Clients,
    loads: list[workloads.Workload],
    options: argparse.Namespace,
    budget: Budget,
    report: dict[str, Any],
) -> dict[str, Result]:
    """Results by the load's name, that of the other server with a mark behind it."""
    if BLIND in report["settings"]:
        say("without a tokenizer there is no text to stream: latencies are those of whole answers")
    report |= {"loads": {}, "grid": GRID}
    measures: dict[str, Callable[[int], Row]] = {}
    for load in loads:
        for mark, server in servers.items():
            measures[load.name + mark] = _measure(server, clients, load, options.vocab)

    def done(name: str, result: Result) -> None:
        mark = AGAINST_SUFFIX if name.endswith(AGAINST_SUFFIX) else ""
        say(f"{name}: {figures_line(result, 'out tok/s', 'TTFT p50', 'TPOT p50', 'gap p99')}")
        measured = servers[mark].latencies.get(name.removesuffix(mark), {})
        report["loads"][name] = result.as_json() | {"distribution": distribution(measured)}
        if options.json:
            write_json(options.json, report)

    return run_interleaved(measures, options.runs, budget, done)


def _measure(
    server: Server, clients: Clients, load: workloads.Workload, vocab: int
) -> Callable[[int], Row]:
    def one(run: int) -> Row:
        if not run:
            server.play(clients, load.warmup(), -1, vocab)
            server.latencies.pop(load.name, None)
        return server.play(clients, load, run, vocab)

    return one


def shown(load: str) -> tuple[str, ...]:
    workload = workloads.parse(load)
    return SHOWN_OPEN if workload.rate else SHOWN_ALONE if workload.streams == 1 else SHOWN_CLOSED


def tables(report: dict[str, Any], results: dict[str, Result], with_baselines: bool = True) -> str:
    model = baselines.identify(report["model"]) if with_baselines else ""
    rows: list[list[Any]] = []
    for name, result in results.items():
        if name.endswith(AGAINST_SUFFIX):
            continue
        theirs = results.get(name + AGAINST_SUFFIX, Result()).median()
        if not result.rows:
            rows.append([name, result.error, *[""] * (len(HEADER) - 2)])
        for figure, ours in (
            (figure, value) for figure, value in result.median().items() if figure in shown(name)
        ):
            other: Any = theirs.get(figure, "")
            ratio = f"{ours / other:.2f}" if other else ""
            values = [row[figure] for row in result.rows]
            spread = (min(values), max(values), len(values)) if len(values) > 1 else ("", "", 1)
            rows.append(
                [name, figure, ours, *spread, other, ratio, *cells(model, name, figure, ours)]
            )
    ready = f", ready in {report['ready_s']:.1f} s" if report["ready_s"] else ""
    held = (
        f"; ceiling without a model {report['ceiling']['out tok/s']:,.0f} tok/s"
        if "ceiling" in report
        else ""
    )
    title = f"{Path(report['model']).name}, over HTTP{ready}{held}; latencies in ms"
    return table(title, HEADER, rows)
