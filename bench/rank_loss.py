"""Streams through a model over several ranks, of which one is killed: what is lost, and how long it
takes until tokens come again and until the group serves again.

    python bench/rank_loss.py --model bench/models/llama-3.1-8b --ranks 2 [flags of pagewire serve]
    python bench/rank_loss.py … --one-gpu             the ranks share a GPU: right, but slow
    python bench/rank_loss.py … --device fake         a trial without a GPU

The same greedy requests run twice, the second time with the loss. Weights are random. Every stream
must end whole; on GPUs tokens may differ from the first time where the batch does, which is
counted. The exit status is 0 when no stream was lost.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from pagewire.bench.servers import started

TIMEOUT_S = 600.0
PROMPT_TOKENS = 128
IDS = 1000
"""Prompts are of ids below it, which every vocabulary has."""


@dataclass
class Stream:
    """`times`: of each event, in monotonic seconds."""

    tokens: list[int] = field(default_factory=list[int])
    times: list[float] = field(default_factory=list[float])
    reason: str = ""


def main() -> int:
    options, flags = parse()
    environment = {"PAGEWIRE_RANKS_SHARE_A_GPU": "1"} if options.one_gpu else {}
    arguments = [
        f"--model={options.model}",
        "--load-format=dummy",
        "--skip-tokenizer-init",
        f"--tensor-parallel-size={options.ranks}",
        *flags,
    ]
    with started(arguments, environment) as url:
        return asyncio.run(measure(url, options))


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=1, help="the one that is killed")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--after-s", type=float, default=1.0, help="from the first token on")
    return parser.parse_known_args()


async def measure(url: str, options: argparse.Namespace) -> int:
    make = random.Random(1)
    prompts = [
        [make.randrange(3, IDS) for _ in range(PROMPT_TOKENS)] for _ in range(options.streams)
    ]
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        plain = [Stream() for _ in prompts]
        began = time.monotonic()
        await asyncio.gather(*run_all(session, url, prompts, plain, options.max_tokens))
        plain_s = time.monotonic() - began
        disturbed = [Stream() for _ in prompts]
        tasks = run_all(session, url, prompts, disturbed, options.max_tokens)
        while not any(stream.times for stream in disturbed):
            await asyncio.sleep(0.01)
        await asyncio.sleep(options.after_s)
        killed = time.monotonic()
        running = sum(not task.done() for task in tasks)
        os.kill(pid_of(options.rank), signal.SIGKILL)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    lost = [
        outcome if isinstance(outcome, BaseException) else f"ended by {stream.reason!r}"
        for outcome, stream in zip(outcomes, disturbed, strict=True)
        if isinstance(outcome, BaseException) or len(stream.tokens) != options.max_tokens
    ]
    alike = sum(a.tokens == b.tokens for a, b in zip(plain, disturbed, strict=True))
    stalls = [longest_gap(stream, killed) for stream in disturbed if stream.times]
    print(f"{running} of {options.streams} streams ran when rank {options.rank} was killed")
    print(f"lost: {len(lost)}", *lost[:5])
    print(f"tokens as without the loss: {alike} of {options.streams} streams")
    print(
        f"seconds without a token: {sorted(stalls)[len(stalls) // 2]:.2f} at the median, {max(stalls):.2f} at most"
    )
    print(
        f"all of it took {time.monotonic() - killed + options.after_s:.1f} s, {plain_s:.1f} s without the loss"
    )
    return 1 if lost or not running else 0


def run_all(
    session: aiohttp.ClientSession,
    url: str,
    prompts: list[list[int]],
    streams: list[Stream],
    count: int,
) -> list[asyncio.Task[None]]:
    return [
        asyncio.create_task(run(session, url, prompt, stream, count))
        for prompt, stream in zip(prompts, streams, strict=True)
    ]


async def run(
    session: aiohttp.ClientSession, url: str, prompt: list[int], stream: Stream, count: int
) -> None:
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ConnectionError(event["error"]["message"])
            stream.times.append(time.monotonic())
            for choice in event["choices"]:
                stream.tokens += choice.get("token_ids") or []
                stream.reason = choice["finish_reason"] or stream.reason


def longest_gap(stream: Stream, since: float) -> float:
    """Seconds between two events of which the second came after `since`."""
    pairs = zip(stream.times, stream.times[1:], strict=False)
    return max((b - a for a, b in pairs if b > since), default=0.0)


def pid_of(rank: int) -> int:
    """Of this stack's worker process. Raises LookupError."""
    name = f"--name=worker-0.{rank}" if rank else "--name=worker-0"
    mine = descendants(os.getpid())
    for pid in mine:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if name in words:
            return pid
    raise LookupError(f"none of the processes {mine} is rank {rank}")


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        found = re.search(r"\) \S (\d+) ", stat.read_text())
        if found:
            parents[int(stat.parent.name)] = int(found[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [each for child in children for each in descendants(child)]


if __name__ == "__main__":
    sys.exit(main())
