"""Log-probabilities in the three shapes that clients read: OpenAI's of completions, OpenAI's of
chats, vLLM's of prompts."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw
from pagewire_protocol.columns import unpack
from pagewire_protocol.structs import PromptLogprobs, TokenLogprobs

LOWEST: Final = -9999.0
"""Stands for minus infinity, which JSON does not have."""
Json = dict[str, Any]
Candidate = tuple[str, float, bytes]
_encode: Final = msgspec.json.Encoder().encode


def token_text(raw: bytes, token: int, ids_as_text: bool = False) -> str:
    """What a token is called: its text, or its id where that was asked for or there is no tokenizer
    to tell."""
    return f"token_id:{token}" if ids_as_text or not raw else raw.decode("utf-8", "replace")


def _candidates(entry: TokenLogprobs, ids_as_text: bool) -> list[Candidate]:
    rows = zip(entry.ids, entry.values, entry.texts, strict=True)
    return [
        (token_text(raw, token, ids_as_text), max(value, LOWEST), raw) for token, value, raw in rows
    ]


def _by_text(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Reversed, so that of two tokens of one text the likelier stays, and the token itself before
    all others."""
    return {text: value for text, value, _ in reversed(candidates)}


def completion_logprobs(
    entries: Sequence[TokenLogprobs],
    offset: int = 0,
    ids_as_text: bool = False,
    prompt: "PromptScore | None" = None,
) -> Json:
    """`offset`: characters in the token texts of earlier chunks. The tokens of `prompt` come first,
    where it is given."""
    tokens: list[str] = list(prompt.tokens) if prompt else []
    values: list[float | None] = list(prompt.values) if prompt else []
    tops: list[Any] = list(prompt.tops) if prompt else []
    for entry in entries:
        candidates = _candidates(entry, ids_as_text)
        tokens.append(candidates[0][0])
        values.append(candidates[0][1])
        tops.append(_by_text(candidates))
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": values,
        "tokens": tokens,
        "top_logprobs": tops,
    }


def chat_logprobs(entries: Sequence[TokenLogprobs], ids_as_text: bool = False) -> Json:
    content: list[Json] = []
    for entry in entries:
        shown = [
            {"token": text, "logprob": value, "bytes": list(raw)}
            for text, value, raw in _candidates(entry, ids_as_text)
        ]
        content.append({**shown[0], "top_logprobs": shown[1:]})
    return {"content": content}


class PromptScore:
    """What the model makes of a prompt, token by token. Encoded as it comes in, run by run, so that
    a long prompt does not hold up other requests when its answer is put together.

    first: what the first token is called, which nothing precedes and so has no log-probability;
    echoed, shown: candidates of a token in `tops` and in `rows`, -1 to leave them out.
    """

    def __init__(self, first: str, echoed: int, shown: int, ids_as_text: bool) -> None:
        self._echoed, self._shown, self._ids_as_text = echoed, shown, ids_as_text
        self.tokens: list[str] = [first]
        self.values: list[float | None] = [None]
        self.tops: list[Raw | None] = [None]
        """OpenAI's shape: log-probabilities by text."""
        self.rows: list[Raw | None] = [None]
        """vLLM's shape: by token id, with ranks."""

    def add(self, entry: PromptLogprobs) -> None:
        """Positions that came before are replaced."""
        found, run = list(_tokens(entry)), slice(entry.first, entry.first + len(entry.counts) // 4)
        if self._shown >= 0:
            self.rows[run] = [Raw(_encode(_row(one, self._shown))) for one in found]
        if self._echoed >= 0:
            named = [_candidates(one, self._ids_as_text)[: self._echoed + 1] for one in found]
            self.tokens[run] = [candidates[0][0] for candidates in named]
            self.values[run] = [candidates[0][1] for candidates in named]
            self.tops[run] = [Raw(_encode(_by_text(candidates))) for candidates in named]


def _tokens(entry: PromptLogprobs) -> Iterator[TokenLogprobs]:
    ids, values, at = unpack("i", entry.ids).tolist(), unpack("f", entry.values).tolist(), 0
    texts = entry.texts or (b"",) * len(ids)
    for count, rank in zip(
        unpack("i", entry.counts).tolist(), unpack("i", entry.ranks).tolist(), strict=True
    ):
        run = slice(at, at + count)
        yield TokenLogprobs(0, 0, rank, tuple(ids[run]), tuple(values[run]), texts[run])
        at += count


def _row(entry: TokenLogprobs, shown: int) -> dict[str, Json]:
    """The token itself, then the likeliest ones."""
    row: dict[str, Json] = {}
    for i in range(min(len(entry.ids), shown + 1)):
        told = {
            "logprob": max(entry.values[i], LOWEST),
            "rank": i or entry.rank,
            "decoded_token": token_text(entry.texts[i], entry.ids[i]),
        }
        row.setdefault(str(entry.ids[i]), told)
    return row
