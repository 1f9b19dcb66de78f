"""Runs the simulated stack (simulation.py) for many seeds, on all cores.

    python -m tests.faults.simulate --seeds 200000

Says which seeds break a promise; `--first SEED --seeds 1` runs one of them again.
"""

import argparse
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.simulation import simulate

CHUNK: Final = 250


def broken(seeds: range) -> list[tuple[int, str]]:
    """The seeds among these that break a promise, and how."""
    found: list[tuple[int, str]] = []
    for seed in seeds:
        try:
            simulate(seed)
        except Exception:
            found.append((seed, traceback.format_exc()))
    return found


def run(first: int, count: int, processes: int = 0) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """(seeds that were run, those that broke a promise) of one chunk after the other. processes: 0 is
    one a core."""
    chunks = [
        range(at, min(at + CHUNK, first + count)) for at in range(first, first + count, CHUNK)
    ]
    context = multiprocessing.get_context("fork")
    with context.Pool(processes or os.cpu_count()) as pool:
        results = pool.imap(broken, chunks)
        yield from zip(map(len, chunks), results, strict=True)


def main() -> int:
    """0 when no promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so long; 0: never")
    about = "(default: a random one, so that each run looks at others)"
    parser.add_argument("--first", type=int, default=random.randrange(2**40), help=about)
    parser.add_argument("--processes", type=int, default=0, help="0: one a core")
    options = parser.parse_args()
    began = time.monotonic()
    total = failures = 0
    for number, found in run(options.first, options.seeds, options.processes):
        total += number
        for seed, what in found:
            failures += 1
            print(f"seed {seed}:\n{what}", flush=True)
        passed_s = time.monotonic() - began
        if options.minutes and passed_s > 60 * options.minutes:
            break
    seconds = time.monotonic() - began
    print(
        f"{total} seeds from {options.first} on in {seconds:.0f} s ({total / seconds:.0f} a second), "
        f"{failures} broke a promise; load average at the end {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
