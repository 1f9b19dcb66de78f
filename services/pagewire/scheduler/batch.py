"""The forming of one step: running decodes first, then prefill chunks, within the budgets of tokens
and time; growth of block tables; preemption.

There are no phases: a row computes the next tokens that its request knows. The step is formed
before the results of the ones before it are there, so lengths run ahead of values: a row that
reaches its last known token is counted as knowing one more.
"""

import numpy as np
from pagewire_protocol.messages import Admission, Shared, Step, pack

from .prefix_groups import saved
from .request import Phase, Request
from .slots import I32, NEVER, ints
from .step_estimator import LEAST_CHUNK, NOBODY, Waiting, chunk_ms, decodes_ms
from .worker_state import NO_ROWS, Flight, WorkerState


def form(replica: WorkerState, epoch: int, now: float, waiting: Waiting = NOBODY) -> Step | None:
    """The next step, recorded as in flight since `now` (monotonic seconds); None when there is
    nothing to do."""
    grown: dict[int, int] = {}
    decodes = _decode_rows(replica, replica.pace.step_tokens, grown)
    reads, shared = _reads(replica, decodes), _shared(replica, decodes)
    ms = decodes_ms(replica.pace.cost, len(decodes), reads - replica.groups_save)
    chunks, ms = _chunks(replica, len(decodes), ms, waiting) if replica.prefill else ([], ms)
    if not len(decodes) and not chunks and not replica.retire:
        return None
    replica.last_reads = reads
    replica.sent += 1
    replica.counters.steps += 1
    repeat = not chunks and len(decodes) > 0 and decodes is replica.last_run
    flight = _advance(replica, decodes, chunks)
    replica.flights.append(flight)
    replica.pace.sent(flight.n, ms if len(flight.run) else 0.0, now, bool(chunks))
    return _message(replica, epoch, flight, grown, repeat=repeat, shared=None if repeat else shared)


def _decode_rows(replica: WorkerState, budget: int, grown: dict[int, int]) -> I32:
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


def _grow(replica: WorkerState, rows: I32, short: I32, grown: dict[int, int]) -> I32:
    """One more block for each row of `short`, noted in `grown` by slot. When blocks run out the
    youngest request loses its place; rows that must wait for blocks in flight to come back are left
    out of this step."""
    pool, slots = replica.pool, replica.slots
    while pool.available + replica.returning() < len(short):
        victim = max(
            (r for r in replica.requests() if r.phase is Phase.RUNNING), key=lambda r: r.order
        )
        short, rows = short[short != victim.slot], rows[rows != victim.slot]
        replica.preempt(victim)
    if pool.available < len(short):
        eldest = sorted(ints(short), key=lambda slot: slots.tenant(slot).order)
        rows = rows[~np.isin(rows, eldest[pool.available :])]
        short = np.array(eldest[: pool.available], np.int32)
    grown.update(zip(ints(short), pool.take(len(short)), strict=True))
    for slot, block in grown.items():
        slots.tenant(slot).blocks.append(block)
    slots.capacity[short] += replica.block_size
    return rows


def _reads(replica: WorkerState, decodes: I32) -> int:
    """Tokens that the decodes attend to together: one more for each row as long as the same rows
    run."""
    if decodes is replica.last_run:
        return replica.last_reads + len(decodes)
    return int(replica.slots.sent[decodes].sum()) + len(decodes) if replica.pace.measured else 0


def _chunks(
    replica: WorkerState, decodes: int, ms: float, waiting: Waiting
) -> tuple[list[tuple[Request, int]], float]:
    """The prefill beside `decodes` rows that take `ms` milliseconds, in order of arrival, and the
    time of all of it. The first request comes forward by LEAST_CHUNK tokens whatever they take."""
    pace, slots, chunks = replica.pace, replica.slots, list[tuple[Request, int]]()
    room, limit = pace.step_tokens - decodes, pace.limit_ms(decodes, waiting)
    for request in replica.prefill:
        sent = int(slots.sent[request.slot])
        rest = int(slots.known[request.slot]) - sent
        fits = pace.chunk(limit, ms, sent)
        count = _whole_blocks(
            sent,
            rest,
            int(min(room, fits if chunks else max(fits, LEAST_CHUNK))),
            replica.block_size,
            not chunks,
        )
        if count <= 0:
            break
        chunks.append((request, count))
        room, ms = room - count, ms + chunk_ms(pace.cost, sent, count)
        if count < rest:
            break
    return chunks, ms


def _whole_blocks(sent: int, rest: int, fits: int, block_size: int, must: bool) -> int:
    """Tokens of a chunk of at most `fits`: all the rest, or up to the end of a block, so that
    blocks are full early. A chunk that cannot even fill a block is taken only where something
    `must` be."""
    if rest <= fits:
        return rest
    whole = (sent + fits) // block_size * block_size - sent
    return whole if whole > 0 or not must else fits


def _advance(replica: WorkerState, decodes: I32, chunks: list[tuple[Request, int]]) -> Flight:
    """Count the step's tokens as computed, and those it will sample as known."""
    _sample(replica, decodes)
    if chunks:
        return _advance_chunks(replica, decodes, chunks)
    if decodes is not replica.last_run:
        replica.last_run, replica.last_bytes = decodes, decodes.tobytes()
    return Flight(replica.sent, decodes, None, decodes, replica.last_bytes, replica.slots.releases)


def _advance_chunks(
    replica: WorkerState, decodes: I32, chunks: list[tuple[Request, int]]
) -> Flight:
    slots = replica.slots
    chunked = np.array([request.slot for request, _ in chunks], np.int32)
    lengths = np.array([count for _, count in chunks], np.int32)
    slots.sent[chunked] += lengths
    replica.unsent = None
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


def _sample(replica: WorkerState, rows: I32) -> None:
    """Each of `rows` computes its last known token and samples one more; those that may not grow
    further run no more. As long as the same rows run, it is known when the first of them gets
    there."""
    slots = replica.slots
    known = slots.known[rows] + 1
    slots.known[rows] = known
    slots.sent[rows] = known - 1
    if rows is replica.last_run and replica.last_room > 1:
        replica.last_room -= 1
        return
    room = slots.final[rows] - known
    replica.last_room = int(room.min(initial=NEVER))
    if replica.last_room <= 0:
        slots.set_decoding(rows[room <= 0], False)


def _message(
    replica: WorkerState,
    epoch: int,
    flight: Flight,
    grown: dict[int, int],
    *,
    repeat: bool,
    shared: Shared | None,
) -> Step:
    columns = {}
    if not repeat:
        ones = np.ones(len(flight.run), np.int32)
        columns = {
            "run_slots": replica.last_bytes,
            "run_counts": (ones if flight.counts is None else flight.counts).tobytes(),
        }
    message = Step(
        epoch,
        flight.n,
        retire=pack("i", replica.retire),
        admit=tuple([_admission(replica, request) for request in replica.admit]),
        grow_slots=pack("i", grown),
        grow_blocks=pack("i", grown.values()),
        repeat=repeat,
        shared=shared,
        **columns,
    )
    replica.retire, replica.admit = [], []
    return message


def _shared(replica: WorkerState, decodes: I32) -> Shared | None:
    """The groups of decodes with common blocks, which last as long as the same rows decode, and
    what they save of each step's reads."""
    if replica.prefixes is not None and decodes is not replica.grouped:
        lengths = replica.slots.sent[decodes] + 1
        replica.grouped, replica.groups = (
            decodes,
            replica.prefixes.find(decodes, lengths) if len(decodes) else None,
        )
        replica.groups_save = 0 if replica.groups is None else saved(replica.groups)
    return replica.groups


def _admission(replica: WorkerState, request: Request) -> Admission:
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
