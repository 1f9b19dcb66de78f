"""What is measured: requests by number, lengths and arrival, each with a name, and the prompts they
draw from a seed.

The named workloads are those that published figures exist for. Others are written out: `16x128/64`
is 16 requests at a time of 128 tokens in and 64 out, `256x512/128+1024` puts 1,024 common tokens
before the prompts, and `poisson32x512/128` sends 32 a second whatever comes back.
"""

import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

Span = tuple[int, int]
"""Least and most, uniform between."""

AGAINST_SUFFIX = " (against)"
"""Ends the name of a load that the server compared against was given."""
VOCAB = 30_000
FIRST_ID = 100
"""Smallest token id of a prompt: ids below are often special."""
POISSON_S = 10
ALONE = 8
"""Requests one after the other where one client measures latencies."""
WARMUPS_ALONE = 16
"""So many before them: each of several frontends and tokenizers is to have had some."""
TEXT = (
    "time people way day man thing woman life child world school state family student group country problem hand part place case week "
    "company system program question work government number night point home water room mother area money story fact month lot right "
    "study book eye job word business issue side kind head house service friend father power hour game line end member law car city"
)
WORDS = TEXT.split()
"""Nearly one token each in every common vocabulary."""
WRITTEN = re.compile(r"(?:(poisson)(\d+(?:\.\d+)?)|(\d+))x(\d+)/(\d+)(?:\+(\d+))?")


@dataclass(frozen=True)
class Workload:
    """`requests` in all, at most `streams` at a time, or `rate` a second; `common` tokens start
    every prompt of a run."""

    name: str
    requests: int
    streams: int
    prompt: Span
    output: Span
    common: int = 0
    rate: float = 0.0
    extra: tuple[tuple[str, object], ...] = ()
    """Further fields of each request over HTTP."""

    def sizes(self, make: random.Random) -> list[Span]:
        """(prompt, output) tokens of each request."""
        if self.prompt[0] == self.prompt[1] and self.output[0] == self.output[1]:
            return [(self.prompt[0], self.output[0])] * self.requests
        return [
            (make.randint(*self.prompt), make.randint(*self.output)) for _ in range(self.requests)
        ]

    def scaled(self, factor: float) -> "Workload":
        """The same in small, for a trial: fewer requests, shorter."""

        def less(n: int, least: int) -> int:
            return min(n, max(least, round(n * factor)))

        def span(span: Span) -> Span:
            return less(span[0], 4), less(span[1], 4)

        return dataclasses.replace(
            self,
            requests=less(self.requests, 2),
            streams=less(self.streams, 2),
            prompt=span(self.prompt),
            output=span(self.output),
            common=less(self.common, 32),
        )

    def warmup(self) -> "Workload":
        """As many requests at a time, for a few tokens: what is compiled or captured on first use
        is, before anything is timed."""
        if self.streams == 1:
            return dataclasses.replace(
                self, requests=WARMUPS_ALONE, output=(min(self.output[0], 8),) * 2
            )
        short = min(self.output[0], max(8, self.output[0] // 8))
        return dataclasses.replace(
            self, requests=min(self.requests, max(self.streams, 1)), output=(short, short)
        )


def _batch(name: str, requests: int, prompt: Span, output: Span, common: int = 0) -> Workload:
    return Workload(name, requests, requests, prompt, output, common)


OFFLINE = {
    workload.name: workload
    for workload in (
        _batch("single", 1, (128, 128), (512, 512)),
        _batch("mixed", 256, (100, 1024), (100, 1024)),
        _batch("wide", 1024, (128, 128), (128, 128)),
        _batch("long", 32, (8192, 8192), (64, 64)),
        _batch("shared", 256, (64, 64), (64, 64), common=2048),
    )
}
ONLINE = ("1x128/256", "256x128/128", "256x512/128+1024", "poisson32x512/128", "1024x64/64")
SWEEP = tuple(f"{streams}x128/128" for streams in (1, 4, 16, 64, 256))


def parse(text: str, one_at_a_time: int = 1) -> Workload:
    """A workload by name or as written out; `one_at_a_time`: how many requests a single stream
    sends. Raises ValueError."""
    if text in OFFLINE:
        return OFFLINE[text]
    match = WRITTEN.fullmatch(text)
    if not match:
        names = ", ".join(OFFLINE)
        raise ValueError(
            f"workload {text!r}: one of {names}, or STREAMSxINPUT/OUTPUT[+COMMON], or poissonRATExINPUT/OUTPUT is needed"
        )
    _, rate, streams, prompt, output, common = match.groups()
    numbers = [int(n) for n in (streams or 1, prompt, output)]
    if not all(numbers) or (rate and not float(rate)):
        raise ValueError(f"workload {text!r}: numbers of at least 1 are needed")
    lengths = {"prompt": (numbers[1],) * 2, "output": (numbers[2],) * 2, "common": int(common or 0)}
    if rate:
        return Workload(
            text, max(1, round(float(rate) * POISSON_S)), 0, rate=float(rate), **lengths
        )
    return Workload(text, one_at_a_time if numbers[0] == 1 else numbers[0], numbers[0], **lengths)


def parse_list(
    text: str, groups: dict[str, tuple[str, ...]], one_at_a_time: int = 1
) -> list[Workload]:
    """Workloads separated by commas; a group's name stands for its members."""
    names = [name for word in text.split(",") for name in groups.get(word.strip(), (word.strip(),))]
    return [parse(name, one_at_a_time) for name in names]


def ids(make: random.Random, count: int, vocab: int = VOCAB) -> list[int]:
    return [make.randrange(FIRST_ID, vocab) for _ in range(count)]


def words(make: random.Random, count: int) -> str:
    return " ".join(make.choices(WORDS, k=count))


def batch(workload: Workload, seed: int, vocab: int = VOCAB) -> tuple[list[list[int]], list[int]]:
    """(token ids of each prompt, tokens to generate for each) of one run."""
    make = random.Random(f"{workload.name} {seed}")
    sizes = workload.sizes(make)
    prefix = ids(make, workload.common, vocab)
    return [prefix + ids(make, length, vocab) for length, _ in sizes], [out for _, out in sizes]


def share(workload: Workload, index: int, count: int) -> Workload:
    """What client process `index` of `count` does of it."""

    def cut(n: int) -> int:
        return n // count + (index < n % count)

    return dataclasses.replace(
        workload,
        requests=cut(workload.requests),
        streams=cut(workload.streams),
        rate=workload.rate / count,
    )


def split(workload: Workload, count: int) -> list[Workload]:
    """Shares that have something to do."""
    count = min(count, workload.streams or workload.requests)
    return [share(workload, index, count) for index in range(count)]


def bodies(
    workload: Workload, seed: str, common_seed: str, vocab: int
) -> Iterator[dict[str, object]]:
    """The fields of each completion request. vocab 0: prompts of words; else of token ids below
    it."""
    make = random.Random(seed)
    shared = random.Random(common_seed)
    prefix = words(shared, workload.common) if not vocab else ids(shared, workload.common, vocab)
    for length, output in workload.sizes(make):
        if isinstance(prefix, str):
            prompt: object = f"{prefix} {words(make, length)}".strip()
        else:
            prompt = prefix + ids(make, length, vocab)
        yield {
            "prompt": prompt,
            "max_tokens": output,
            "temperature": 0.6,
            "ignore_eos": True,
            **dict(workload.extra),
        }
