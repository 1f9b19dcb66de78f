"""`pagewire bench offline`: throughput of LLM.generate, token ids in and out."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import Parser, add_model, hide, new_parser, positive, read_all, take_model
from ..config import (
    ModelConfig,
    RunConfig,
    SchedulerConfig,
    TokenizerConfig,
    WorkerConfig,
    add_flags,
)
from . import baselines, machine, workloads
from .interleave import Budget, Result, Row, run_interleaved
from .options import add_common, cells, figures_line, say
from .stats import table, write_json

if TYPE_CHECKING:
    from ..offline.llm import LLM

STRUCTS = (RunConfig, ModelConfig, TokenizerConfig, SchedulerConfig, WorkerConfig)
HTTP_ONLY = ("shutdown_delay",)
OWN = ("workloads", "runs", "budget_s", "scale", "json", "vocab", "repeats", "sizes", "plot")
GROUPS = {"all": tuple(workloads.OFFLINE), "sweep": workloads.SWEEP}


def main(arguments: list[str]) -> int:
    parser = new_parser("bench offline", "Throughput of LLM.generate, token ids in and out.")
    about = f"by name ({', '.join(workloads.OFFLINE)}) or as 16x128/64+1024: requests, tokens in, out, common (default: all of the named)"
    parser.add_argument("--workloads", default="all", metavar="LIST", help=about)
    add_common(parser)
    settings, options = settings_of(parser, arguments)
    try:
        chosen = workloads.parse_list(options.workloads, GROUPS)
    except ValueError as error:
        parser.error(f"argument --workloads: {error}")
    budget = Budget(options.budget_s)
    began = time.monotonic()
    with start(settings) as llm:
        report = describe(llm, settings, time.monotonic() - began)
        results = measure(llm, chosen, options, budget, report)
    comparable = options.scale == 1 and settings.get("device") != "fake"
    print(tables(report, results, with_baselines=comparable))
    return 1 if any(result.error for result in results.values()) else 0


def settings_of(parser: Parser, arguments: list[str]) -> tuple[dict[str, Any], argparse.Namespace]:
    """(the keyword arguments of LLM, the measurement's own options). Exits with status 2 and one
    line on a bad flag or value."""
    add_model(parser)
    add_flags(parser, *STRUCTS, skip=("run_dir", "name"))
    hide(parser, HTTP_ONLY)
    about = f"prompts are random token ids from {workloads.FIRST_ID} to this (default: {workloads.VOCAB}, or the model's)"
    parser.add_argument("--vocab", type=_vocabulary, default=workloads.VOCAB, help=about)
    options = parser.parse_args(arguments)
    take_model(parser, options)
    read_all(parser.error, STRUCTS, options)
    return {key: value for key, value in vars(options).items() if key not in OWN}, options


def _vocabulary(text: str) -> int:
    if positive(text) <= workloads.FIRST_ID:
        raise argparse.ArgumentTypeError(f"{text}: more than {workloads.FIRST_ID} is needed")
    return int(text)


def start(settings: dict[str, Any]) -> "LLM":
    """Raises OSError when a service does not start, with its last words."""
    from ..offline.llm import LLM, EngineError

    try:
        return LLM(**settings)
    except EngineError as error:
        raise OSError(str(error)) from None


def describe(llm: "LLM", settings: dict[str, Any], ready: float) -> dict[str, Any]:
    """What was started, how long that took and what it can hold."""
    model = str(settings.get("model", "demo"))
    held = int(llm.stats().get("kv_blocks_total", 0) * settings.get("block_size", 16))
    memory = machine.gpu_memory_gib()
    say(
        f"{Path(model).name} ready in {ready:.1f} s, KV cache of {held:,} tokens{f', {memory:.1f} GiB of the GPU in use' if memory else ''}"
    )
    report = {
        "kind": "offline",
        "model": model,
        "ready_s": ready,
        "kv_tokens": held,
        "gpu_gib": memory,
    }
    return report | {"settings": settings, "machine": machine.describe()}


def measure(
    llm: "LLM",
    chosen: list[workloads.Workload],
    options: argparse.Namespace,
    budget: Budget,
    report: dict[str, Any],
) -> dict[str, Result]:
    vocab = vocabulary(llm, options.vocab)
    once(llm, workloads.OFFLINE["single"].scaled(min(options.scale, 0.25)), -1, vocab)
    report["workloads"] = {}

    def one(workload: workloads.Workload) -> Callable[[int], Row]:
        return lambda run: once(llm, workload, run, vocab)

    def done(name: str, result: Result) -> None:
        say(f"{name}: {figures_line(result, shown(name))}")
        report["workloads"][name] = result.as_json()
        if options.json:
            write_json(options.json, report)

    return run_interleaved(
        {workload.name: one(workload.scaled(options.scale)) for workload in chosen},
        options.runs,
        budget,
        done,
    )


def vocabulary(llm: "LLM", limit: int) -> int:
    return min(limit, llm._roster.vocab_size)


def once(llm: "LLM", workload: workloads.Workload, run: int, vocab: int) -> Row:
    """Raises ValueError when a request is refused or ends before its length."""
    from ..offline.sampling_params import SamplingParams

    prompts, lengths = workloads.batch(workload, run, vocab)
    params = [
        SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in lengths
    ]
    began = time.monotonic()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    seconds = time.monotonic() - began
    produced = [len(output.outputs[0].token_ids) for output in outputs]
    if produced != lengths:
        raise ValueError(
            f"{workload.name}: asked for {sum(lengths):,} tokens, got {sum(produced):,}"
        )
    return {
        "out tok/s": sum(produced) / seconds,
        "in tok/s": sum(map(len, prompts)) / seconds,
        "seconds": seconds,
    }


def shown(workload: str) -> str:
    """The figure that a workload is for."""
    return "in tok/s" if workload == "long" else "out tok/s"


def tables(report: dict[str, Any], results: dict[str, Result], with_baselines: bool = True) -> str:
    model = baselines.identify(report["model"]) if with_baselines else ""
    rows: list[list[Any]] = []
    for name, result in results.items():
        figure = shown(name)
        values = [row[shown(name)] for row in result.rows]
        if values:
            middle = result.median()[figure]
            rows.append(
                [
                    name,
                    figure,
                    middle,
                    min(values),
                    max(values),
                    len(values),
                    *cells(model, name, figure, middle),
                ]
            )
        else:
            rows.append([name, result.error, "", "", "", "", "", "", ""])
    title = f"{Path(report['model']).name}, offline: ready in {report['ready_s']:.1f} s, KV cache of {report['kv_tokens']:,} tokens"
    return table(
        title,
        ("workload", "figure", "median", "least", "most", "runs", "vLLM", "goal", "of goal"),
        rows,
    )
