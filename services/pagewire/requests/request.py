"""One request as its owner sees it, what each attempt at it repeats, and where its output goes.
Knows no HTTP and no peers."""

import secrets
from array import array
from collections.abc import Callable
from typing import Final, Protocol

from msgspec import Struct
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.deadlines import NO_DEADLINE, TIMEOUT_STATUS, timeout_ms
from pagewire_protocol.grammar import Grammar
from pagewire_protocol.messages import Deltas, Generate
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import End, Finish, Prompt, PromptLogprobs, Started, TokenLogprobs

from .answers import Output, outputs_of
from .errors import ErrorKind, RequestError, failed, timed_out, unavailable

CHARACTERS_PER_TOKEN: Final = 4
"""In most texts."""
NOT_WAITING: Final = -1
NO_EXECUTION: Final = -1
"""Of an attempt that no worker has answered yet."""


class Job(Struct, frozen=True):
    """What every attempt at a request repeats."""

    prompt: Prompt
    sampling: Sampling
    text: TextOptions
    add_special_tokens: bool = True
    max_tokens_is_rest: bool = False
    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None


def prompt_size(prompt: Prompt) -> int:
    """Its tokens: of ids as many as there are, of text about as many."""
    if prompt.ids is not None:
        return len(prompt.ids) // 4
    if prompt.chat is not None:
        messages = prompt.chat.messages
        characters = sum(len(message.content) + len(message.fields) for message in messages)
        characters += len(prompt.chat.tools)
        return characters // CHARACTERS_PER_TOKEN
    return len(prompt.text or "") // CHARACTERS_PER_TOKEN


class Sink(Protocol):
    """Where a request's accepted output goes. Exactly one of `finished` and `failed` is called,
    last; none may raise."""

    wants_tokens: bool
    """`tokens` is called for each row, instead of `text` for each row with text."""

    def started(self, started: Started) -> None:
        """It got a slot on a worker. Comes again with each attempt."""
        ...

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        """A run of prompt tokens, before any output. After an interruption positions come again,
        with the same meaning: the later entry replaces the earlier one."""
        ...

    def text(self, text: Output, /) -> None:
        """The text that new tokens complete, never empty; of a job with AnswerOptions the parts of
        the answer, where the model's answers have some."""
        ...

    def tokens(self, text: Output, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        """New tokens, the text that they complete, and their log-probabilities where the job asks
        for them."""
        ...

    def finished(
        self,
        reason: str,
        stop_reason: int | str | None,
        completion_tokens: int,
        reasoning_tokens: int = 0,
    ) -> None:
        """`reason` is "stop" or "length"; `stop_reason` the stop string or stop token id that was
        hit."""
        ...

    def failed(self, error: RequestError) -> None:
        """There will be no more output."""
        ...


class OwnedRequest:
    """One request over all its attempts, as its owner sees it. Times are seconds on the owner's
    clock, 0 until they are known."""

    __slots__ = (
        "arrival_time",
        "attempt",
        "deadline",
        "deliver",
        "execution",
        "first_token_time",
        "handle",
        "interruptions",
        "job",
        "last_token_time",
        "out",
        "parked",
        "prompt_tokens",
        "resume_at",
        "rid",
        "scheduled_time",
        "sink",
        "suspended_until",
        "tokenizer",
        "tokenizer_inbox",
        "tokens_at_death",
        "tokens_at_interruption",
        "waiting_tokens",
        "worker_deaths",
    )

    def __init__(self, job: Job, sink: Sink, now: float) -> None:
        self.rid = secrets.token_bytes(16)
        self.job = job
        self.sink = sink
        self.deliver: Callable[[Output], None] | None = None if sink.wants_tokens else sink.text
        self.attempt = 0
        self.deadline = NO_DEADLINE
        """When its answer must be complete."""
        self.handle = -1
        self.execution = NO_EXECUTION
        self.out = array("i")
        """The tokens accepted so far."""
        self.tokenizer = 0
        """Incarnation of the tokenizer that serves the current attempt."""
        self.tokenizer_inbox = ""
        self.arrival_time = now
        self.scheduled_time = 0.0
        """When it got a slot on a worker."""
        self.first_token_time = 0.0
        self.last_token_time = now
        self.parked = False
        """Its client reads nothing, so it gets no further tokens."""
        self.waiting_tokens = NOT_WAITING
        """What it counts among those that wait for their first slot on a worker."""
        self.prompt_tokens = 0
        self.interruptions = 0
        """Those in a row that may be the request's own doing."""
        self.tokens_at_interruption = 0
        """How many tokens it had when the last one came."""
        self.worker_deaths = 0
        """Workers in a row that ended while they computed its next token."""
        self.tokens_at_death = -1
        """How many tokens it had when the last one did."""
        self.resume_at = 0.0
        """When the next attempt is due, while it is suspended."""
        self.suspended_until = 0.0
        """When it fails for want of a stack that takes it."""

    @property
    def output_tokens(self) -> int:
        """How many tokens were accepted."""
        return len(self.out)

    @property
    def max_tokens(self) -> int:
        """How many may come."""
        return self.job.sampling.max_tokens

    def next_attempt(self, handle: int, reply_to: str, now: float) -> Generate:
        """The message that starts the attempt after the current one, with the output so far."""
        job = self.job
        return Generate(
            self.rid,
            self.attempt + 1,
            handle,
            reply_to,
            job.prompt,
            self.out.tobytes(),
            job.sampling,
            job.text,
            job.add_special_tokens,
            job.max_tokens_is_rest,
            job.priority,
            job.cache_salt,
            grammar=job.grammar,
            worker_deaths=self.worker_deaths,
            timeout_ms=timeout_ms(self.deadline, now),
        )

    def count_interruption(self) -> None:
        """An interruption that may be the request's own doing."""
        if len(self.out) > self.tokens_at_interruption:
            self.interruptions = 0
        self.tokens_at_interruption = len(self.out)
        self.interruptions += 1

    def count_worker_death(self) -> None:
        """A worker ended while it computed this request. One that has got further since the last
        such death is none that ends each worker."""
        if len(self.out) > self.tokens_at_death:
            self.worker_deaths = 0
        self.tokens_at_death = len(self.out)
        self.worker_deaths += 1


Row = tuple[int, int, int, int, "int | memoryview", Output, list[TokenLogprobs]]
"""Handle, attempt, execution, position, token or tokens, text or parts, log-probabilities."""
_ONE_EACH: Final = pack("i", [1]) * 4096
_NO_LOGPROBS: Final[list[TokenLogprobs]] = []


def rows_of(deltas: Deltas) -> tuple[bool, list[Row]]:
    """The rows of a message, and whether each brings exactly one token (given bare then).

    Raises ValueError or TypeError when the columns do not fit each other."""
    handles = unpack("I", deltas.handles).tolist()
    tokens = unpack("i", deltas.tokens)
    single = len(tokens) == len(handles) and deltas.counts == _ONE_EACH[: 4 * len(handles)]
    rows = zip(
        handles,
        unpack("I", deltas.attempts).tolist(),
        unpack("Q", deltas.executions).tolist(),
        unpack("i", deltas.positions).tolist(),
        tokens.tolist() if single else _split(tokens, unpack("i", deltas.counts).tolist()),
        outputs_of(deltas) if deltas.part_rows else deltas.texts,
        _by_row(deltas.logprobs, len(handles))
        if deltas.logprobs
        else [_NO_LOGPROBS] * len(handles),
        strict=True,
    )
    return single, list(rows)


def _split(tokens: memoryview, counts: list[int]) -> list[memoryview]:
    if min(counts, default=0) < 0 or sum(counts) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens for rows of {sum(counts)}")
    pieces: list[memoryview] = []
    at = 0
    for count in counts:
        pieces.append(tokens[at : at + count])
        at += count
    return pieces


def _by_row(entries: tuple[TokenLogprobs, ...], rows: int) -> list[list[TokenLogprobs]]:
    grouped: list[list[TokenLogprobs]] = [[] for _ in range(rows)]
    for entry in entries:
        if entry.row >= rows:
            raise ValueError(f"log-probabilities for row {entry.row} of {rows}")
        grouped[entry.row].append(entry)
    return grouped


def error_of(end: End) -> RequestError:
    """What the sender is told of an end that is none of a generation. Only a refusal's text passes:
    it speaks of the request."""
    if end.finish is Finish.REFUSED and 400 <= end.status < 500:
        overloaded = end.status == 429
        return RequestError(
            ErrorKind.OVERLOADED if overloaded else ErrorKind.INVALID,
            end.message or "The request was refused.",
            param=end.param,
            retry_after_s=end.retry_after_s or (1 if overloaded else 0),
        )
    if end.finish is Finish.REFUSED and end.status == TIMEOUT_STATUS:
        return timed_out()
    if end.finish is Finish.REFUSED:
        return unavailable(
            "The server cannot take this request now; try it again.", end.retry_after_s or 1
        )
    if end.finish is Finish.CANCELLED:
        return unavailable("The server cancelled this request; try it again.")
    return failed()
