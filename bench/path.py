"""The path without a model: what a token costs the frontend, the tokenizer and the scheduler in CPU time.

    python bench/path.py [--streams 256] [--tokens 1000] [--clients 4] [--json FILE] [flags of pagewire serve]

A fake worker (a hash for a model, the vocabulary of the demo's tokenizer) feeds concurrent HTTP streams, read by client processes of
their own. The cost of a service is its user and system time from the first tenth of the tokens until every client has read all of its
own, over the tokens of that time. Two runs, since a service that falls behind merges tokens into fewer messages and chunks, which makes
each cheaper: as fast as everything goes, and with a step every 10 ms, where every token is a chunk of its own.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagewire.bench.figures import summarize, table, write_json
from pagewire.bench.load import Sample, Target, send_all
from pagewire.bench.servers import started

KINDS = ("frontend", "tokenizer", "scheduler", "worker")
TICKS = os.sysconf("SC_CLK_TCK")
VOCAB = 49_152


def services(root: int) -> dict[str, list[int]]:
    """Process ids of the services below the process `root`, by kind."""
    parents, kinds = dict[int, int](), dict[int, str]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, StopIteration):
                pid = int(entry.name)
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_text().split("\0")
                kinds[pid] = words[words.index("pagewire") + 1] if "pagewire" in words else ""
    mine: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for pid, kind in kinds.items():
        if kind in mine and parents.get(parents[pid]) == root:
            mine[kind].append(pid)
    return mine


def cpu_seconds(pids: list[int]) -> float:
    """User plus system time of all threads; nanosecond run time where the kernel shows it, else clock ticks."""
    total = 0.0
    for pid in pids:
        try:
            tasks = Path(f"/proc/{pid}/task").iterdir()
            total += sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except OSError:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def client(target: Target, seed: int, streams: int, options: argparse.Namespace, results: Any) -> None:
    make = random.Random(seed)
    bodies = [
        {
            "prompt": [make.randrange(VOCAB) for _ in range(options.input_len)],
            "max_tokens": options.tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(streams)
    ]
    results.put(asyncio.run(send_all(target, bodies, streams)))


@contextlib.contextmanager
def clients(target: Target, options: argparse.Namespace) -> Iterator[Any]:
    """Client processes that share the streams among them; yields the queue of their samples."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    share = [options.streams // options.clients + (i < options.streams % options.clients) for i in range(options.clients)]
    processes = [context.Process(target=client, args=(target, i, n, options, results)) for i, n in enumerate(share)]
    for process in processes:
        process.start()
    try:
        yield results
    finally:
        for process in processes:
            process.join(10)


def delivered(url: str) -> float:
    """Tokens that the frontends have accepted so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        found = re.findall(r"^vllm:generation_tokens_total\S* (\S+)", answer.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def measure(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    fake = ["--device", "fake", "--fake-vocab-size", str(VOCAB), "--max-num-seqs", str(options.streams), "--log-level", "warning"]
    with started([*fake, *flags]) as url:
        pids = services(os.getpid())
        target = Target.of(url)
        asyncio.run(send_all(target, [{"prompt": [1, 2, 3], "max_tokens": 50}] * 8, 8))
        with clients(target, options) as results:
            goal = options.streams * options.tokens
            wait_until(url, delivered(url), goal * 0.1)
            begin, cpu, began = delivered(url), {kind: cpu_seconds(pids[kind]) for kind in KINDS}, time.monotonic()
            samples: list[Sample] = [sample for _ in range(options.clients) for sample in results.get(timeout=300)]
            seconds = time.monotonic() - began
            tokens, used = delivered(url) - begin, {kind: cpu_seconds(pids[kind]) - cpu[kind] for kind in KINDS}
    figures: dict[str, Any] = {"streams": options.streams, "tokens_a_stream": options.tokens, "tokens_per_s": tokens / seconds}
    figures |= {f"{kind}_us_per_token": 1e6 * used[kind] / tokens for kind in KINDS}
    whole = summarize(samples)
    return figures | {key: whole[key] for key in ("failed", "chunks/token", "TTFT p50", "gap p50", "gap p99")}


def wait_until(url: str, before: float, tokens: float) -> None:
    end = time.monotonic() + 300
    while delivered(url) - before < tokens:
        if time.monotonic() > end:
            raise TimeoutError(f"{delivered(url) - before:.0f} of {tokens:.0f} tokens came in 300 s")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens a stream")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--json", default="")
    options, flags = parser.parse_known_args()
    paced = any(flag.startswith("--fake-step-ms") for flag in flags)
    runs = {"as given": flags} if paced else {"as fast as it goes": flags, "a step every 10 ms": [*flags, "--fake-step-ms", "10"]}
    figures = {name: measure(options, chosen) for name, chosen in runs.items()}
    for name, row in figures.items():
        print(table(f"the path without a model, {name}", ("figure", "value"), list(row.items())))
    if options.json:
        write_json(options.json, {f"{name}: {key}": value for name, row in figures.items() for key, value in row.items()})
    return 1 if any(row["failed"] for row in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
