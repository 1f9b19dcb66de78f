"""Taking in one step's result: which rows still count, what they add to their requests, what ends,
which blocks are full.

Results come in order, a step or more after later steps were sent. A row is told from its slot's
earlier tenants by the step that admitted the present one, never by the slot alone. Knows no peers
and no queue; ends are reported to the caller.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pagewire_protocol.messages import Finish, LogprobColumns, StepResult

from .emit import Outgoing, select
from .request import Request
from .slots import I32, I64, ints
from .worker_state import Flight, WorkerState

Ended = Callable[[Request, Finish, int | None], None]
Failed = Callable[[Request, str], None]


class WorkerFault(ValueError):
    """The worker's answer does not fit the step it was sent: its slots can no longer be trusted."""


def absorb(
    replica: WorkerState, result: StepResult, out: Outgoing, ended: Ended, failed: Failed
) -> None:
    """Raises WorkerFault, with nothing changed, when `result` is not the answer to the oldest step
    in flight."""
    flight = replica.flights[0] if replica.flights else None
    if flight is None or result.n < flight.n:
        return
    if result.n != flight.n:
        raise WorkerFault(
            f"it answered step {result.n} while step {flight.n} is the next one due; results were lost"
        )
    tokens, flags, logprobs = _columns(flight, result)
    hits = _hits(replica, tokens, flags)
    _prompts(replica, flight, result, out)
    replica.flights.popleft()
    rows = flight.sampled
    if flags is not None:
        _fail(replica, flight, flags, failed)
    if replica.slots.releases != flight.releases:
        keep = replica.slots.born[rows] <= flight.n
        rows, tokens, hits, logprobs = rows[keep], tokens[keep], hits[keep], select(logprobs, keep)
    _record(replica, rows, tokens, hits, logprobs, out, ended, flight)
    replica.returned = (
        flight.n
    )  # not before: a preempted request whose last row this is must be read before it moves
    replica.settle()


def _columns(
    flight: Flight, result: StepResult
) -> tuple[I32, NDArray[np.bool_] | None, LogprobColumns | None]:
    """Tokens and flags in the order of `flight.sampled`; flags are None when no row is flagged."""
    count = len(flight.sampled)
    if (
        len(result.tokens) != 4 * count
        or len(result.slots) != 4 * count
        or len(result.flags) != count
    ):
        raise WorkerFault(
            f"it returned {len(result.slots) // 4} rows for step {result.n}, which samples {count}"
        )
    tokens = np.frombuffer(result.tokens, np.int32)
    flags = np.frombuffer(result.flags, np.bool_) if result.flags.count(0) != count else None
    if result.slots == flight.sampled_bytes:
        return tokens, flags, result.logprobs
    return _reordered(flight, result, tokens, flags)


def _prompts(replica: WorkerState, flight: Flight, result: StepResult, out: Outgoing) -> None:
    """Log-probabilities of prompts go on to the requests that still have their slots."""
    if not result.prompt_logprobs:
        return
    run = set(ints(flight.run))
    if any(entry.place not in run for entry in result.prompt_logprobs):
        raise WorkerFault(
            f"step {result.n} came back with the prompts of slots that it did not run"
        )
    for entry in result.prompt_logprobs:
        if replica.slots.born[entry.place] <= flight.n:
            out.prompt_logprobs(replica.slots, entry)


def _reordered(
    flight: Flight, result: StepResult, tokens: I32, flags: NDArray[np.bool_] | None
) -> tuple[I32, NDArray[np.bool_] | None, LogprobColumns | None]:
    slots = np.frombuffer(result.slots, np.int32)
    theirs, ours = np.argsort(slots), np.argsort(flight.sampled)
    if not np.array_equal(slots[theirs], flight.sampled[ours]):
        raise WorkerFault(f"step {result.n} came back with slots that it did not sample")
    source = np.empty_like(theirs)
    source[ours] = theirs
    logprobs = result.logprobs
    if logprobs is not None:
        place = np.argsort(source).astype(np.int32)
        moved = place[np.frombuffer(logprobs.rows, np.int32)].tobytes()
        logprobs = LogprobColumns(
            moved, logprobs.counts, logprobs.ranks, logprobs.ids, logprobs.values
        )
    return tokens[source], None if flags is None else flags[source], logprobs


def _hits(replica: WorkerState, tokens: I32, flags: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Where a token may end its request [rows]. The token of a flagged row means nothing, so it may
    lie outside the vocabulary."""
    if flags is not None:
        tokens = np.where(flags, 0, tokens)
    try:
        return replica.slots.watched[tokens.view(np.uint32)] > 0
    except IndexError:
        raise WorkerFault(
            f"it sampled a token outside its vocabulary of {replica.slots.vocab_size}"
        ) from None


def _fail(replica: WorkerState, flight: Flight, flags: NDArray[np.bool_], failed: Failed) -> None:
    slots = replica.slots
    for slot in ints(flight.sampled[flags]):
        request = slots.requests[slot]
        if request is not None and slots.born[slot] <= flight.n:
            replica.pool.disown(request.blocks)
            failed(
                request, f"the model produced non-finite logits at position {int(slots.held[slot])}"
            )


def _record(
    replica: WorkerState,
    rows: I32,
    tokens: I32,
    hits: NDArray[np.bool_],
    logprobs: LogprobColumns | None,
    out: Outgoing,
    ended: Ended,
    flight: Flight,
) -> None:
    slots = replica.slots
    held = slots.held[rows]
    positions: I64 = held - slots.prompt_len[rows]
    slots.tokens[rows, held] = tokens
    held += 1
    slots.held[rows] = held
    _computed(replica, flight)
    out.tokens(slots, rows, positions, tokens, logprobs)
    replica.counters.generation_tokens += len(rows)
    over = hits | (held >= slots.final[rows])
    if over.any():
        for i in ints(np.flatnonzero(over)):
            _maybe_end(replica, int(rows[i]), int(tokens[i]), ended)


def _maybe_end(replica: WorkerState, slot: int, token: int, ended: Ended) -> None:
    request = replica.slots.requests[slot]
    assert request is not None
    finish = request.finish_at(
        token, int(replica.slots.held[slot]) - len(request.prompt), replica.slots.eos
    )
    if finish is not None:
        ended(request, *finish)


def _computed(replica: WorkerState, flight: Flight) -> None:
    """The step came back good: its rows' tokens are in the cache, and the blocks that they fill are
    sealed."""
    slots, run, counts = replica.slots, flight.run, flight.counts
    if slots.releases != flight.releases:
        keep = slots.born[run] <= flight.n
        run, counts = run[keep], None if counts is None else counts[keep]
    done = slots.done[run] + (1 if counts is None else counts)
    slots.done[run] = done
    if not replica.caching:
        return
    full = done // replica.block_size
    for i in ints(np.flatnonzero(full > slots.sealed[run])):
        _seal(replica, int(run[i]), int(full[i]))


def _seal(replica: WorkerState, slot: int, full: int) -> None:
    request = replica.slots.requests[slot]
    assert request is not None
    chain = request.chain
    if len(chain) < full:
        request.chained(replica.block_size, replica.slots.tokens[slot, : full * replica.block_size])
    for i in range(int(replica.slots.sealed[slot]), full):
        replica.pool.seal(request.blocks[i], chain[i])
        replica.computing.discard(chain[i])
    replica.slots.sealed[slot] = full
