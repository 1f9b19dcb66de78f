"""The forming of one step: running decodes first, then prefill chunks, within the budgets of tokens
and time; growth of block tables; preemption.

There are no phases. A row computes the next tokens of its request, whether those came from the
prompt or were sampled.

A step is formed before the results of the ones before it are there, so lengths run ahead of values.
A row that is given the last token of its slot will sample, and is counted at once as having all the
tokens that the worker may bring for it; which ones they are, the worker knows and feeds back by
itself. Only the lengths are needed to form the next step: where blocks must be added, what the rows
attend to, who reaches `max_len` and runs no more.
"""

from dataclasses import dataclass, field

import numpy as np
from pagewire_protocol.columns import BlockId, Slot
from pagewire_protocol.messages import Admission, Epoch, Shared, Step, pack

from .decode_set import NO_DECODES, NO_VERSION, Decodes
from .in_flight import InFlightStep
from .request import Phase, Request
from .slots import I32, NO_ROWS, ints, slots_of
from .step_estimator import LEAST_CHUNK, NO_WAITING, Waiting, chunk_ms, decodes_ms
from .worker_state import WorkerState


@dataclass(slots=True)
class Growth:
    """Blocks that a step appends to block tables: `blocks[i]` to that of `slots[i]`."""

    slots: list[Slot] = field(default_factory=list[Slot])
    blocks: list[BlockId] = field(default_factory=list[BlockId])


@dataclass(slots=True)
class Chunks:
    """The prefill of a step: `lengths[i]` tokens of `requests[i]`. `ms`: how long the whole step is
    estimated to take, decodes included."""

    requests: list[Request]
    lengths: list[int]
    ms: float


def form(
    worker: WorkerState, epoch: Epoch, now: float, waiting: Waiting = NO_WAITING
) -> Step | None:
    """The next step, recorded as in flight since `now` (monotonic seconds); None when there is
    nothing to do. `waiting`: this worker's share of the requests that wait for a slot."""
    while worker.suspects:
        suspect = worker.suspects[0]
        if worker.in_flight.steps or suspect in worker.prefill:
            return _form_alone(worker, epoch, now, suspect)
        worker.suspects.pop(0)  # it was computed, and brought no token
    growth = Growth()
    decodes = _select_decodes(worker, growth)
    attended = worker.decode_set.attended_tokens(decodes)
    groups, saved_reads = worker.decode_set.prefix_groups(decodes)
    ms = decodes_ms(worker.estimator.cost, len(decodes.rows), attended - saved_reads)
    chunks = _select_chunks(worker, worker.prefill, len(decodes.rows), ms, waiting)
    if not len(decodes.rows) and not chunks.requests and not worker.to_retire:
        return None

    step = _schedule(worker, decodes, chunks, attended)
    worker.in_flight.push(step)
    worker.counters.steps += 1
    worker.counters.iteration_tokens.observe(len(decodes.rows) + sum(chunks.lengths))
    has_chunks = bool(chunks.requests)
    worker.estimator.sent(step.n, chunks.ms if len(step.run) else 0.0, now, has_chunks)
    repeat = decodes.unchanged and not has_chunks
    return _message(worker, epoch, step, growth, groups, repeat)


def _form_alone(worker: WorkerState, epoch: Epoch, now: float, suspect: Request) -> Step | None:
    """The next step of a worker that has to find out about `suspect`: nothing else is computed or
    admitted until its next token is there. None while steps with others are in flight, and while
    that token is awaited."""
    slot = suspect.slot
    under_way = any(bool((step.run != slot).any()) for step in worker.in_flight.steps)
    if under_way or suspect not in worker.prefill:
        return None
    chunks = _select_chunks(
        worker, [suspect], 0, decodes_ms(worker.estimator.cost, 0, 0), NO_WAITING
    )
    if not chunks.requests:
        return None
    waiting_to_enter = [request for request in worker.to_admit if request is not suspect]
    worker.to_admit = [request for request in worker.to_admit if request is suspect]
    step = _schedule(worker, NO_DECODES, chunks, 0)
    worker.in_flight.push(step)
    worker.counters.steps += 1
    worker.counters.iteration_tokens.observe(sum(chunks.lengths))
    worker.estimator.sent(step.n, chunks.ms, now, True)
    message = _message(worker, epoch, step, Growth(), None, repeat=False)
    worker.to_admit = waiting_to_enter
    return message


# --- decodes ---


def _select_decodes(worker: WorkerState, growth: Growth) -> Decodes:
    """Everyone who decodes gets their next token, as far as blocks and the token budget reach."""
    decode_set = worker.decode_set
    version = decode_set.version
    all_rows = decode_set.rows()
    if worker.facts.pipeline_parallel_size > 1:
        all_rows = _micro_batch(worker, all_rows)
        version = NO_VERSION
    if not len(all_rows):
        return NO_DECODES
    rows = _with_blocks(worker, all_rows, growth)
    budget = worker.estimator.step_tokens
    if len(rows) > budget:
        # More rows than a step may have tokens: they take turns, so the first row moves on by as
        # many as one step takes.
        first = worker.in_flight.num_sent * budget % len(rows)
        rows = np.roll(rows, -first)[:budget]
    return decode_set.decodes(rows, version if rows is all_rows else NO_VERSION)


def _micro_batch(worker: WorkerState, rows: I32) -> I32:
    """Those of `rows` that the next step of a pipeline runs: a stage's share of them, none of which
    a step in flight samples, so that no stage waits for another one's tokens."""
    stages = worker.facts.pipeline_parallel_size
    sampling = [step.sampled for step in worker.in_flight.steps if len(step.sampled)]
    if len(sampling) >= stages:
        return NO_ROWS
    share = -(-len(rows) // stages)
    if sampling:
        rows = rows[~np.isin(rows, np.concatenate(sampling))]
    return rows[:share]


def _with_blocks(worker: WorkerState, rows: I32, growth: Growth) -> I32:
    """Those of `rows` that have a block for every token which this step may write, after adding
    blocks where they lack; these are noted in `growth`."""
    slots = worker.slots
    per_row = worker.facts.max_tokens_per_row
    # A row writes at `num_scheduled` and, where the worker may bring several tokens, at the
    # positions that follow; never beyond the longest that its request can become.
    reach = slots.num_scheduled[rows] + per_row
    if per_row > 1:
        reach = np.minimum(reach, slots.max_len[rows])
    lacking = reach - slots.num_allocated[rows]
    is_short = lacking > 0
    short = rows[is_short]
    if not len(short):
        return rows
    if per_row == 1 and not worker.facts.max_forced_tokens:
        needed = dict.fromkeys(slots_of(short), 1)
    else:
        missing = -(-lacking[is_short] // worker.kv_cache.block_size)
        needed = dict(zip(slots_of(short), ints(missing), strict=True))
    if worker.kv_cache.pool.available < sum(needed.values()):
        rows = _make_room(worker, rows, needed)
    _grow(worker, needed, growth)
    return rows


def _make_room(worker: WorkerState, rows: I32, needed: dict[Slot, int]) -> I32:
    """See to it that the blocks `needed`, by slot, can be taken. Drops from `needed` the slots that
    get none, and returns `rows` without them."""
    pool = worker.kv_cache.pool

    # Blocks of requests that have ended come back with the steps in flight that still write them.
    # If even those do not suffice, a request is preempted: the youngest, which has the least to
    # compute again and would be the last to be placed if all waited.
    while pool.available + worker.kv_cache.returning() < sum(needed.values()):
        running = [r for r in worker.requests() if r.phase is Phase.RUNNING]
        victim = max(running, key=lambda request: request.order)
        needed.pop(victim.slot, None)
        rows = rows[rows != victim.slot]
        worker.preempt(victim)

    # Blocks that steps in flight still hold cannot be taken yet. The oldest requests take what is
    # free; the others are left out of this step, keep their slots and go on when blocks are back.
    left = pool.available
    if left < sum(needed.values()):
        waits: list[Slot] = []
        for slot in sorted(needed, key=lambda slot: worker.slots.request_in(slot).order):
            if needed[slot] <= left and not waits:
                left -= needed[slot]
            else:
                waits.append(slot)
        for slot in waits:
            del needed[slot]
        rows = rows[~np.isin(rows, waits)]
    return rows


def _grow(worker: WorkerState, needed: dict[Slot, int], growth: Growth) -> None:
    """Append blocks to the tables of the slots in `needed`."""
    growth.blocks = worker.kv_cache.pool.take(sum(needed.values()))
    if len(growth.blocks) == len(needed):
        growth.slots = list(needed)
    else:
        growth.slots = [slot for slot, count in needed.items() for _ in range(count)]
    requests = worker.slots.requests
    for slot, block in zip(growth.slots, growth.blocks, strict=True):
        request = requests[slot]
        assert request is not None
        request.blocks.append(block)
    grown = np.fromiter(needed, np.int32, len(needed))
    counts = np.fromiter(needed.values(), np.int64, len(needed))
    worker.slots.num_allocated[grown] += counts * worker.kv_cache.block_size


# --- prefill ---


def _select_chunks(
    worker: WorkerState, prefill: list[Request], decodes: int, ms: float, waiting: Waiting
) -> Chunks:
    """The chunks of `prefill` beside `decodes` rows that take `ms` milliseconds, in order, up to
    the budgets of tokens and time. The first request moves on by LEAST_CHUNK tokens whatever the
    decodes take: prompts must come forward."""
    chunks = Chunks([], [], ms)
    if not prefill:
        return chunks
    estimator = worker.estimator
    slots = worker.slots
    room = estimator.step_tokens - decodes
    limit_ms = estimator.limit_ms(decodes, waiting)
    for request in prefill:
        scheduled = int(slots.num_scheduled[request.slot])
        remaining = int(slots.num_tokens[request.slot]) - scheduled
        is_first = not chunks.requests
        fits = estimator.chunk(limit_ms, chunks.ms, scheduled)
        if is_first:
            fits = max(fits, LEAST_CHUNK)
        most = int(min(room, fits))
        length = _whole_blocks(scheduled, remaining, most, worker.kv_cache.block_size, is_first)
        if length <= 0:
            break
        chunks.requests.append(request)
        chunks.lengths.append(length)
        chunks.ms += chunk_ms(estimator.cost, scheduled, length)
        room -= length
        if length < remaining:
            # The budgets are spent. A shorter chunk of the next request might still fit, but it
            # would only delay this one.
            break
    return chunks


def _whole_blocks(
    scheduled: int, remaining: int, most: int, block_size: int, is_first: bool
) -> int:
    """Tokens of a chunk that begins at `scheduled` and has at most `most`: all the `remaining`, or up to
    the end of a block, so that blocks are full early and can be shared. A chunk that cannot even
    fill a block is worth its launch only where nothing else would be computed."""
    if remaining <= most:
        return remaining
    whole = (scheduled + most) // block_size * block_size - scheduled
    return whole if whole > 0 or not is_first else most


# --- the step ---


def _schedule(worker: WorkerState, decodes: Decodes, chunks: Chunks, attended: int) -> InFlightStep:
    """Count the step's tokens as scheduled, and those that it will sample as there."""
    slots = worker.slots
    n = worker.in_flight.num_sent + 1
    worker.decode_set.schedule(decodes, attended, with_chunks=bool(chunks.requests))
    if not chunks.requests:
        rows = decodes.rows
        row_bytes = worker.decode_set.bytes_of(decodes)
        return InFlightStep(n, rows, None, rows, row_bytes, NO_ROWS, slots.num_vacated)

    chunked = np.array([request.slot for request in chunks.requests], np.int32)
    lengths = np.array(chunks.lengths, np.int32)
    sampled, prefilled = _schedule_chunks(worker, chunked, lengths)
    sampled = np.concatenate([decodes.rows, sampled])
    return InFlightStep(
        n,
        run=np.concatenate([decodes.rows, chunked]),
        counts=np.concatenate([np.ones(len(decodes.rows), np.int32), lengths]),
        sampled=sampled,
        sampled_bytes=sampled.tobytes(),
        prefilled=prefilled,
        num_vacated=slots.num_vacated,
    )


def _schedule_chunks(worker: WorkerState, chunked: I32, lengths: I32) -> tuple[I32, I32]:
    """The slots `chunked` compute `lengths` more tokens. Returns those that reach their last token
    with it: the ones that sample, and decode from now on, and the ones that want no token."""
    slots = worker.slots
    slots.num_scheduled[chunked] += lengths
    complete = chunked[slots.num_scheduled[chunked] == slots.num_tokens[chunked]]
    worker.prefill_changed()
    if not len(complete):
        return NO_ROWS, NO_ROWS
    over = set(ints(complete))
    worker.prefill = [request for request in worker.prefill if request.slot not in over]
    wants_tokens = slots.max_len[complete] > slots.num_tokens[complete]
    sampled = complete[wants_tokens]
    if len(sampled):
        worker.decode_set.add(sampled)
        worker.decode_set.schedule_samples(sampled)
    return sampled, complete[~wants_tokens]


def _message(
    worker: WorkerState,
    epoch: Epoch,
    step: InFlightStep,
    growth: Growth,
    groups: Shared | None,
    repeat: bool,
) -> Step:
    """`step` as a message to the worker. A repetition leaves out what it has in common with the
    step before."""
    run_slots = run_counts = b""
    if not repeat:
        ones = np.ones(len(step.run), np.int32)
        run_slots = step.sampled_bytes if step.counts is None else step.run.tobytes()
        run_counts = (ones if step.counts is None else step.counts).tobytes()
    message = Step(
        epoch,
        step.n,
        retire=pack("i", worker.to_retire),
        admit=tuple([_admission(worker, request, step.n) for request in worker.to_admit]),
        grow_slots=pack("i", growth.slots),
        grow_blocks=pack("i", growth.blocks),
        run_slots=run_slots,
        run_counts=run_counts,
        repeat=repeat,
        shared=None if repeat else groups,
        clear=worker.must_clear,
    )
    worker.must_clear = False
    worker.to_retire = []
    worker.to_admit = []
    return message


def _admission(worker: WorkerState, request: Request, n: int) -> Admission:
    """`request` enters its slot with step `n`."""
    slots = worker.slots
    slots.admitted_step[request.slot] = n
    prompt_len = len(request.prompt)
    return Admission(
        slot=request.slot,
        execution=request.execution,
        prompt=request.prompt.tobytes(),
        output=request.tokens[prompt_len:].tobytes(),
        blocks=pack("i", request.blocks),
        computed=int(slots.num_computed[request.slot]),
        sampling=request.sampling,
        kind=request.kind,
        model=request.model,
        adapter=request.adapter,
        grammar=request.grammar,
    )
