"""A drain's Tokens messages as the rows of Deltas: the hot path, once through a tight loop. It
knows streams by handle, nothing of sockets.

Rows of several messages are sorted by stream, so that a stream's tokens become one row of the
Deltas.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.messages import LogprobColumns, PromptLogprobs, TokenLogprobs, Tokens

from .decode import Decoding
from .stream import Stream

log = logging.getLogger("pagewire.tokenizer")


Entry = tuple[int, tuple[int, ...], tuple[float, ...], tuple[bytes, ...]]
"""Log-probabilities of one token: its token's rank, then ids, values and bytes of the
candidates."""
Entries = dict[int, Entry]
"""By handle and position: handle << 32 | position."""


class Columns(NamedTuple):
    handles: list[int]
    executions: list[int]
    positions: list[int]
    tokens: list[int]


def columns_of(batch: list[Tokens], vocab_size: int) -> Columns:
    """All tokens, one entry each, those of a stream together and in order. Raises ValueError when
    columns do not fit each other or a token id is none."""
    types = (np.uint32, np.uint64, np.int32, np.uint32)
    messages = [
        [
            np.frombuffer(column, kind)
            for column, kind in zip(
                (m.handles, m.executions, m.positions, m.tokens), types, strict=True
            )
        ]
        for m in batch
    ]
    for message, columns in zip(batch, messages, strict=True):
        if message.counts:
            columns[:3] = _by_token(message, *columns)
    if any(len({len(column) for column in message}) != 1 for message in messages):
        raise ValueError("columns of different lengths")
    top = max(int(message[3].max(initial=0)) for message in messages)
    if top >= vocab_size:
        raise ValueError(f"token id {top} with a vocabulary of {vocab_size}")
    if len(messages) == 1:
        return Columns(*(column.tolist() for column in messages[0]))
    joined = [np.concatenate(parts) for parts in zip(*messages, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    return Columns(*(column[order].tolist() for column in joined))


def _by_token(
    message: Tokens,
    handles: NDArray[Any],
    executions: NDArray[Any],
    positions: NDArray[Any],
    tokens: NDArray[Any],
) -> list[NDArray[Any]]:
    """Handles, executions and positions of a message whose rows have several tokens or none, with
    one entry a token. Raises ValueError."""
    counts = np.frombuffer(message.counts, np.int32)
    rows = {len(handles), len(executions), len(positions), len(counts)}
    if len(rows) != 1 or (counts < 0).any() or counts.sum() != len(tokens):
        raise ValueError(f"counts of {counts.sum()} tokens for {len(tokens)}")
    starts = np.cumsum(counts) - counts
    index_in_row = np.arange(len(tokens)) - np.repeat(starts, counts)
    first = np.repeat(positions, counts)
    return [
        np.repeat(handles, counts),
        np.repeat(executions, counts),
        (first + index_in_row).astype(np.int32),
    ]


def entries_of(batch: list[Tokens], decoding: Decoding) -> Entries:
    """The log-probabilities. Raises ValueError when they do not fit the rows."""
    found: Entries = {}
    for message in batch:
        if message.logprobs is not None:
            _add_entries(found, message, message.logprobs, decoding)
    return found


def _add_entries(
    found: Entries, message: Tokens, columns: LogprobColumns, decoding: Decoding
) -> None:
    tokens_sent = len(message.tokens) // 4
    which, counts, ranks, ids = (
        np.frombuffer(c, np.int32)
        for c in (columns.rows, columns.counts, columns.ranks, columns.ids)
    )
    values = np.frombuffer(columns.values, np.float32)
    if len(which) and not 0 <= which.min() <= which.max() < tokens_sent:
        raise ValueError(f"log-probabilities of token {which.max()} of {tokens_sent}")
    if (
        not len(which) == len(counts) == len(ranks)
        or (counts < 1).any()
        or not counts.sum() == len(ids) == len(values)
    ):
        raise ValueError(
            f"{len(which)} rows of log-probabilities with {len(ids)} ids and {len(values)} values do not fit"
        )
    handles = np.frombuffer(message.handles, np.uint32)
    positions = np.frombuffer(message.positions, np.int32)
    if message.counts:
        handles, _, positions = _by_token(
            message, handles, handles, positions, np.frombuffer(message.tokens, np.int32)
        )
    handles, positions = handles[which], positions[which]
    keys = handles.astype(np.int64) << 32 | positions
    tokens, numbers, texts = tuple(ids.tolist()), tuple(values.tolist()), decoding.bytes_of(ids)
    start = 0
    for key, count, rank in zip(keys.tolist(), counts.tolist(), ranks.tolist(), strict=True):
        end = start + count
        found[key] = rank, tokens[start:end], numbers[start:end], texts[start:end]
        start = end


def pass_prompts(
    batch: list[Tokens], streams: dict[int, Stream], decoding: Decoding
) -> list[Stream]:
    """Log-probabilities of prompts go to the streams' mails, with the bytes of each candidate.
    Returns the streams whose columns do not fit each other."""
    broken: list[Stream] = []
    for entry in [entry for message in batch for entry in message.prompt_logprobs]:
        stream = streams.get(-1 if entry.handle is None else entry.handle)
        if stream is None or stream.attempt != entry.attempt:
            continue
        if stream.execution < 0:
            stream.execution = entry.execution
        if stream.execution != entry.execution:
            continue
        try:
            texts = decoding.bytes_of(_checked(entry))
        except ValueError as error:
            log.error("log-probabilities of a prompt: %s", error)
            broken.append(streams.pop(stream.handle))
            continue
        stream.mail.prompt_logprobs.append(replace(entry, handle=stream.owner, texts=texts))
    return broken


def _checked(entry: PromptLogprobs) -> NDArray[np.int32]:
    """The ids. Raises ValueError."""
    counts, ranks, ids = (
        np.frombuffer(column, np.int32) for column in (entry.counts, entry.ranks, entry.ids)
    )
    values = np.frombuffer(entry.values, np.float32)
    if (
        len(ranks) != len(counts)
        or (counts < 1).any()
        or counts.sum() != len(ids)
        or len(values) != len(ids)
    ):
        raise ValueError(
            f"{len(counts)} tokens, {len(ranks)} ranks, {len(ids)} ids and {len(values)} values do not fit"
        )
    return ids


def fill(
    streams: dict[int, Stream], columns: Columns, entries: Entries
) -> tuple[list[Stream], list[Stream]]:
    """Append to the streams' mails. Returns the streams that met a stop string and those that lost
    rows; both are gone from `streams`."""
    met: list[Stream] = []
    lost: list[Stream] = []
    previous: Stream | None = None
    for handle, execution, position, token in zip(*columns, strict=True):
        stream = streams.get(handle)
        if stream is None:
            continue
        if (stream.position != position or stream.execution != execution) and not _accept(
            stream, execution, position
        ):
            if stream.execution == execution and position > stream.position:
                lost.append(streams.pop(handle))
            continue
        text = None if stream.careful else stream.texts[token]
        if text is None:
            text = stream.take(token)
            if stream.found is not None:
                met.append(streams.pop(handle))
        else:
            stream.position = position + 1
        mail = stream.mail
        mail.tokens.append(token)
        if stream is previous:
            mail.extend_row(-1 + len(mail.rows), text)
        else:
            mail.rows.append((stream.owner, stream.attempt, execution, position, text))
            previous = stream
        if entries and (entry := entries.get(handle << 32 | position)) is not None:
            row = len(mail.rows) - 1
            mail.logprobs.append(TokenLogprobs(row, mail.counts.get(row, 1) - 1, *entry))
    return met, lost


def _accept(stream: Stream, execution: int, position: int) -> bool:
    """The first execution seen is the one that counts, and its rows come in order."""
    if stream.execution < 0:
        stream.execution = execution
    return stream.execution == execution and stream.position == position
