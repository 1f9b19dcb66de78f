"""Faults against a running stack, while clients check every token they get.

    python -m tests.faults.nemesis --minutes 60 --report report.md
    python -m tests.faults.nemesis --minutes 10 --single --report stalls.md
    python -m tests.faults.nemesis --minutes 10 --held 0.4

The model is the fake one, whose next token is a hash of all tokens before it, so a client knows each
token that must come. Services of each kind are killed (SIGKILL), stopped for good (SIGSTOP), paused
(SIGSTOP, then SIGCONT), ended (SIGTERM), one or two at a time; with `--single` one after the other,
each once the last one's effects are over, which shows how long a stream waits for each. With `--held` a share of the
requests has grammars, matcher processes are killed too, and what must come is what came before the first fault. A run in
which the clients did not keep the stack busy proves nothing, and is void.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))

from e2e.conftest import Stack, gone
from pagewire.hub.huggingface import demo_gguf
from pagewire.worker.fake import chain

VOCAB: Final = 1000
KINDS: Final = ("worker", "tokenizer", "scheduler", "frontend")
MATCHER: Final = "matcher"
FAULTS: Final = ("kill", "stop", "pause", "term")
LONGEST_PAUSE_S: Final = 1.2
"""Of a paused service: less than what counts as hung."""
GAP_S: Final = 0.1
"""A longer gap between two tokens is a stall."""
END_S: Final = 60.0
"""How long a stream may take to end when no more faults come."""
LEAST_UNDER_WAY: Final = 0.5
"""Share of the clients' streams that must be under way at a fault, on average."""
REPLACED_S: Final = 30.0
QUIET_S: Final = 2.0
"""A fault is a single one if no other is as near as this."""
MOST_DOWN: Final = 3
HELD_VOCAB: Final = 49152
"""Of the demo model, whose texts grammars hold."""
WORDS: Final = {"enum": ["a1b2c3d4e5f6g7h8i9", "0z1y2x3w4v5u"]}
GRAMMARS: Final = (
    {"json": {"type": "array", "items": WORDS, "minItems": 12, "maxItems": 12}},
    {"json": {"type": "array", "items": WORDS, "minItems": 2}, "disable_any_whitespace": True},
    {"regex": "([a-f]{3,9}-){8}[0-9]{40}"},
)
"""Long forced runs, free whitespace between them, and hardly anything forced."""
NUM_KNOWN: Final = 24


@dataclass
class Fault:
    """One signal, or two for a pause, to one process. Times are monotonic seconds."""

    at: float
    fault: str
    kind: str
    survivors: int
    """Other services of its kind."""
    gone_s: float | None = None
    """Until its process was gone; None for a pause."""
    ready_s: float | None = None
    """Until the next one was ready."""

    @property
    def back_at(self) -> float:
        """When the next one was ready; of a pause, when it has gone on."""
        return self.at + (LONGEST_PAUSE_S if self.fault == "pause" else self.ready_s or REPLACED_S)

    @property
    def until(self) -> float:
        """When its effects on a client's connection are over at the latest."""
        return self.at + (self.gone_s or 10.0)


@dataclass
class Record:
    """What happened."""

    streams: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list[str])
    """Streams with tokens that are not those of the chain, or with too few."""
    lost: list[str] = field(default_factory=list[str])
    """Broken connections and errors that no fault of a frontend explains."""
    excused: int = 0
    """Those that one does."""
    left: int = 0
    """Streams that their clients left."""
    endless: int = 0
    statuses: Counter[int] = field(default_factory=Counter[int])
    """Of requests that were refused."""
    refusals: list[str] = field(default_factory=list[str])
    """What was said to them, and after how many seconds."""
    under_way: list[int] = field(default_factory=list[int])
    """Streams under way at each fault."""
    stalls: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """(beginning, seconds) of gaps between two tokens."""
    faults: list[Fault] = field(default_factory=list[Fault])

    @property
    def is_sound(self) -> bool:
        """Nothing was wrong, lost, refused or endless."""
        return not (self.wrong or self.lost or self.endless or self.statuses)


@dataclass(frozen=True)
class Known:
    """A request, the tokens that must come, and why they end."""

    body: dict[str, Any]
    tokens: list[int]
    reason: str


class Clients:
    """`count` clients, each with one stream after the other."""

    def __init__(
        self,
        url: str,
        count: int,
        record: Record,
        make: random.Random,
        leaving: float = 0.0,
        vocab: int = VOCAB,
        held: float = 0.0,
        known: Sequence[Known] = (),
    ) -> None:
        """leaving: the share of streams that the client leaves before their end. vocab: of the fake
        model. held: the share of requests that are some of `known`."""
        self._leaving = leaving
        self._vocab = vocab
        self._held = held
        self._known = known
        self.under_way = 0
        self.stopping = False
        self._url = url
        self._count = count
        self._record = record
        self._make = make
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Until `stopping`, and then until the streams under way have ended."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            self._tasks = [asyncio.create_task(self._client(session)) for _ in range(self._count)]
            while not self.stopping:
                await asyncio.sleep(0.1)
            _, pending = await asyncio.wait(self._tasks, timeout=END_S)
            self._record.endless = len(pending)
            for task in pending:
                task.cancel()
            for task in self._tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self.stopping:
            wanted = self._request()
            count = len(wanted.tokens)
            began = time.monotonic()
            tokens: list[int] = []
            self._record.streams += 1
            self.under_way += 1
            try:
                leave_after = self._make.randrange(count) if self._leaves() else 0
                reason = await self._stream(session, wanted.body, tokens, leave_after)
            except (aiohttp.ClientError, ConnectionError, StreamError) as error:
                await self._broken(began, f"{type(error).__name__}: {error}")
                reason = "broken"
            finally:
                self.under_way -= 1
            whole = reason not in ("broken", "left")
            if tokens != wanted.tokens[: len(tokens)] or (
                whole and (len(tokens), reason) != (count, wanted.reason)
            ):
                self._record.wrong.append(f"{len(tokens)} tokens of {count}, reason {reason}")
            self._record.tokens += len(tokens)

    def _request(self) -> Known:
        if self._known and self._make.random() < self._held:
            return self._make.choice(self._known)
        length = self._make.randrange(1, 200)
        prompt = [self._make.randrange(self._vocab) for _ in range(length)]
        count = self._make.randrange(50, 500)
        body = {"prompt": prompt, "max_tokens": count, "ignore_eos": True}
        return Known(body, chain(prompt, count, self._vocab), "length")

    def _leaves(self) -> bool:
        return self._make.random() < self._leaving

    async def _stream(
        self,
        session: aiohttp.ClientSession,
        body: dict[str, Any],
        tokens: list[int],
        leave_after: int,
    ) -> str:
        """Why it ended; "left" where the client has left after so many tokens, unless that is 0."""
        body = {**body, "stream": True, "return_token_ids": True}
        last = time.monotonic()
        reason = ""
        async with session.post(f"{self._url}/completions", json=body) as answer:
            if answer.status != 200:
                raise StreamError(f"status {answer.status}: {await answer.text()}", answer.status)
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise StreamError(str(event["error"]))
                now = time.monotonic()
                if tokens and now - last > GAP_S:
                    self._record.stalls.append((last, now - last))
                last = now
                for choice in event["choices"]:
                    tokens += choice.get("token_ids") or []
                    reason = choice["finish_reason"] or reason
                if leave_after and len(tokens) >= leave_after:
                    self._record.left += 1
                    return "left"
        if not reason:
            raise StreamError("the stream ended without a reason")
        return reason

    async def _broken(self, began: float, error: str) -> None:
        """The nemesis may be about to write down the fault that explains it."""
        await asyncio.sleep(0.2)
        now = time.monotonic()
        hit = [
            fault
            for fault in self._record.faults
            if fault.kind == "frontend" and fault.until >= began and fault.at <= now
        ]
        if hit:
            self._record.excused += 1
        elif error.startswith("StreamError: status "):
            self._record.statuses[int(error.split()[2].rstrip(":"))] += 1
            self._record.refusals.append(f"after {now - began:.1f} s: {error[:300]}")
        else:
            self._record.lost.append(error[:200])


async def known_requests(url: str, make: random.Random) -> list[Known]:
    """Requests with grammars, and what they get from the stack at `url`, to which nothing happens
    meanwhile."""
    known: list[Known] = []
    async with aiohttp.ClientSession() as session:
        for number in range(NUM_KNOWN):
            prompt = [make.randrange(3, HELD_VOCAB) for _ in range(make.randrange(1, 40))]
            form = GRAMMARS[number % len(GRAMMARS)]
            body = {"prompt": prompt, "max_tokens": 300, "structured_outputs": form}
            asked = {**body, "return_token_ids": True}
            async with session.post(f"{url}/completions", json=asked) as answer:
                if answer.status != 200:
                    raise StreamError(await answer.text(), answer.status)
                (choice,) = (await answer.json())["choices"]
            known.append(Known(body, choice["token_ids"], choice["finish_reason"]))
    return known


class StreamError(Exception):
    """The server answered, and not with a stream to its end."""

    def __init__(self, text: str, status: int = 200) -> None:
        super().__init__(text)
        self.status = status


class Nemesis:
    """Sends signals to services of `stack`."""

    def __init__(
        self,
        stack: Stack,
        clients: Clients,
        record: Record,
        make: random.Random,
        matchers: bool = False,
    ) -> None:
        """matchers: their processes are killed too, one at every other time."""
        self._matchers = matchers
        self._stack = stack
        self._clients = clients
        self._record = record
        self._make = make
        self.down: set[int] = set()
        """Processes that were hit and have no successor yet that is ready."""

    async def strike(self, most: int = 2) -> None:
        """One fault, or up to `most` at the same time."""
        self._record.under_way.append(self._clients.under_way)
        if self._matchers and self._make.random() < 0.5:
            self._kill_a_matcher()
        await asyncio.gather(
            *(
                self.hit(self._make.choice(KINDS), self._make.choice(FAULTS))
                for _ in range(min(most, self._make.choice((1, 1, 1, 2))))
            )
        )

    def _kill_a_matcher(self) -> None:
        """It has a successor, of which nobody speaks."""
        pids = [*self._stack.matchers("worker"), *self._stack.matchers("tokenizer")]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._make.choice(pids), signal.SIGKILL)
                fault = Fault(time.monotonic(), "kill", MATCHER, len(pids) - 1, ready_s=0.0)
                self._record.faults.append(fault)

    async def hit(self, kind: str, fault: str) -> None:
        """One fault, until the service has a successor."""
        replicas = [
            pid
            for pid, name in self._stack.children().items()
            if name == kind and pid not in self.down
        ]
        if not replicas:
            return
        pid = self._make.choice(replicas)
        self.down.add(pid)
        name = name_of(pid)
        said = len(self._stack.lines)
        entry = Fault(time.monotonic(), fault, kind, len(replicas) - 1)
        self._record.faults.append(entry)
        with contextlib.suppress(ProcessLookupError):
            await self._send(pid, fault)
        if fault != "pause":
            await self._replaced(pid, name, said, entry)
        self.down.discard(pid)

    async def _send(self, pid: int, fault: str) -> None:
        match fault:
            case "kill":
                os.kill(pid, signal.SIGKILL)
            case "term":
                os.kill(pid, signal.SIGTERM)
            case _:
                os.kill(pid, signal.SIGSTOP)
        if fault == "pause":
            await asyncio.sleep(self._make.uniform(0.05, LONGEST_PAUSE_S))
            os.kill(pid, signal.SIGCONT)

    async def _replaced(self, pid: int, name: str, said: int, entry: Fault) -> None:
        """Until the process is gone and the next one under its name has said that it is ready, in
        a line behind the first `said`."""
        while entry.ready_s is None:
            await asyncio.sleep(0.02)
            passed_s = time.monotonic() - entry.at
            if entry.gone_s is None:
                entry.gone_s = passed_s if gone([pid], 0) else None
            elif any(is_ready_line(line, name) for line in self._stack.lines[said:]):
                entry.ready_s = passed_s
            if passed_s > REPLACED_S:
                self._record.lost.append(f"{name} was not replaced after {entry.fault}")
                return


def name_of(pid: int) -> str:
    """The name that a service was started with."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return next(word for word in words if word.startswith("--name=")).partition("=")[2]


def is_ready_line(line: str, name: str) -> bool:
    """Whether the service `name` says in it that it is ready."""
    return line.startswith(f"{name} ") and (": ready" in line or "listening on" in line)


async def attack(
    stack: Stack,
    seconds: float,
    most_faults: int,
    streams: int,
    pause_s: float,
    seed: int,
    single: bool = False,
    held: float = 0.0,
) -> Record:
    """Until the time is over or so many faults were sent. Between two of them are at most `pause_s`
    seconds, twice that now and then, and no more than MOST_DOWN services are down at a time.
    single: the next fault comes when the last one's successor is ready and QUIET_S have passed.
    held: the share of requests with grammars, for a stack with the demo model's vocabulary."""
    make = random.Random(seed)
    record = Record()
    known = await known_requests(stack.url, make) if held else []
    vocab = HELD_VOCAB if held else VOCAB
    clients = Clients(stack.url, streams, record, make, vocab=vocab, held=held, known=known)
    running = asyncio.create_task(clients.run())
    nemesis = Nemesis(stack, clients, record, make, matchers=bool(held))
    end = time.monotonic() + seconds
    await asyncio.sleep(1.0)
    strikes: set[asyncio.Task[None]] = set()
    while time.monotonic() < end and len(record.faults) < most_faults:
        if stack.process.poll() is not None:
            record.lost.append("the stack has ended")
            break
        if len(nemesis.down) >= MOST_DOWN:
            await asyncio.sleep(0.05)
            continue
        if single:
            await nemesis.strike(most=1)
            await asyncio.sleep(QUIET_S + make.uniform(0.1, 0.6))
            continue
        strikes.add(asyncio.create_task(nemesis.strike()))
        strikes = {task for task in strikes if not task.done()}
        await asyncio.sleep(make.uniform(0.0, pause_s) * make.choice((1, 1, 1, 2)))
    if strikes:
        await asyncio.wait(strikes)
    clients.stopping = True
    await running
    return record


def model_flags(held: float) -> tuple[str, ...]:
    """Of a stack for `attack`."""
    if held:
        return ("--device", "fake", "--model", str(demo_gguf()), "--fake-eos-token-id", "2")
    return ("--device", "fake", "--skip-tokenizer-init", "--fake-vocab-size", str(VOCAB))


def is_void(record: Record, streams: int) -> bool:
    """The clients did not keep the stack busy."""
    return statistics.mean(record.under_way or [0]) < LEAST_UNDER_WAY * streams


def stalls_of(record: Record, kind: str, fault: str) -> list[float]:
    """The longest stall after each fault of this sort that had no other one within QUIET_S, and
    before which all services hit earlier had successors that were ready: what a stream waits for
    where a survivor is there is not what it waits for where all are down."""
    longest: list[float] = []
    for entry in record.faults:
        if (entry.kind, entry.fault) != (kind, fault):
            continue
        near = [
            other
            for other in record.faults
            if other is not entry
            and (-QUIET_S < other.at - entry.at < QUIET_S or other.at <= entry.at <= other.back_at)
        ]
        if near:
            continue
        during = [
            seconds
            for began, seconds in record.stalls
            if began <= entry.at + 2.5 and began + seconds >= entry.at
        ]
        longest.append(max(during, default=0.0))
    return longest


def report(record: Record, streams: int, stack_flags: Sequence[str]) -> str:
    """The run in Markdown."""
    load = os.getloadavg()[0]
    lines = [
        f"- stack: `pagewire serve {' '.join(stack_flags)}`",
        f"- {len(record.faults)} faults, {record.streams} streams, {record.tokens:,} tokens checked; "
        f"{statistics.mean(record.under_way or [0]):.0f} of {streams} streams under way at a fault; "
        f"load average at the end {load:.1f} on {os.cpu_count()} cores",
        f"- wrong, doubled or missing tokens in {len(record.wrong)} streams; {record.endless} that never "
        f"ended; {len(record.lost)} lost; {record.excused} broken with their frontend; "
        f"refused: {dict(record.statuses) or 'none'}",
        "",
        "Seconds are median / longest.",
        "",
        "| service | fault | times | gone after | next one ready after | longest gap of a stream, of "
        "single faults |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, MATCHER):
        for fault in FAULTS if kind != MATCHER else ("kill",):
            entries = [e for e in record.faults if (e.kind, e.fault) == (kind, fault)]
            gone_after = [e.gone_s for e in entries if e.gone_s is not None]
            ready_after = [e.ready_s for e in entries if e.ready_s]
            lines.append(
                f"| {kind} | {fault} | {len(entries)} | {_figures(gone_after)} | "
                f"{_figures(ready_after)} | {_figures(stalls_of(record, kind, fault))} |"
            )
    lines += ["", *record.wrong[:20], *record.lost[:20], *record.refusals[:20]]
    return "\n".join(lines).rstrip() + "\n"


def _figures(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} / {max(seconds):.2f}" if seconds else "-"


def main() -> int:
    """0 when nothing was wrong, 1 when something was, 2 when the run is void."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--faults", type=int, default=10**9, help="end after so many")
    parser.add_argument("--report", type=Path, help="file for the report in Markdown")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--pause", type=float, default=3.0, help="most seconds between faults")
    parser.add_argument("--single", action="store_true", help="one fault after the other")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--replicas", type=int, default=2, help="of all but the scheduler")
    parser.add_argument("--ranks", type=int, default=1, help="of each worker")
    parser.add_argument("--held", type=float, default=0.0, help="share of requests with grammars")
    options = parser.parse_args()
    count = str(options.replicas)
    flags = (*model_flags(options.held), "--fake-step-ms", "4", "--num-frontends", count)
    flags += ("--num-tokenizers", count, "--num-workers", count)
    flags += ("--tensor-parallel-size", str(options.ranks))
    stack = Stack(*flags).wait_ready()
    try:
        record = asyncio.run(
            attack(
                stack,
                60 * options.minutes,
                options.faults,
                options.streams,
                options.pause,
                options.seed,
                options.single,
                options.held,
            )
        )
    finally:
        stack.end()
    text = f"- seed {options.seed}\n{report(record, options.streams, flags)}"
    print(text)
    if not record.is_sound:
        print("\n".join(stack.lines[-200:]), file=sys.stderr)
    if options.report:
        options.report.write_text(text)
    if is_void(record, options.streams):
        print("void: too few streams were under way")
        return 2
    return 0 if record.is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
