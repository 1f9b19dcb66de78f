"""Clients that never read, beside others: what the others get of what they got without them.

    python -m tests.faults.silent --clients 500 --minutes 1 --report report.md

The model is the fake one with a fixed time a step, so that each stream has a pace of its own as long
as no service falls behind. The others are to get 99% of the tokens that they get without silent
clients, measured before and after.
"""

import asyncio
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from .reports import finish, parser_of, resident_bytes  # isort: skip

from e2e.conftest import Stack
from e2e.test_slow_readers import start
from e2e.test_stack_fake import VOCAB, gauges
from faults.clients import ask, body_of, quantile, until
from pagewire.worker.fake import chain

LEAST_SHARE: Final = 0.99
PARKED_S: Final = 60.0
TOKENS: Final = 200
PROMPT: Final = 3
HELD_BYTES: Final = 512 << 10
"""Of memory, for each silent client: its buffer, its connection, its request and the scheduler's
columns of its slot, which stay for the next one."""
FLAGS: Final = (
    *("--device", "fake", "--skip-tokenizer-init", "--fake-vocab-size", str(VOCAB)),
    *("--fake-step-ms", "10", "--max-num-seqs", "1024", "--max-queued-reqs", "4096"),
    *("--num-frontends", "2", "--num-tokenizers", "1"),
)


@dataclass
class Window:
    """What the others got in one stretch of time."""

    streams: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wrong: int = 0
    gap_p99: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


async def others(url: str, count: int, seconds: float) -> Window:
    """`count` clients that read, each with one stream after the other."""
    window = Window()
    gaps: list[float] = []
    began = time.monotonic()
    end = began + seconds

    async def client(number: int) -> None:
        while time.monotonic() < end:
            answer = await ask(url, body_of([number] * PROMPT, TOKENS))
            expected = chain([number] * PROMPT, TOKENS, VOCAB)
            window.wrong += answer.tokens != expected
            window.streams += 1
            window.tokens += answer.tokens_until(end)
            gaps.extend(answer.gaps)

    await asyncio.gather(*(client(number) for number in range(count)))
    window.seconds = seconds
    window.gap_p99 = quantile(gaps, 0.99)
    return window


@dataclass
class Outcome:
    without: tuple[Window, Window]
    """Before and after the silent clients."""
    beside: Window
    parked: bool
    """All silent clients' requests were parked in time."""
    grown: dict[str, int]
    """Bytes of memory, by kind of service."""
    left: float
    """Requests that are still parked when the silent clients have gone."""

    @property
    def share(self) -> float:
        """Of their tokens, that the others got beside silent clients."""
        return 2 * self.beside.rate / sum(window.rate for window in self.without)

    @property
    def total_grown(self) -> int:
        """Of all services."""
        return sum(self.grown.values())

    def faults(self, clients: int) -> list[str]:
        """What is not as it should be."""
        wrong = sum(window.wrong for window in (*self.without, self.beside))
        checks = {
            f"others got {self.share:.1%} of their tokens": self.share >= LEAST_SHARE,
            f"{wrong} streams of others were wrong": not wrong,
            "silent clients were not all parked": self.parked,
            f"{self.total_grown >> 20} MiB more memory": self.total_grown < clients * HELD_BYTES,
            f"{self.left:.0f} requests of clients that have left are still parked": not self.left,
        }
        return [what for what, holds in checks.items() if not holds]


def memory_of(stack: Stack) -> dict[str, int]:
    """Bytes, by kind of service."""
    total = Counter[str]()
    for pid, kind in stack.children().items():
        total[kind] += resident_bytes(pid)
    return total


async def measure(stack: Stack, clients: int, readers: int, seconds: float) -> Outcome:
    """`seconds` each before, with and after the silent clients."""
    await others(stack.url, readers, 1.0)
    before = await others(stack.url, readers, seconds)
    memory = memory_of(stack)
    silent: list[socket.socket] = []
    try:
        for _ in range(clients):
            silent.append(await asyncio.to_thread(start, stack, 30_000, 1))
        parked = await until(lambda: gauges(stack)["requests_parked"] == clients, PARKED_S)
        beside = await others(stack.url, readers, seconds)
        grown = {kind: size - memory[kind] for kind, size in memory_of(stack).items()}
    finally:
        for client in silent:
            client.close()
    await until(lambda: not gauges(stack)["requests_parked"], PARKED_S)
    left = gauges(stack)["requests_parked"]
    after = await others(stack.url, readers, seconds)
    return Outcome((before, after), beside, parked, grown, left)


def main() -> int:
    """0 when the others got what they should."""
    parser = parser_of(__doc__)
    parser.add_argument("--clients", type=int, default=500, help="that never read")
    parser.add_argument("--readers", type=int, default=16)
    options = parser.parse_args()
    stack = Stack(*FLAGS).wait_ready()
    try:
        seconds = 60 * options.minutes / 3
        outcome = asyncio.run(measure(stack, options.clients, options.readers, seconds))
    finally:
        stack.end()
    before, after = outcome.without
    rows = (("before them", before), ("beside them", outcome.beside), ("after them", after))
    text = f"- {options.readers} clients that read, {options.clients} that never do\n" + "\n".join(
        f"- {name}: {window.rate:.0f} tokens/s, {window.streams} streams, "
        f"gap p99 {1000 * window.gap_p99:.0f} ms"
        for name, window in rows
    )
    text += f"\n- {outcome.share:.1%} of the tokens; more memory, in MiB: "
    text += ", ".join(f"{kind} {size >> 20}" for kind, size in outcome.grown.items())
    return finish(text, outcome.faults(options.clients), options.report)


if __name__ == "__main__":
    sys.exit(main())
