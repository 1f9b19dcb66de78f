"""Answers to queries that belong to no request: the ids of a prompt, the text of ids. No sockets,
no state; safe in any thread."""

import logging
from typing import Final

from pagewire_protocol.messages import Detokenize, Tokenize, Tokenized

from .encode import LONG, Encoder, Refused, TokenOffsets, size_of

log = logging.getLogger("pagewire.tokenizer")
NO_OFFSETS: Final = TokenOffsets(b"", b"")
"""Of a query that does not ask for offsets."""
Query = Tokenize | Detokenize


class QueryTask:
    """A query that takes so much work that a thread answers it."""

    __slots__ = ("cancelled", "query", "size")

    def __init__(self, query: Query) -> None:
        self.query = query
        self.size = query_size(query)
        self.cancelled = False
        """Nobody wants the answer any more."""


def is_long(query: Query) -> bool:
    """Whether the answer takes so much work that a thread makes it, off the event loop."""
    return query_size(query) > LONG


def query_size(query: Query) -> int:
    """Characters that take as long as the query."""
    if isinstance(query, Detokenize):
        return len(query.ids)
    return size_of(query.prompt) + len(query.prompt.ids or b"")


def answer(encoder: Encoder, query: Query) -> Tokenized:
    """The ids or the text; a status of 400 with the reason where the query cannot be answered."""
    handle = query.handle
    try:
        if isinstance(query, Detokenize):
            skip = query.skip_special_tokens
            offsets = encoder.offsets(query.ids, skip) if query.with_offsets else NO_OFFSETS
            return Tokenized(handle, text=encoder.decode(query.ids, skip), **offsets._asdict())
        ids, offsets = _encoded(encoder, query)
        texts = encoder.strings(ids) if query.with_texts else ()
        return Tokenized(handle, ids, texts, **offsets._asdict())
    except Refused as refusal:
        return Tokenized(
            handle, status=refusal.status, message=refusal.message, param=refusal.param
        )
    except Exception as error:
        # The tokenizers library raises bare Exception; one query must not end the service.
        log.exception("a query could not be answered")
        return Tokenized(
            handle,
            status=500,
            message=f"the query could not be answered ({type(error).__name__})",
        )


def _encoded(encoder: Encoder, query: Tokenize) -> tuple[bytes, TokenOffsets]:
    if query.with_offsets:
        return encoder.encode_with_offsets(query.prompt, query.add_special_tokens)
    return encoder.encode(query.prompt, query.add_special_tokens), NO_OFFSETS


def still_loading(query: Query) -> Tokenized:
    """The answer before there is a tokenizer: the sender asks again."""
    return Tokenized(query.handle, status=503, message="this tokenizer is still loading")
