"""The files of `pagewire run-batch`: OpenAI's batch format, line by line, and which lines are done
already. Knows no service.

A run that was interrupted goes on: a line is known by its number and its custom_id, which its
answer repeats. An answer that was cut off is removed.
"""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Raw, Struct

from ..frontend.errors import ApiError

URLS: Final = {"/v1/chat/completions": True, "/v1/completions": False}
"""Whether it is a chat."""
MAX_SHOWN: Final = 80


class LineIn(Struct):
    """A line of the input, as it must be."""

    custom_id: str
    url: str
    body: Raw
    method: str = "POST"


class Line(Struct):
    """One request of the file. `error`: why it is none."""

    number: int
    custom_id: str | None = None
    chat: bool = False
    body: bytes = b""
    error: str | None = None
    request_id: str = msgspec.field(default_factory=lambda: secrets.token_hex(16))

    @property
    def key(self) -> str:
        """The id of its answer."""
        return f"batch_req_{self.number}"


class Answered(Struct):
    """A line with its status and the body of its answer."""

    line: Line
    status: int
    body: bytes
    error: dict[str, Any] | None = None

    def encoded(self) -> bytes:
        """The line of the output."""
        response = {
            "status_code": self.status,
            "request_id": self.line.request_id,
            "body": Raw(self.body),
        }
        fields = {
            "id": self.line.key,
            "custom_id": self.line.custom_id,
            "response": response,
            "error": self.error,
        }
        return msgspec.json.encode(fields) + b"\n"


class Outcome(Struct):
    """What became of a line, and the tokens that it took."""

    answered: Answered
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EarlierAnswer(Struct):
    """What is read of an answer of an earlier run."""

    id: str
    custom_id: str | None


_read_in: Final = msgspec.json.Decoder(LineIn)
_read_out: Final = msgspec.json.Decoder(EarlierAnswer)


def parse_line(number: int, text: bytes) -> Line:
    """Never raises: what is wrong is part of the line."""
    try:
        request = _read_in.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Line(number, _custom_id(text), error=f"Line {number} is no request: {error}.")
    chat = URLS.get(request.url)
    if request.method != "POST":
        return Line(
            number,
            request.custom_id,
            error=f"`method` {request.method[:MAX_SHOWN]!r} is not supported; only 'POST' is.",
        )
    if chat is None:
        return Line(
            number,
            request.custom_id,
            error=f"`url` {request.url[:MAX_SHOWN]!r} is not supported; {' and '.join(URLS)} are.",
        )
    return Line(number, request.custom_id, chat, bytes(request.body))


def _custom_id(text: bytes) -> str | None:
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    value = fields.get("custom_id") if isinstance(fields, dict) else None
    return value if isinstance(value, str) else None


def refusal_of(line: Line, error: ApiError) -> Outcome:
    """The line is answered with an error."""
    return Outcome(Answered(line, error.status, error.body(), error.fields()))


class Journal:
    """Both files. Raises OSError, and ValueError when the output holds something else than answers
    to this input."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = source
        if not source.is_file():
            raise ValueError(f"{source} is no file of requests")
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target} is both the input and the output; name another output")
        self._done = _finished(source, target)
        self.total = sum(1 for _ in _texts(source))
        self.before = len(self._done)
        self.left = self.total - self.before
        self.answered = self.failed = 0
        self._target: BinaryIO = target.open("ab")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._target.close()

    def lines(self) -> Iterator[Line]:
        """Those that are not done."""
        for number, text in _texts(self._source):
            if number not in self._done:
                yield parse_line(number, text)

    def write(self, outcome: Outcome) -> None:
        """Handed to the system before this returns: an end of this process cannot lose it."""
        self._target.write(outcome.answered.encoded())
        self._target.flush()
        self.answered += outcome.answered.error is None
        self.failed += outcome.answered.error is not None


def _texts(source: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    with source.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, text


def _finished(source: Path, target: Path) -> set[int]:
    """The numbers of the lines that the output answers. Removes a last answer that was cut off."""
    if not target.exists():
        return set()
    custom_ids: dict[str, str | None] = {}
    """Of the answers that are there, by their id."""
    with target.open("r+b") as file:
        whole = 0
        for text in file:
            if not text.endswith(b"\n"):
                file.truncate(whole)
                break
            whole += len(text)
            try:
                answer = _read_out.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise ValueError(
                    f"{target} holds something else than answers: {text[:MAX_SHOWN]!r}; name another output"
                ) from None
            custom_ids[answer.id] = answer.custom_id
    done = set[int]()
    for number, text in _texts(source):
        line = parse_line(number, text) if f"batch_req_{number}" in custom_ids else None
        if line and custom_ids.pop(line.key) != line.custom_id:
            raise ValueError(
                f"{target} answers another input: its line {line.key} is not {line.custom_id!r}; name another output"
            )
        if line:
            done.add(number)
    if custom_ids:
        raise ValueError(
            f"{target} answers another input: {source} has no line for {next(iter(custom_ids))}; name another output"
        )
    return done
