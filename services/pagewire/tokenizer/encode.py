"""A prompt as token ids, and whether it can be served at all. It knows a request's content, not who
sent it or where it goes.

Everything that is wrong with a request is a `Refused`, whose text is shown to the client and has
the numbers.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import replace
from pagewire_protocol.messages import Chat, Generate, Prompt, Roster
from pagewire_protocol.prompt_checks import (
    far_too_long,
    kept_prompt_tokens,
    outside_vocabulary,
    too_long,
    truncated_ids,
)
from pagewire_protocol.sampling import MAX_BAD_WORD_TOKENS, Sampling
from pagewire_protocol.sampling_checks import fault
from tokenizers import Tokenizer

from .answers.model import ModelAnswers
from .decode import Decoding
from .template import ChatTemplate, TemplateRefused
from .token_bytes import tokens_by_id

LONG: Final = 8_000
"""Characters from which on a prompt is encoded in a thread, off the event loop: about 3 ms of
work."""
MESSAGE_WORK: Final = 64
"""Characters that take as long as a template takes for a message, whatever the message says."""
PIECE: Final = 65_536
"""Characters that are encoded at a time where a text is probably too long: between two pieces the
work can be cancelled."""
PIECE_SLACK: Final = 64
"""Tokens more than the whole text has may come of one piece, at its two ends."""
USUAL_CHARACTERS: Final = 8
"""A text with more characters than this for each token of the context is probably too long."""


class Refused(Exception):
    """The request cannot be served; `param` is the client's name for what is wrong, `status` the
    HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status


class Cancelled(Exception):
    """Nobody wants the token ids any more."""


class Limit(NamedTuple):
    """How much of a text can be of use: `max_tokens` tokens of it (0: any number), and of a longer
    one the last `kept` (0: all)."""

    max_tokens: int = 0
    kept: int = 0


NO_LIMIT: Final = Limit()


def limit_of(request: Generate, max_model_len: int) -> Limit:
    """Of the request's prompt, where the context has `max_model_len` tokens."""
    return Limit(max_model_len, _kept(request, max_model_len))


def work_of(request: Generate) -> int:
    """Characters to be encoded, all in all."""
    return size_of(request.prompt) + 2 * sum(map(len, request.text.bad_words))


def size_of(prompt: Prompt) -> int:
    """Characters to be encoded, and what takes as long as some."""
    if prompt.chat is not None:
        messages = prompt.chat.messages
        texts = sum(len(m.content) + len(m.role) + len(m.fields) for m in messages)
        further = len(prompt.chat.template_kwargs) + len(prompt.chat.tools)
        return texts + MESSAGE_WORK * len(messages) + further
    return len(prompt.text or "")


def _wanted() -> bool:
    return False


class Encoded(NamedTuple):
    """The text of a request as int32 columns: the prompt, and the sequences of token ids that its
    bad words stand for."""

    prompt: bytes
    bad_words: tuple[bytes, ...] = ()
    opens_reasoning: bool = False
    """The prompt, a conversation, ends within reasoning."""


class TokenOffsets(NamedTuple):
    """Where tokens begin in a text, in characters (int32 column), and the bytes that the first of
    them stands for."""

    offsets: bytes
    first: bytes


def param_of(prompt: Prompt) -> str:
    """The client's name for the prompt."""
    return "messages" if prompt.chat is not None else "prompt"


class Encoder:
    """Text to token ids, and ids to text as a whole. Thread-safe. `tokenizer` is None under
    --skip-tokenizer-init."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        decoding: Decoding | None = None,
        answers: ModelAnswers | None = None,
    ) -> None:
        """`decoding`: of the same tokenizer; made when it is needed where there is none. `answers`:
        how the model's are taken apart, where that is asked for."""
        self._tokenizer = tokenizer
        self._template = template
        self._answers = answers
        self._decoding = decoding
        self._size = 0
        """Ids below this may be decoded. Some of them may belong to no token."""
        if tokenizer is not None:
            self._size = decoding.size if decoding else len(tokens_by_id(tokenizer))

    def encode_all(
        self,
        prompt: Prompt,
        add_special_tokens: bool,
        bad_words: tuple[str, ...],
        limit: Limit = NO_LIMIT,
        cancelled: Callable[[], bool] = _wanted,
    ) -> Encoded:
        """All text of a request. Raises Refused, or Cancelled once `cancelled` says so."""
        words = self._words(bad_words)
        if prompt.chat is None or self._answers is None:
            return Encoded(self.encode(prompt, add_special_tokens, limit, cancelled), words)
        rendered = self._render(prompt.chat)
        text = self._fitting(rendered, limit, cancelled, "messages")
        ids = self._encode_text(text, False, "messages")
        try:
            opens_reasoning = self._answers.opens_reasoning(prompt.chat, rendered)
        except TemplateRefused as refusal:
            raise Refused(str(refusal)[:4000]) from None
        return Encoded(ids, words, opens_reasoning)

    def encode(
        self,
        prompt: Prompt,
        add_special_tokens: bool,
        limit: Limit = NO_LIMIT,
        cancelled: Callable[[], bool] = _wanted,
    ) -> bytes:
        """The prompt as an int32 column; of a text of which `limit` keeps the end, perhaps that end
        alone. Raises Refused, or Cancelled once `cancelled` says so."""
        match (prompt.ids, prompt.text, prompt.chat):
            case (bytes() as ids, None, None):
                if len(ids) % 4:
                    raise Refused(
                        f"the token ids are {len(ids)} bytes long, which is no multiple of 4",
                        "prompt",
                    )
                return ids
            case (None, str() as text, None):
                fitting = self._fitting(text, limit, cancelled, "prompt")
                return self._encode_text(fitting, add_special_tokens, "prompt")
            case (None, None, chat) if chat is not None:
                text = self._fitting(self._render(chat), limit, cancelled, "messages")
                return self._encode_text(text, False, "messages")
            case _:
                raise Refused("a prompt is exactly one of text, token ids and messages", "prompt")

    def encode_with_offsets(
        self, prompt: Prompt, add_special_tokens: bool
    ) -> tuple[bytes, TokenOffsets]:
        """The prompt as an int32 column, and where each token begins in its text: of a prompt of
        ids, in the text that they stand for. Raises Refused."""
        if prompt.text is None or self._tokenizer is None:
            ids = self.encode(prompt, add_special_tokens)
            return ids, self.offsets(ids, False)
        (encoding,) = self._tokenizer.encode_batch(
            [prompt.text], add_special_tokens=add_special_tokens
        )
        ids = np.array(encoding.ids, np.int32).tobytes()
        offsets = np.array(_starts(encoding.offsets), np.int32).tobytes()
        return ids, TokenOffsets(offsets, self._first_bytes(ids))

    def offsets(self, ids: bytes, skip_special_tokens: bool) -> TokenOffsets:
        """Of the tokens of an int32 column in the text of `decode`. Raises Refused."""
        if self._tokenizer is None:
            raise _no_tokenizer("tokens")
        offsets = self._decodings().offsets(self._valid_ids(ids), skip_special_tokens)
        return TokenOffsets(np.array(offsets, np.int32).tobytes(), self._first_bytes(ids))

    def _first_bytes(self, ids: bytes) -> bytes:
        return b"".join(self._decodings().bytes_of(np.frombuffer(ids[:4], np.int32)))

    def _decodings(self) -> Decoding:
        if self._decoding is None:
            self._decoding = Decoding(self._tokenizer)
        return self._decoding

    def decode(self, ids: bytes, skip_special_tokens: bool) -> str:
        """The text of an int32 column, as a text of its own. Raises Refused."""
        if self._tokenizer is None:
            raise _no_tokenizer("tokens")
        # The batch call releases the interpreter's lock.
        (text,) = self._tokenizer.decode_batch(
            [self._valid_ids(ids)], skip_special_tokens=skip_special_tokens
        )
        return text

    def strings(self, ids: bytes) -> tuple[str, ...]:
        """The vocabulary's own name of each token of an int32 column. Raises Refused."""
        if self._tokenizer is None:
            raise _no_tokenizer("return_token_strs")
        return tuple(self._tokenizer.id_to_token(token) or "" for token in self._valid_ids(ids))

    def _valid_ids(self, column: bytes) -> list[int]:
        """The ids of an int32 column. Raises Refused for one outside the vocabulary."""
        assert self._tokenizer is not None
        if len(column) % 4:
            raise Refused(
                f"the token ids are {len(column)} bytes long, which is no multiple of 4", "tokens"
            )
        ids = np.frombuffer(column, np.int32)
        size = self._size
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise Refused(
                f"token id {outside[0]} is outside the tokenizer's vocabulary of {size} tokens",
                "tokens",
            )
        return ids.tolist()

    def _words(self, words: tuple[str, ...]) -> tuple[bytes, ...]:
        """The token sequences of bad words, by vLLM's rule: each word as at the beginning of a
        text; also as after a space, where that has another first token and the same number of
        tokens."""
        if not words:
            return ()
        if self._tokenizer is None:
            raise _no_tokenizer("bad_words")
        texts = [space + word.lstrip() for word in words for space in ("", " ")]
        ids = [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        sequences: list[list[int]] = []
        for word, bare, spaced in zip(words, ids[::2], ids[1::2], strict=True):
            if not 0 < len(bare) <= MAX_BAD_WORD_TOKENS:
                raise Refused(
                    f"bad_words: {word!r} is {len(bare)} tokens long; 1 to {MAX_BAD_WORD_TOKENS} are possible",
                    "bad_words",
                )
            sequences.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return tuple(np.array(word, np.int32).tobytes() for word in sequences)

    def _render(self, chat: Chat) -> str:
        if self._tokenizer is None:
            raise _no_tokenizer("messages")
        if self._template is None:
            raise Refused(
                "this model has no chat template: start the server with --chat-template, or use /v1/completions",
                "messages",
            )
        try:
            return self._template.render(chat)
        except TemplateRefused as refusal:
            raise Refused(str(refusal)[:4000]) from None

    def _fitting(self, text: str, limit: Limit, cancelled: Callable[[], bool], param: str) -> str:
        """The text, or the end of it that is enough for the tokens that are kept. Raises Refused
        for a text that is too long, before all of it was encoded; Cancelled."""
        if not limit.max_tokens or self._tokenizer is None:
            return text
        if limit.kept:
            return self._end_of(text, limit.kept, cancelled)
        if len(text) <= PIECE + USUAL_CHARACTERS * limit.max_tokens:
            return text
        tokens = 0
        for start in range(0, len(text), PIECE):
            if cancelled():
                raise Cancelled
            tokens += max(0, self._count(text[start : start + PIECE]) - PIECE_SLACK)
            if tokens > limit.max_tokens:
                encoded = min(start + PIECE, len(text))
                raise Refused(far_too_long(limit.max_tokens, len(text), encoded, tokens), param)
        return text

    def _end_of(self, text: str, kept: int, cancelled: Callable[[], bool]) -> str:
        """The end of `text`, long enough that where it was cut off changes none of its last `kept`
        tokens."""
        length = PIECE + USUAL_CHARACTERS * kept
        while length < len(text):
            if cancelled():
                raise Cancelled
            end = text[-length:]
            if self._count(end) >= kept + PIECE_SLACK:
                return end
            length *= 2
        return text

    def _count(self, text: str) -> int:
        """Tokens."""
        assert self._tokenizer is not None
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)

    def _encode_text(self, text: str, add_special_tokens: bool, param: str) -> bytes:
        if self._tokenizer is None:
            raise _no_tokenizer(param)
        # The batch call keeps no offsets and releases the interpreter's lock, so a long prompt in a
        # thread delays nobody.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return np.array(encoding.ids, np.int32).tobytes()


def _starts(offsets: Iterable[tuple[int, int]]) -> list[int]:
    """Where each token begins, from the library's (first, last) characters: these leave out spaces
    before a word, and are (0, 0) for a token that is in no text."""
    starts: list[int] = []
    end = 0
    for first, last in offsets:
        starts.append(min(first, end) if last > first else end)
        end = max(end, last)
    return starts


def _no_tokenizer(param: str) -> Refused:
    return Refused(
        "this server was started with --skip-tokenizer-init and takes token ids only, not text",
        param,
    )


def truncated(request: Generate, ids: bytes, max_model_len: int) -> bytes:
    """The prompt without its beginning, as far as the client asked for that. Where the context has
    no room at all it stays whole."""
    return truncated_ids(ids, _kept(request, max_model_len))


def _kept(request: Generate, max_model_len: int) -> int:
    completion = 1 if request.max_tokens_is_rest else request.sampling.max_tokens
    return kept_prompt_tokens(request.text.truncate_prompt, max_model_len, completion)


def check(request: Generate, encoded: Encoded, roster: Roster) -> Sampling:
    """The sampling to submit, with max_tokens and bad words filled in. Raises Refused when the
    model cannot serve the request."""
    sampling = request.sampling
    if encoded.bad_words:
        sampling = replace(sampling, bad_words=sampling.bad_words + encoded.bad_words)
    problem = fault(sampling, roster.vocab_size)
    if problem is not None:
        raise Refused(*problem)
    max_tokens = _max_tokens(request, encoded.prompt, roster)
    return (
        sampling if max_tokens == sampling.max_tokens else replace(sampling, max_tokens=max_tokens)
    )


def _max_tokens(request: Generate, ids: bytes, roster: Roster) -> int:
    param = param_of(request.prompt)
    prompt = np.frombuffer(ids, np.int32)
    if not len(prompt):
        raise Refused("the prompt is empty: it has 0 tokens", param)
    outside = prompt[(prompt < 0) | (prompt >= roster.vocab_size)]
    if len(outside):
        raise Refused(
            outside_vocabulary(outside[0], roster.vocab_size),
            param,
        )
    room = roster.max_model_len - len(prompt)
    if request.max_tokens_is_rest:
        if room < 1:
            raise Refused(too_long(roster.max_model_len, len(prompt), 1), param)
        return min(room, request.sampling.max_tokens)
    if request.sampling.max_tokens > room:
        raise Refused(
            too_long(roster.max_model_len, len(prompt), request.sampling.max_tokens),
            param if room < 1 else "max_tokens",
        )
    return request.sampling.max_tokens
