"""The Tokens messages of a drain as rows of Deltas: the hot path, one tight loop over all rows. It
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
from .stream import NO_EXECUTION, Stream

log = logging.getLogger("pagewire.tokenizer")


Entry = tuple[int, tuple[int, ...], tuple[float, ...], tuple[bytes, ...]]
"""Log-probabilities of one token: its rank, then ids, values and bytes of the candidates."""
Entries = dict[int, Entry]
"""By handle and position: handle << 32 | position."""


class Columns(NamedTuple):
    """One entry a token: this tokenizer's handle, execution, output position, token id."""

    handles: list[int]
    executions: list[int]
    positions: list[int]
    tokens: list[int]


def columns_of(batch: list[Tokens], vocab_size: int) -> Columns:
    """All tokens, one entry each, those of a stream together and in order. Raises ValueError when
    columns do not fit each other or a token id is none."""
    messages = [_by_token(message) for message in batch]
    if any(len({len(column) for column in columns}) != 1 for columns in messages):
        raise ValueError("columns of different lengths")
    highest = max(int(tokens.max(initial=0)) for *_, tokens in messages)
    if highest >= vocab_size:
        raise ValueError(f"token id {highest} with a vocabulary of {vocab_size}")
    if len(messages) == 1:
        return Columns(*(column.tolist() for column in messages[0]))
    joined = [np.concatenate(columns) for columns in zip(*messages, strict=True)]
    # Stable, so that each stream's rows stay in the order of the messages.
    order = np.argsort(joined[0], kind="stable")
    return Columns(*(column[order].tolist() for column in joined))


def _by_token(message: Tokens) -> tuple[NDArray[Any], ...]:
    """The columns of `Columns`, one entry a token, also where rows have several tokens or none.
    Token ids as unsigned, so that a negative one is beyond every vocabulary. Raises ValueError
    when `counts` fits neither rows nor tokens."""
    handles = np.frombuffer(message.handles, np.uint32)
    executions = np.frombuffer(message.executions, np.uint64)
    positions = np.frombuffer(message.positions, np.int32)
    tokens = np.frombuffer(message.tokens, np.uint32)
    if not message.counts:  # each row has one token
        return handles, executions, positions, tokens
    counts = np.frombuffer(message.counts, np.int32)
    lengths = {len(handles), len(executions), len(positions), len(counts)}
    if len(lengths) != 1 or (counts < 0).any() or counts.sum() != len(tokens):
        raise ValueError(f"counts of {counts.sum()} tokens for {len(tokens)}")
    starts = np.cumsum(counts) - counts
    index_in_row = np.arange(len(tokens)) - np.repeat(starts, counts)
    return (
        np.repeat(handles, counts),
        np.repeat(executions, counts),
        (np.repeat(positions, counts) + index_in_row).astype(np.int32),
        tokens,
    )


def entries_of(batch: list[Tokens], decoding: Decoding) -> Entries:
    """The log-probabilities. Raises ValueError when they do not fit the rows."""
    entries: Entries = {}
    for message in batch:
        if message.logprobs is not None:
            _add_entries(entries, message, message.logprobs, decoding)
    return entries


def _add_entries(
    entries: Entries, message: Tokens, columns: LogprobColumns, decoding: Decoding
) -> None:
    rows = np.frombuffer(columns.rows, np.int32)
    counts = np.frombuffer(columns.counts, np.int32)
    ranks = np.frombuffer(columns.ranks, np.int32)
    ids = np.frombuffer(columns.ids, np.int32)
    values = np.frombuffer(columns.values, np.float32)
    token_count = len(message.tokens) // 4
    if len(rows) and not 0 <= rows.min() <= rows.max() < token_count:
        raise ValueError(f"log-probabilities of token {rows.max()} of {token_count}")
    if (
        not len(rows) == len(counts) == len(ranks)
        or (counts < 1).any()
        or not counts.sum() == len(ids) == len(values)
    ):
        raise ValueError(
            f"{len(rows)} rows of log-probabilities with {len(ids)} ids and {len(values)} values do not fit"
        )
    handles, _, positions, _ = _by_token(message)
    keys = handles[rows].astype(np.int64) << 32 | positions[rows]
    # Python objects once for the whole message, then slices: faster than arrays a row.
    all_ids = tuple(ids.tolist())
    all_values = tuple(values.tolist())
    all_texts = decoding.bytes_of(ids)
    start = 0
    for key, count, rank in zip(keys.tolist(), counts.tolist(), ranks.tolist(), strict=True):
        end = start + count
        entries[key] = (rank, all_ids[start:end], all_values[start:end], all_texts[start:end])
        start = end


def pass_prompts(
    batch: list[Tokens], streams: dict[int, Stream], decoding: Decoding
) -> list[Stream]:
    """Hand log-probabilities of prompts on to the frontends, with the bytes of each candidate.
    Returns the streams whose columns do not fit each other; they are gone from `streams`."""
    broken: list[Stream] = []
    for entry in [entry for message in batch for entry in message.prompt_logprobs]:
        stream = streams.get(-1 if entry.handle is None else entry.handle)
        if stream is None or stream.attempt != entry.attempt:
            continue
        if stream.execution == NO_EXECUTION:
            stream.execution = entry.execution
        if stream.execution != entry.execution:
            continue
        try:
            texts = decoding.bytes_of(_checked(entry))
        except ValueError as error:
            log.error("log-probabilities of a prompt: %s", error)
            broken.append(streams.pop(stream.handle))
            continue
        entry = replace(entry, handle=stream.frontend_handle, texts=texts)
        stream.outgoing.prompt_logprobs.append(entry)
    return broken


def _checked(entry: PromptLogprobs) -> NDArray[np.int32]:
    """The ids. Raises ValueError."""
    counts = np.frombuffer(entry.counts, np.int32)
    ranks = np.frombuffer(entry.ranks, np.int32)
    ids = np.frombuffer(entry.ids, np.int32)
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
    """Append the rows to what the streams' frontends get. Returns the streams that a stop string
    ended and those that lost rows; both are gone from `streams`."""
    stopped: list[Stream] = []
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
        # The fast path and the slow one: see Stream.
        text = None if stream.needs_step else stream.texts[token]
        if text is None:
            text = stream.step(token)
            if stream.stop_string is not None:
                stopped.append(streams.pop(handle))
            if stream.parts:
                # Of the row that is extended or appended below.
                index = len(stream.outgoing.rows) - (stream is previous)
                stream.outgoing.add_parts(index, stream.take_parts())
        else:
            stream.position = position + 1
        outgoing = stream.outgoing
        outgoing.tokens.append(token)
        if stream is previous:
            outgoing.extend_row(len(outgoing.rows) - 1, text)
        else:
            row = (stream.frontend_handle, stream.attempt, execution, position, text)
            outgoing.rows.append(row)
            previous = stream
        if entries and (entry := entries.get(handle << 32 | position)) is not None:
            index = len(outgoing.rows) - 1
            token_index = outgoing.counts.get(index, 1) - 1
            outgoing.logprobs.append(TokenLogprobs(index, token_index, *entry, stream.text_offset))
    return stopped, lost


def _accept(stream: Stream, execution: int, position: int) -> bool:
    """Whether the row is the stream's next one. The first execution seen is the one that counts,
    and its rows come in order."""
    if stream.execution == NO_EXECUTION:
        stream.execution = execution
    return stream.execution == execution and stream.position == position
