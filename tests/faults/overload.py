"""Ten times the requests that the stack can take, for a while: what those get that are taken, and how
long the others wait for their 429.

    python -m tests.faults.overload --minutes 1 --report report.md

The model is the fake one with a fixed time a step, so the most that the stack can generate is known:
its slots over that time. First as many clients as it has slots, and a few more, each with one request
after the other: the best. Then requests at a fixed rate, ten times that, which nobody repeats.
"""

import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import Final

from .reports import finish, parser_of, resident_bytes  # isort: skip

import uvloop
from e2e.conftest import Stack
from e2e.test_stack_fake import VOCAB
from faults.clients import Answer, ask, body_of, quantile
from pagewire.worker.fake import chain

STEP_MS: Final = 10
TOKENS: Final = 100
TIMES: Final = 10
LEAST_GOODPUT: Final = 0.95
REFUSED_S: Final = 0.05
LONGER_GAP: Final = 1.5
MOST_LATE_S: Final = 0.25
GROWN: Final = 32 << 20
"""Bytes of memory, of all services together, from the middle to the end of the overload."""
FLAGS: Final = (
    *("--device", "fake", "--skip-tokenizer-init", "--fake-vocab-size", str(VOCAB)),
    *("--fake-step-ms", str(STEP_MS), "--num-frontends", "2", "--num-tokenizers", "1"),
)


def flags_of(slots: int) -> tuple[str, ...]:
    """With a queue as long as there are slots."""
    return (*FLAGS, "--max-num-seqs", str(slots), "--max-queued-reqs", str(slots))


@dataclass
class Window:
    """What came of the requests of one stretch of time."""

    answers: list[Answer] = field(default_factory=list[Answer])
    began: float = 0.0
    ended: float = 0.0
    wrong: int = 0
    """Answers of 200 that were not whole, or of other tokens."""
    late: list[float] = field(default_factory=list[float])
    """How late the clients' own event loop was, in seconds."""

    def add(self, answer: Answer, prompt: list[int]) -> None:
        """The answer to `prompt` has ended."""
        self.answers.append(answer)
        if answer.status == 200:
            self.wrong += answer.tokens != chain(prompt, TOKENS, VOCAB)

    @property
    def goodput(self) -> float:
        """Tokens a second, of streams that ended whole."""
        whole = [a for a in self.answers if a.status == 200 and a.reason == "length"]
        tokens = sum(a.tokens_until(self.ended) - a.tokens_until(self.began) for a in whole)
        return tokens / (self.ended - self.began)

    @property
    def gap_p99(self) -> float:
        """Seconds, between tokens of accepted streams."""
        return quantile([gap for answer in self.answers for gap in answer.gaps], 0.99)

    def refusals(self) -> list[float]:
        """Seconds until each 429."""
        return [answer.status_s for answer in self.answers if answer.status == 429]

    def others(self) -> int:
        """Answers that are neither streams nor 429."""
        return sum(answer.status not in (200, 429) for answer in self.answers)


def prompt_of(number: int) -> list[int]:
    return [number % VOCAB, number // VOCAB % VOCAB, 7]


async def closed(url: str, clients: int, seconds: float) -> Window:
    """`clients` clients, each with one request after the other."""
    window = Window(began=time.monotonic())
    window.ended = window.began + seconds

    async def client(number: int) -> None:
        while time.monotonic() < window.ended:
            prompt = prompt_of(number)
            window.add(await ask(url, body_of(prompt, TOKENS)), prompt)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return window


async def at_rate(url: str, rate: float, seconds: float, settle_s: float) -> Window:
    """`rate` requests a second, whatever becomes of them. The first `settle_s` seconds, in which the
    queue fills, do not count."""
    window = Window(began=time.monotonic() + settle_s)
    window.ended = window.began + seconds
    tasks = set[asyncio.Task[None]]()
    due = time.monotonic()
    number = 0

    async def one(prompt: list[int]) -> None:
        counts = time.monotonic() >= window.began
        answer = await ask(url, body_of(prompt, TOKENS))
        if counts or answer.status == 200:
            window.add(answer, prompt)

    while due < window.ended:
        await asyncio.sleep(due - time.monotonic())
        window.late.append(time.monotonic() - due)
        number += 1
        task = asyncio.create_task(one(prompt_of(number)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += 1 / rate
    await asyncio.gather(*tasks)
    return window


@dataclass
class Outcome:
    best: Window
    over: Window
    grown: int

    @property
    def is_void(self) -> bool:
        """The clients could not send so many requests in time, and measured themselves."""
        return quantile(self.over.late, 0.99) > MOST_LATE_S

    def faults(self) -> list[str]:
        """What is not as it should be."""
        share = self.over.goodput / self.best.goodput
        refused_s = quantile(self.over.refusals(), 0.99)
        gaps = self.over.gap_p99, self.best.gap_p99
        checks = {
            f"goodput is {share:.1%} of the best": share >= LEAST_GOODPUT,
            f"429 p99 is {1000 * refused_s:.0f} ms": refused_s <= REFUSED_S,
            "nobody was refused": bool(self.over.refusals()),
            f"gap p99 is {1000 * gaps[0]:.0f} ms, and was {1000 * gaps[1]:.0f} ms": gaps[0]
            <= LONGER_GAP * gaps[1],
            f"{self.over.others()} answers were neither streams nor 429": not self.over.others(),
            f"{self.over.wrong + self.best.wrong} streams were wrong": not (
                self.over.wrong or self.best.wrong
            ),
            f"{self.grown >> 20} MiB more memory": self.grown < GROWN,
        }
        return [what for what, holds in checks.items() if not holds]


async def measure(stack: Stack, slots: int, seconds: float) -> Outcome:
    """The best for a quarter of the time, the overload for the rest."""
    url = stack.url
    await closed(url, slots, 1.0)
    best = await closed(url, slots + slots // 2, seconds / 4)
    capacity = slots / (TOKENS * STEP_MS / 1000)
    pids = list(stack.children())
    over = asyncio.create_task(at_rate(url, TIMES * capacity, 0.75 * seconds, 2.0))
    await asyncio.sleep(0.4 * seconds)
    memory = sum(map(resident_bytes, pids))
    await asyncio.sleep(0.3 * seconds)
    grown = sum(map(resident_bytes, pids)) - memory
    return Outcome(best, await over, grown)


def report(outcome: Outcome, slots: int) -> str:
    """In Markdown."""
    best, over = outcome.best, outcome.over
    refusals = over.refusals()
    milliseconds = ", ".join(
        f"p{100 * share:g} {1000 * quantile(refusals, share):.1f}" for share in (0.5, 0.9, 0.99)
    )
    return "\n".join(
        (
            f"- `pagewire serve {' '.join(flags_of(slots))}`",
            f"- best: {best.goodput:.0f} tokens/s, gap p99 {1000 * best.gap_p99:.1f} ms",
            f"- {TIMES} times that: {over.goodput:.0f} tokens/s ({over.goodput / best.goodput:.1%}), "
            f"gap p99 {1000 * over.gap_p99:.1f} ms",
            f"- {len(refusals)} of {len(over.answers)} requests got 429, after {milliseconds} ms; "
            f"the clients' own event loop was late by {1000 * quantile(over.late, 0.99):.1f} ms (p99)",
            f"- memory of all services from the middle to the end: {outcome.grown / (1 << 20):+.1f} MiB",
        )
    )


def main() -> int:
    """0 when all is as it should be, 1 when it is not, 2 when the run is void."""
    parser = parser_of(__doc__)
    parser.add_argument("--slots", type=int, default=16, help="of the worker, and of the queue")
    options = parser.parse_args()
    stack = Stack(*flags_of(options.slots)).wait_ready()
    try:
        outcome = uvloop.run(measure(stack, options.slots, 60 * options.minutes))
    finally:
        stack.end()
    code = finish(report(outcome, options.slots), outcome.faults(), options.report)
    if outcome.is_void:
        print("void: the clients could not send their requests in time")
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
