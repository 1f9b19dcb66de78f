"""The files of `pagewire run-batch`: OpenAI's batch format, line by line, and which lines are done
already. Knows no service.

A run that was interrupted goes on: a line is known by its number and its custom_id, which its
answer repeats. An answer that was cut off is removed, and so are errors that may not come again.
"""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Raw, Struct

from ..frontend.errors import ApiError

URLS: Final = {"/v1/chat/completions": True, "/v1/completions": False}
"""Whether it is a chat."""
MAX_SHOWN: Final = 80
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""Some programs begin UTF-8 files with it."""


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


class EarlierResponse(Struct):
    status_code: int


class EarlierAnswer(Struct):
    """What is read of an answer of an earlier run."""

    id: str
    custom_id: str | None
    response: EarlierResponse | None = None

    @property
    def status(self) -> int:
        """As of HTTP."""
        return self.response.status_code if self.response else 200


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


def may_succeed_later(status: int) -> bool:
    """Whether a line that failed with this HTTP status is worth another try: it took too long, or
    found the services full or broken."""
    return status in (408, 429) or status >= 500


class Journal:
    """Both files. Raises OSError, and ValueError when the output holds something else than answers
    to this input."""

    def __init__(self, source: Path, target: Path, retry_errors: bool = True) -> None:
        """`retry_errors`: errors of earlier runs that may not come again are removed from the
        output, so that their lines are answered by this run."""
        self._source = source
        if not source.exists():
            raise ValueError(f"{source} does not exist; a file of requests is needed")
        if source.is_dir():
            raise ValueError(f"{source} is a directory; a file of requests is needed")
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target} is both the input and the output; name another output")
        done = _finished(source, target)
        if retry_errors and any(map(may_succeed_later, done.values())):
            again = {number for number, status in done.items() if may_succeed_later(status)}
            _remove(target, again)
            done = {number: status for number, status in done.items() if number not in again}
        self._done = done
        self.total = sum(1 for _ in _texts(source))
        self.before = len(done)
        self.failed_before = sum(status >= 400 for status in done.values())
        """Of those of earlier runs that stay."""
        self.left = self.total - self.before
        self.answered = self.failed = 0
        self.worth_retrying = 0
        """Of the failed ones."""
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
        self.worth_retrying += may_succeed_later(outcome.answered.status)


def _texts(source: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if text.strip():
                yield number, text


def _finished(source: Path, target: Path) -> dict[int, int]:
    """The lines that the output answers, by their numbers, with the statuses of the answers.
    Removes a last answer that was cut off."""
    if not target.exists():
        return {}
    answers: dict[str, EarlierAnswer] = {}
    """By their id."""
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
            answers[answer.id] = answer
    done: dict[int, int] = {}
    for number, text in _texts(source):
        line = parse_line(number, text)
        earlier = answers.pop(line.key, None)
        if earlier is None:
            continue
        if earlier.custom_id != line.custom_id:
            raise ValueError(
                f"{target} answers another input: its line {line.key} is not {line.custom_id!r}; name another output"
            )
        done[number] = earlier.status
    if answers:
        raise ValueError(
            f"{target} answers another input: {source} has no line for {next(iter(answers))}; name another output"
        )
    return done


def _remove(target: Path, numbers: set[int]) -> None:
    """Take the answers to these lines out of the output. An end of this process on the way leaves
    the output as it was."""
    keys = {Line(number).key for number in numbers}
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as kept:
        try:
            with target.open("rb") as file:
                kept.writelines(text for text in file if _read_out.decode(text).id not in keys)
            os.fchmod(kept.fileno(), target.stat().st_mode)
            kept.close()
            os.replace(kept.name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(kept.name)
            raise
