"""One request as its owner sees it, what each attempt at it repeats, and where its output goes.
Knows no HTTP and no peers."""

import secrets
from array import array
from collections.abc import Callable
from typing import Final, Protocol

from msgspec import Struct
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.messages import Deltas, Generate
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import End, Finish, Prompt, PromptLogprobs, Started, TokenLogprobs

from .errors import ApiError, request_failed

NO_EXECUTION: Final = -1


class Job(Struct, frozen=True):
    """What every attempt at a request repeats."""

    prompt: Prompt
    sampling: Sampling
    text: TextOptions
    add_special_tokens: bool = True
    max_tokens_is_rest: bool = False
    priority: int = 0
    cache_salt: str = ""


class Sink(Protocol):
    """Where a stream's accepted output goes. Exactly one of `finished` and `failed` is called,
    last; none may raise."""

    wants_tokens: bool
    """`tokens` is called for each row, instead of `text` for each row with text."""

    def started(self, started: Started) -> None: ...
    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        """A run of prompt tokens, before any output. After an interruption positions come again,
        with the same meaning: the later entry replaces the earlier one."""
        ...

    def text(self, text: str, /) -> None: ...
    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None: ...
    def finished(
        self, reason: str, stop_reason: int | str | None, completion_tokens: int
    ) -> None: ...
    def failed(self, error: ApiError) -> None: ...


class Stream:
    """One request of one client, over all its attempts."""

    __slots__ = (
        "attempt",
        "born",
        "deliver",
        "execution",
        "first",
        "handle",
        "job",
        "last",
        "out",
        "park_until",
        "pin",
        "placed",
        "prompt_tokens",
        "resume_at",
        "rid",
        "sink",
        "strikes",
    )

    def __init__(self, job: Job, sink: Sink, now: float) -> None:
        self.rid = secrets.token_bytes(16)
        self.job, self.sink = job, sink
        self.deliver: Callable[[str], None] | None = None if sink.wants_tokens else sink.text
        self.attempt, self.handle, self.execution = 0, -1, NO_EXECUTION
        self.out = array("i")
        self.pin: tuple[int, str] = (0, "")
        """Incarnation and inbox of the tokenizer that serves the current attempt."""
        self.born = self.last = now
        self.placed = self.first = 0.0
        """When it got a place on a worker, and when its first token came."""
        self.prompt_tokens = 0
        self.strikes = 0
        """Interruptions that may be the request's own doing."""
        self.resume_at = self.park_until = 0.0

    @property
    def output_tokens(self) -> int:
        return len(self.out)

    @property
    def max_tokens(self) -> int:
        return self.job.sampling.max_tokens

    def next_attempt(self, handle: int, reply_to: str) -> Generate:
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
        )


Row = tuple[int, int, int, int, "int | memoryview", str, list[TokenLogprobs]]
"""Handle, attempt, execution, position, token or tokens, text, log-probabilities."""
_ONES: Final = pack("i", [1]) * 4096
_NOTHING: Final[list[TokenLogprobs]] = []


def rows_of(deltas: Deltas) -> tuple[bool, list[Row]]:
    """The rows of a message, and whether each brings exactly one token (given bare then).

    Raises ValueError or TypeError when the columns do not fit each other."""
    handles, tokens = unpack("I", deltas.handles).tolist(), unpack("i", deltas.tokens)
    single = len(tokens) == len(handles) and deltas.counts == _ONES[: 4 * len(handles)]
    rows = zip(
        handles,
        unpack("I", deltas.attempts).tolist(),
        unpack("Q", deltas.executions).tolist(),
        unpack("i", deltas.positions).tolist(),
        tokens.tolist() if single else _split(tokens, unpack("i", deltas.counts).tolist()),
        deltas.texts,
        _by_row(deltas.logprobs, len(handles)) if deltas.logprobs else [_NOTHING] * len(handles),
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


def error_of(end: End) -> ApiError:
    """What the client is told of an end that is none of a generation. Only a refusal's text passes:
    it speaks of the request."""
    if end.finish is Finish.REFUSED and 400 <= end.status < 500:
        retry = end.retry_after_s or (1 if end.status == 429 else 0)
        return ApiError(
            end.status,
            end.message or "The request was refused.",
            param=end.param,
            retry_after_s=retry,
        )
    if end.finish is Finish.REFUSED:
        return ApiError(
            503,
            "The server cannot take this request now; try it again.",
            retry_after_s=end.retry_after_s or 1,
        )
    if end.finish is Finish.CANCELLED:
        return ApiError(503, "The server cancelled this request; try it again.", retry_after_s=1)
    return request_failed()
