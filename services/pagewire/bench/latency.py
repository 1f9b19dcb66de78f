"""`pagewire bench latency`: one request at a time through LLM, percentiles of its latencies by
size."""

import argparse
import itertools
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import new_parser
from . import workloads
from .interleave import Budget, Result, Row, run_interleaved
from .load import Sample
from .offline import describe, settings_of, start, vocabulary
from .options import add_common, add_plot, say
from .stats import GRID, distribution, latencies, percentile, table, write_json

if TYPE_CHECKING:
    from ..offline.llm import LLM

SIZES = "32/32,128/128,1024/128,128/512"
SHARES = (0.5, 0.9, 0.99)


def main(arguments: list[str]) -> int:
    parser = new_parser(
        "bench latency", "One request at a time through LLM: percentiles of its latencies by size."
    )
    parser.add_argument(
        "--sizes",
        default=SIZES,
        metavar="LIST",
        help=f"INPUT/OUTPUT tokens of a request (default: {SIZES})",
    )
    add_common(parser, runs=20)
    add_plot(parser)
    settings, options = settings_of(parser, arguments)
    try:
        chosen = [workloads.parse(f"1x{size.strip()}") for size in options.sizes.split(",")]
    except ValueError:
        parser.error(f"argument --sizes: {options.sizes}: lengths like 128/64,1024/128 are needed")
    budget = Budget(options.budget_s)
    began = time.monotonic()
    with start(settings) as llm:
        report = describe(llm, settings, time.monotonic() - began) | {"kind": "latency"}
        results = measure(llm, chosen, options, budget, report)
    print(tables(report, results))
    if options.plot:
        from .plots import draw

        draw(report, options.plot)
    return 1 if any(result.error for result in results.values()) else 0


def measure(
    llm: "LLM",
    chosen: list[workloads.Workload],
    options: argparse.Namespace,
    budget: Budget,
    report: dict[str, Any],
) -> dict[str, Result]:
    vocab = vocabulary(llm, options.vocab)
    samples = dict[str, list[Sample]]()
    loads = {load.name.removeprefix("1x"): load.scaled(options.scale) for load in chosen}
    report |= {"loads": {}, "grid": GRID}

    def one(name: str, run: int) -> Row:
        if not run:
            ask(llm, loads[name], -1, vocab)
        sample = ask(llm, loads[name], run, vocab)
        samples.setdefault(name, []).append(sample)
        return row_of(sample)

    def done(name: str, result: Result) -> None:
        report["loads"][name] = result.as_json() | {
            "distribution": distribution(latencies(samples.get(name, [])))
        }
        if options.json:
            write_json(options.json, report)

    results = run_interleaved(
        {name: lambda run, name=name: one(name, run) for name in loads}, options.runs, budget, done
    )
    say(f"{sum(len(result.rows) for result in results.values())} requests")
    return results


def ask(llm: "LLM", load: workloads.Workload, run: int, vocab: int) -> Sample:
    """One request, with the moment of each of its tokens."""
    from ..offline.prompts import as_params, as_prompts
    from ..offline.sampling_params import SamplingParams

    prompt = workloads.ids(random.Random(f"{load.name} {run}"), load.prompt[0], vocab)
    params = SamplingParams(
        temperature=0.6, max_tokens=load.output[0], ignore_eos=True, detokenize=False
    )
    batch = llm.batch(as_prompts([prompt]), as_params(params, 1), timed=True)
    began = time.monotonic()
    batch.run()
    moments = batch.sinks[0].token_times
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    return Sample(began, moments[0], moments[-1], len(moments), len(moments), "", gaps)


def row_of(sample: Sample) -> Row:
    """Milliseconds."""
    after_first = 1000 * (sample.last - sample.first)
    return {
        "TTFT": 1000 * (sample.first - sample.began),
        "TPOT": after_first / max(1, sample.tokens - 1),
        "total": 1000 * (sample.last - sample.began),
    }


def tables(report: dict[str, Any], results: dict[str, Result]) -> str:
    rows: list[list[Any]] = []
    for name, result in results.items():
        if not result.rows:
            rows.append([name, result.error, *[""] * (len(SHARES) + 2)])
        for figure in result.rows[0] if result.rows else ():
            values = [row[figure] for row in result.rows]
            rows.append(
                [
                    name,
                    figure,
                    *(percentile(values, share) for share in SHARES),
                    max(values),
                    len(values),
                ]
            )
    title = f"{Path(report['model']).name}, one request at a time; ms"
    return table(
        title,
        ("in/out", "figure", *(f"p{share * 100:g}" for share in SHARES), "most", "requests"),
        rows,
    )
