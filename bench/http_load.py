"""Streaming text completions over HTTP from client processes: throughput, time to first token, gaps between chunks.

    python bench/http_load.py --loads 1x128/256,256x128/128,1024x64/64 [--runs 3] [--json FILE] [flags of pagewire serve]

A load is STREAMS x WORDS / TOKENS: that many requests at once, each with a prompt of so many words (nearly one token each), generating so
many tokens. `256x128/128+1024` puts 1,024 common words before the prompts. Tokens are counted by the usage that the server reports.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from pagewire.bench.figures import summarize, table, write_json
from pagewire.bench.load import Sample, Target, send_all
from pagewire.bench.serve import started

TEXT = (
    "time people way day man thing woman life child world school state family student group country problem hand part place case week "
    "company system program question work government number night point home water room mother area money story fact month lot right "
    "study book eye job word business issue side kind head house service friend father power hour game line end member law car city"
)
WORDS = TEXT.split()


def parse_load(text: str) -> tuple[int, int, int, int]:
    """(streams, words, tokens, common words) of `256x128/128+1024`."""
    text, _, common = text.partition("+")
    streams, _, lengths = text.partition("x")
    words, _, tokens = lengths.partition("/")
    return int(streams), int(words), int(tokens), int(common or 0)


def client(target: Target, seed: str, streams: int, load: tuple[int, int, int, int], start: Any, results: Any) -> None:
    make, (_, words, tokens, common) = random.Random(seed), load
    shared = " ".join(random.Random(f"common {seed.partition(' ')[0]}").choices(WORDS, k=common))
    bodies = [
        {
            "prompt": f"{shared} {' '.join(make.choices(WORDS, k=words))}".strip(),
            "max_tokens": tokens,
            "temperature": 0.6,
            "ignore_eos": True,
        }
        for _ in range(streams)
    ]
    start.wait()
    results.put(asyncio.run(send_all(target, bodies, streams)))


@contextlib.contextmanager
def clients(target: Target, load: tuple[int, int, int, int], run: int, processes: int) -> Iterator[tuple[Any, Any, int]]:
    """Client processes ready to go: (barrier to pass, queue of samples, how many processes)."""
    context = multiprocessing.get_context("spawn")
    share = [load[0] // processes + (i < load[0] % processes) for i in range(processes)]
    share = [n for n in share if n]
    start, results = context.Barrier(len(share) + 1), context.Queue()
    running = [context.Process(target=client, args=(target, f"{run} {i} {load}", n, load, start, results)) for i, n in enumerate(share)]
    for process in running:
        process.start()
    try:
        yield start, results, len(share)
    finally:
        for process in running:
            process.join(30)


def measure(target: Target, load: tuple[int, int, int, int], run: int, processes: int) -> dict[str, Any]:
    with clients(target, load, run, processes) as (start, results, count):
        start.wait()
        began = time.monotonic()
        samples: list[Sample] = [sample for _ in range(count) for sample in results.get(timeout=300)]
        seconds = time.monotonic() - began
    wrong = sum(sample.tokens != load[2] for sample in samples)
    if wrong:
        raise SystemExit(f"{wrong} of {load[0]} answers were not {load[2]} tokens long: {[s.error for s in samples if s.error][:1]}")
    figures = summarize(samples, load[1] + load[3])
    return {"tok/s": load[0] * load[2] / seconds, **{k: figures[k] for k in figures if k.startswith(("ttft", "tpot", "gap", "chunks"))}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--loads", default="1x128/256,256x128/128")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--json", default="")
    options, flags = parser.parse_known_args()
    everything: dict[str, Any] = {}
    with started(flags) as url:
        target = Target.of(url)
        for text in options.loads.split(","):
            load = parse_load(text)
            measure(target, load, -1, options.clients)
            runs = [measure(target, load, run, options.clients) for run in range(options.runs)]
            row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(table(text, row), flush=True)
            everything |= {f"{text}: {key}": value for key, value in row.items()}
    if options.json:
        write_json(options.json, everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
