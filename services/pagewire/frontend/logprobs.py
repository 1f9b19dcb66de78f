"""Log-probabilities in the three forms that clients read: OpenAI's of completions, OpenAI's of
chats, vLLM's of prompts."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw
from pagewire_protocol.columns import unpack
from pagewire_protocol.structs import PromptLogprobs, TokenLogprobs

from .turns import Turn

RUN: Final = 32
"""Tokens of a prompt that are encoded at a time: with all candidates about a millisecond's work."""
FEW_CANDIDATES: Final = 1024
"""Candidates for tokens of a prompt that are encoded as they come."""
LOWEST: Final = -9999.0
"""Stands for minus infinity, which JSON does not have."""
Json = dict[str, Any]
Candidate = tuple[int, str, float, bytes]
"""A token's id, its name, its log-probability, its bytes."""


class CompletionToken(NamedTuple):
    """What a completion shows of one token: its name, its log-probability, the JSON of all
    candidates by name, where it begins in the generated text, in characters."""

    name: str
    value: float
    top: Raw
    offset: int


_encode: Final = msgspec.json.Encoder().encode


def token_text(raw: bytes, token: int, ids_as_text: bool = False) -> str:
    """The name of a token: its text; `bytes:\\xf0\\x9f` for a part of a character;
    `token_id:7` where the client wants ids, or there is no tokenizer that knows the text."""
    if ids_as_text or not raw:
        return f"token_id:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _bytes_name(raw)


def _bytes_name(raw: bytes) -> str:
    """OpenAI's name of bytes that are no text."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _candidates(entry: TokenLogprobs, ids_as_text: bool) -> list[Candidate]:
    rows = zip(entry.ids, entry.values, entry.texts, strict=True)
    return [
        (token, token_text(raw, token, ids_as_text), max(value, LOWEST), raw)
        for token, value, raw in rows
    ]


def _by_text(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The candidates by name, each token once. The token itself comes first; a further one that is
    spelt alike is named by its bytes, and one with the same bytes by its id."""
    named: dict[str, float] = {}
    seen: set[int] = set()
    for token, text, value, raw in candidates:
        if token in seen:
            continue
        seen.add(token)
        names = (text, _bytes_name(raw), f"token_id:{token}")
        named[next(name for name in names if name not in named)] = value
    return named


def completion_token(
    entry: TokenLogprobs | CompletionToken, ids_as_text: bool = False
) -> CompletionToken:
    """One token of `completion_logprobs`, which takes it as it is."""
    if isinstance(entry, CompletionToken):
        return entry
    candidates = _candidates(entry, ids_as_text)
    _, name, value, _ = candidates[0]
    return CompletionToken(name, value, Raw(_encode(_by_text(candidates))), entry.offset)


def completion_logprobs(
    entries: Sequence[TokenLogprobs | CompletionToken],
    base: int = 0,
    ids_as_text: bool = False,
    prompt: "PromptScore | None" = None,
    length: int | None = None,
) -> Json:
    """OpenAI's form for completions: one list a property, with an entry a token.

    `base`: characters of the answer's text before the generated text, which are those of an echoed
    prompt. The tokens of `prompt` come first, where the prompt is echoed. `length`: characters of
    the whole text, where it is known: tokens that a stop string cut off begin at its end.
    """
    tokens: list[str] = list(prompt.tokens) if prompt else []
    values: list[float | None] = list(prompt.values) if prompt else []
    tops: list[Any] = list(prompt.tops) if prompt else []
    offsets: list[int] = list(prompt.offsets[: len(tokens)]) if prompt else []
    for entry in entries:
        token = completion_token(entry, ids_as_text)
        tokens.append(token.name)
        values.append(token.value)
        tops.append(token.top)
        offset = base + token.offset
        offsets.append(offset if length is None else min(offset, length))
    return {
        "text_offset": offsets,
        "token_logprobs": values,
        "tokens": tokens,
        "top_logprobs": tops,
    }


def chat_token(entry: TokenLogprobs | Raw, ids_as_text: bool = False) -> Raw:
    """The JSON of one token of `chat_logprobs`, which takes it as it is."""
    if isinstance(entry, Raw):
        return entry
    token, *top = [
        {"token": text, "logprob": value, "bytes": list(raw)}
        for _, text, value, raw in _candidates(entry, ids_as_text)
    ]
    return Raw(_encode({**token, "top_logprobs": top}))


def chat_logprobs(entries: Sequence[TokenLogprobs | Raw], ids_as_text: bool = False) -> Json:
    """OpenAI's form for chats: one object a token."""
    return {"content": [chat_token(entry, ids_as_text) for entry in entries]}


class PromptScore:
    """The log-probabilities of a prompt's tokens. What was added is shown once it is encoded: at
    once where it is little, else by `encode`, which lets other requests have their turns.

    first: the name of the first token, which nothing precedes and so has no log-probability;
    offsets: where each token begins in the echoed text, in characters;
    echoed, shown: candidates for each token in `tops` and in `rows`; -1: none are kept.
    """

    def __init__(
        self,
        first: str,
        echoed: int,
        shown: int,
        ids_as_text: bool,
        offsets: Sequence[int] = (),
    ) -> None:
        self.offsets = offsets
        self._echoed, self._shown, self._ids_as_text = echoed, shown, ids_as_text
        self._added: list[PromptLogprobs] = []
        """What is not encoded yet."""
        self.tokens: list[str] = [first]
        self.values: list[float | None] = [None]
        self.tops: list[Raw | None] = [None]
        """OpenAI's form: for each token, log-probabilities by name."""
        self.rows: list[Raw | None] = [None]
        """vLLM's form: for each token, its candidates by token id, with ranks."""

    def add(self, entry: PromptLogprobs) -> None:
        """A run of tokens. Those that came before, ahead of an interruption, are replaced."""
        if self._added or len(entry.ids) > 4 * FEW_CANDIDATES:
            self._added.append(entry)
            return
        for run in _runs(entry):
            self._encode_run(*run)

    @property
    def is_encoded(self) -> bool:
        """All that was added is shown."""
        return not self._added

    async def encode(self, turn: Turn) -> None:
        """Show all that was added."""
        while self._added:
            for run in _runs(self._added[0]):
                self._encode_run(*run)
                if turn.is_over():
                    await turn.next()
            del self._added[0]

    def _encode_run(self, first: int, tokens: list[TokenLogprobs]) -> None:
        run = slice(first, first + len(tokens))
        if self._shown >= 0:
            self.rows[run] = [Raw(_encode(_row(token, self._shown))) for token in tokens]
        if self._echoed >= 0:
            named = [_candidates(token, self._ids_as_text)[: self._echoed + 1] for token in tokens]
            self.tokens[run] = [candidates[0][1] for candidates in named]
            self.values[run] = [candidates[0][2] for candidates in named]
            self.tops[run] = [Raw(_encode(_by_text(candidates))) for candidates in named]


def _runs(entry: PromptLogprobs) -> Iterator[tuple[int, list[TokenLogprobs]]]:
    """A long run as short ones, each with its first position."""
    tokens = _tokens(entry)
    first = entry.first
    while run := list(islice(tokens, RUN)):
        yield first, run
        first += len(run)


def _tokens(entry: PromptLogprobs) -> Iterator[TokenLogprobs]:
    """The columns of a run taken apart: one entry a prompt token."""
    ids = unpack("i", entry.ids).tolist()
    values = unpack("f", entry.values).tolist()
    texts = entry.texts or (b"",) * len(ids)
    counts = unpack("i", entry.counts).tolist()
    ranks = unpack("i", entry.ranks).tolist()
    start = 0
    for count, rank in zip(counts, ranks, strict=True):
        part = slice(start, start + count)
        yield TokenLogprobs(0, 0, rank, tuple(ids[part]), tuple(values[part]), texts[part])
        start += count


def _row(entry: TokenLogprobs, shown: int) -> dict[str, Json]:
    """vLLM's form of one token: itself, then the most probable ones. The token may be among those;
    it is there once."""
    row: dict[str, Json] = {}
    for i in range(min(len(entry.ids), shown + 1)):
        candidate = {
            "logprob": max(entry.values[i], LOWEST),
            "rank": i or entry.rank,
            "decoded_token": token_text(entry.texts[i], entry.ids[i]),
        }
        row.setdefault(str(entry.ids[i]), candidate)
    return row
