"""`pagewire bench path`: what a token costs between the worker and the client, and how many of them
this machine can carry.

A fake worker (a hash for a model) feeds concurrent HTTP streams, with so many frontends and
tokenizers, and a step every so many milliseconds: a service that falls behind merges tokens into
fewer messages and chunks, which makes each cheaper, so the cost depends on the pace. The cost of a
service is its user and system time during a load, over the tokens of the load.
"""

import argparse
import contextlib
import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

from ..cli import new_parser, positive
from . import machine, workloads
from .clients import Clients
from .interleave import Budget, Result, Row, run_interleaved
from .options import add_common, figures_line, say
from .serve import Server
from .servers import ask_model, started
from .stats import table, write_json

SERVICES = ("frontend", "tokenizer", "scheduler", "worker")
TICKS = os.sysconf("SC_CLK_TCK")
ASKING: dict[str, dict[str, object]] = {
    "plain": {},
    "logprobs": {"logprobs": 5},
    "stop": {"stop": ["the end of all things", "\n\n\n### 12345", "Zyx wvu tsr"]},
}
"""Fields of requests that ask for more than text."""
SHOWN = (
    "out tok/s",
    "TTFT p50",
    "gap p99",
    "chunks/token",
    *(f"{service} us" for service in SERVICES[:3]),
)


def main(arguments: list[str]) -> int:
    parser = new_parser(
        "bench path", "The path without a model; flags not listed here go to `pagewire serve`."
    )
    about = "FRONTENDSxTOKENIZERS to compare (default: 1x1,2x1,2x2,4x2)"
    parser.add_argument(
        "--replicas", type=_pairs, default="1x1,2x1,2x2,4x2", metavar="LIST", help=about
    )
    parser.add_argument(
        "--step-ms",
        type=_numbers,
        default="0,3,10",
        metavar="LIST",
        help="time of a step (default: 0,3,10)",
    )
    parser.add_argument(
        "--load",
        type=_load,
        default="256x32/1000",
        help="as for bench serve (default: 256x32/1000)",
    )
    about = f"of {','.join(ASKING)}: five log-probabilities a token, three stop strings (default: plain)"
    parser.add_argument("--asking", type=_asking, default="plain", metavar="LIST", help=about)
    parser.add_argument("--clients", type=positive, default=4, help="client processes (default: 4)")
    add_common(parser, runs=1)
    options, rest = parser.parse_known_args(arguments)
    report: dict[str, Any] = {
        "kind": "path",
        "machine": machine.describe(),
        "load": options.load.name,
        "settings": rest,
        "rows": {},
    }
    with Clients(options.clients) as clients:
        results = measure(clients, options, rest, report)
    print(tables(report, results))
    return 1 if any(result.error for result in results.values()) else 0


def _pairs(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(map(int, pair.split("x"))) for pair in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError
    return [(pair[0], pair[1]) for pair in pairs]


def _asking(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= ASKING.keys():
        raise ValueError
    return names


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _load(text: str) -> workloads.Workload:
    try:
        return workloads.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def measure(
    clients: Clients, options: argparse.Namespace, rest: list[str], report: dict[str, Any]
) -> dict[str, Result]:
    load = options.load.scaled(options.scale)

    def one(replicas: tuple[int, int], step_ms: float, asking: str, run: int) -> Row:
        flags = [
            "--num-frontends",
            str(replicas[0]),
            "--num-tokenizers",
            str(replicas[1]),
            "--fake-step-ms",
            str(step_ms),
        ]
        asking_load = dataclasses.replace(load, extra=tuple(ASKING[asking].items()))
        return once(
            clients, asking_load, run, [*rest, "--device", "fake", "--log-level", "warning", *flags]
        )

    def done(name: str, result: Result) -> None:
        say(f"{name}: {figures_line(result, *SHOWN)}")
        report["rows"][name] = result.as_json()
        if options.json:
            write_json(options.json, report)

    measures = {
        f"{pair[0]}x{pair[1]}, {step_ms:g} ms{'' if asking == 'plain' else ', ' + asking}": partial(
            one, pair, step_ms, asking
        )
        for pair in options.replicas
        for step_ms in options.step_ms
        for asking in options.asking
    }
    return run_interleaved(measures, options.runs, Budget(options.budget_s), done)


def once(clients: Clients, load: workloads.Workload, run: int, flags: list[str]) -> Row:
    with started(flags) as url:
        server = Server(url, "", ask_model(url))
        pids = services(os.getpid())
        server.play(clients, load.warmup(), -1, 0)
        before = {service: cpu_seconds(pids[service]) for service in SERVICES}
        row = server.play(clients, load, run, 0)
        used = {service: cpu_seconds(pids[service]) - before[service] for service in SERVICES}
    tokens = load.requests * load.output[0]
    return row | {f"{service} us": 1e6 * used[service] / tokens for service in SERVICES}


def tables(report: dict[str, Any], results: dict[str, Result]) -> str:
    rows = [
        [
            name,
            *(
                (result.median()[figure] for figure in SHOWN)
                if result.rows
                else (result.error, *[""] * (len(SHOWN) - 1))
            ),
        ]
        for name, result in results.items()
    ]
    title = f"the path without a model, {report['load']}, {report['machine']['cores']} cores; us: CPU time a token of all of a kind"
    return table(title, ("frontends x tokenizers, step", *SHOWN), rows)


# --- what processes have used ---


def services(root: int) -> dict[str, list[int]]:
    """Process ids of the services of the stacks that the process `root` started, by kind."""
    parents = dict[int, int]()
    service_of = dict[int, str]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, StopIteration):
                pid = int(entry.name)
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_text().split("\0")
                service_of[pid] = words[words.index("pagewire") + 1] if "pagewire" in words else ""
    mine: dict[str, list[int]] = {service: [] for service in SERVICES}
    for pid, service in service_of.items():
        if service in mine and parents.get(parents[pid]) == root:
            mine[service].append(pid)
    return mine


def cpu_seconds(pids: list[int]) -> float:
    """User plus system time of all threads; nanosecond run time where the kernel shows it, else
    clock ticks."""
    total = 0.0
    for pid in pids:
        try:
            tasks = Path(f"/proc/{pid}/task").iterdir()
            total += sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except OSError:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total
