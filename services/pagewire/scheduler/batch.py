"""The forming of one step: running decodes first, then prefill chunks, within the token budget; growth of block tables; preemption.

There are no phases: a row computes the next tokens that its request knows. The step is formed before the results of the ones before it
are there, so lengths run ahead of values: a row that reaches its last known token is counted as knowing one more.
"""

import numpy as np
from pagewire_protocol.messages import Admission, Shared, Step, pack

from .replica import NO_ROWS, Flight, Replica
from .request import Phase, Request
from .slots import I32, ints


def form(replica: Replica, epoch: int, token_budget: int) -> Step | None:
    """The next step, recorded as in flight; None when there is nothing to do."""
    grown: list[tuple[int, int]] = []
    decodes = _decode_rows(replica, token_budget, grown)
    chunks = _chunks(replica, token_budget - len(decodes))
    if not len(decodes) and not chunks and not replica.retire:
        return None
    replica.sent += 1
    replica.counters.steps += 1
    repeat = not chunks and len(decodes) > 0 and decodes is replica.last_run
    flight = _advance(replica, decodes, chunks)
    replica.flights.append(flight)
    return _message(replica, epoch, flight, repeat, grown)


def _decode_rows(replica: Replica, budget: int, grown: list[tuple[int, int]]) -> I32:
    slots = replica.slots
    rows = slots.decode_rows()
    if not len(rows):
        return NO_ROWS
    short = rows[slots.sent[rows] >= slots.capacity[rows]]
    if len(short):
        rows = _grow(replica, rows, short, grown)
    if len(rows) > budget:
        rows = np.roll(rows, -(replica.sent * budget) % len(rows))[:budget]
    return rows


def _grow(replica: Replica, rows: I32, short: I32, grown: list[tuple[int, int]]) -> I32:
    """One more block for each row of `short`. When blocks run out the youngest request loses its place; rows that must wait for blocks in
    flight to come back are left out of this step."""
    pool, slots = replica.pool, replica.slots
    while pool.available + replica.returning() < len(short):
        victim = max((r for r in replica.requests() if r.phase is Phase.RUNNING), key=lambda r: r.order)
        short, rows = short[short != victim.slot], rows[rows != victim.slot]
        replica.preempt(victim)
    waiting = [r for slot in ints(short) if (r := slots.requests[slot]) is not None]
    if pool.available < len(short):
        waiting.sort(key=lambda r: r.order)
        stalled = [r.slot for r in waiting[pool.available :]]
        rows = rows[~np.isin(rows, stalled)]
        del waiting[pool.available :]
    for request, block in zip(waiting, pool.take(len(waiting)), strict=True):
        request.blocks.append(block)
        grown.append((request.slot, block))
    slots.capacity[[r.slot for r in waiting]] += replica.block_size
    return rows


def _chunks(replica: Replica, budget: int) -> list[tuple[Request, int]]:
    chunks: list[tuple[Request, int]] = []
    for request in replica.prefill:
        if budget <= 0:
            break
        count = min(budget, int(replica.slots.known[request.slot] - replica.slots.sent[request.slot]))
        chunks.append((request, count))
        budget -= count
    return chunks


def _advance(replica: Replica, decodes: I32, chunks: list[tuple[Request, int]]) -> Flight:
    """Count the step's tokens as computed, and those it will sample as known."""
    _sample(replica, decodes)
    if chunks:
        return _advance_chunks(replica, decodes, chunks)
    if decodes is not replica.last_run:
        replica.last_run, replica.last_bytes = decodes, decodes.tobytes()
    return Flight(replica.sent, decodes, None, decodes, replica.last_bytes, replica.slots.releases)


def _advance_chunks(replica: Replica, decodes: I32, chunks: list[tuple[Request, int]]) -> Flight:
    slots = replica.slots
    chunked = np.array([request.slot for request, _ in chunks], np.int32)
    lengths = np.array([count for _, count in chunks], np.int32)
    slots.sent[chunked] += lengths
    complete = chunked[slots.sent[chunked] == slots.known[chunked]]
    if len(complete):
        slots.set_decoding(complete, True)
        _sample(replica, complete)
        over = set(ints(complete))
        replica.prefill = [request for request in replica.prefill if request.slot not in over]
    run = np.concatenate([decodes, chunked])
    counts = np.concatenate([np.ones(len(decodes), np.int32), lengths])
    sampled = np.concatenate([decodes, complete])
    replica.last_run, replica.last_bytes = run, run.tobytes()
    return Flight(replica.sent, run, counts, sampled, sampled.tobytes(), slots.releases)


def _sample(replica: Replica, rows: I32) -> None:
    """Each of `rows` computes its last known token and samples one more; those that may not grow further run no more."""
    slots = replica.slots
    known = slots.known[rows] + 1
    slots.known[rows] = known
    slots.sent[rows] = known - 1
    last = known >= slots.final[rows]
    if last.any():
        slots.set_decoding(rows[last], False)


def _message(replica: Replica, epoch: int, flight: Flight, repeat: bool, grown: list[tuple[int, int]]) -> Step:
    columns = {}
    if not repeat:
        ones = np.ones(len(flight.run), np.int32)
        columns = {"run_slots": replica.last_bytes, "run_counts": (ones if flight.counts is None else flight.counts).tobytes()}
    message = Step(
        epoch,
        flight.n,
        retire=pack("i", replica.retire),
        admit=tuple(_admission(replica, request) for request in replica.admit),
        grow_slots=pack("i", [slot for slot, _ in grown]),
        grow_blocks=pack("i", [block for _, block in grown]),
        repeat=repeat,
        shared=None if repeat else _shared(replica, flight),
        **columns,
    )
    replica.retire, replica.admit = [], []
    return message


def _shared(replica: Replica, flight: Flight) -> Shared | None:
    """Groups of rows with common blocks, for a step of decodes alone."""
    if replica.prefixes is None or flight.counts is not None or not len(flight.run):
        return None
    return replica.prefixes.find(flight.run, replica.slots.sent[flight.run])


def _admission(replica: Replica, request: Request) -> Admission:
    slots, slot, size = replica.slots, request.slot, len(request.prompt)
    slots.born[slot] = replica.sent
    return Admission(
        slot=slot,
        execution=request.execution,
        prompt=request.prompt.tobytes(),
        output=request.tokens[size:].tobytes(),
        blocks=pack("i", request.blocks),
        computed=int(slots.done[slot]),
        sampling=request.sampling,
    )
