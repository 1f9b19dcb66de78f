"""Taking in one step's result: which rows still count, what they add to their requests, what ends,
which blocks are full.

Results come in order, a step or more after later steps were sent. A row is told from those of its
slot's earlier requests by the step that admitted the present one, never by the slot alone. Knows no
peers and no queue; ends are reported to the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pagewire_protocol.agreed import GRAMMAR_FAILED
from pagewire_protocol.columns import Slot
from pagewire_protocol.messages import Finish, LogprobColumns, StepResult

from .in_flight import InFlightStep
from .outgoing import Outgoing, select
from .request import Refusal, Request
from .slots import I32, NO_ROWS, Bools, Slots, ints, slots_of
from .worker_state import WorkerState

U8 = NDArray[np.uint8]
Ended = Callable[[Request, Finish, int | None], None]
"""Called with a request, how it ended and the stop token id to report."""
Failed = Callable[[Request, Refusal], None]
"""Called with a request and what went wrong with it."""


class WorkerFault(ValueError):
    """The worker's answer does not fit the step it was sent: its slots can no longer be trusted."""


@dataclass(slots=True)
class SampledRows:
    """The rows of a result, in the order of the step's `sampled`: row i brings `counts[i]` of
    `tokens` to the slot `slots[i]`. `counts` is None where each row brings one. `may_end` [tokens]
    marks tokens that may end their request; `logprobs.rows` are indices into `tokens`."""

    slots: I32
    tokens: I32
    counts: I32 | None
    may_end: Bools
    logprobs: LogprobColumns | None

    def keep(self, rows: Bools) -> "SampledRows":
        """Those rows for which `rows` [rows] holds."""
        tokens = rows if self.counts is None else np.repeat(rows, self.counts)
        return SampledRows(
            self.slots[rows],
            self.tokens[tokens],
            None if self.counts is None else self.counts[rows],
            self.may_end[tokens],
            select(self.logprobs, tokens),
        )


def absorb(
    worker: WorkerState, result: StepResult, out: Outgoing, ended: Ended, failed: Failed
) -> None:
    """Raises WorkerFault, with nothing changed, when `result` is not the answer to the oldest step
    in flight."""
    step = worker.in_flight.oldest
    if step is None or result.n < step.n:
        return
    if result.n != step.n:
        raise WorkerFault(
            f"it answered step {result.n} while step {step.n} is the next one due; results were lost"
        )
    flags = _flags(step, result)
    sampled = _sampled_rows(worker, step, result, flags)
    _check_prompt_logprobs(step, result)
    if sampled.counts is not None:
        _check_room(worker, step, sampled.slots, sampled.counts)

    _pass_prompt_logprobs(worker, step, result, out)
    worker.in_flight.steps.popleft()
    worker.counters.starved_steps += worker.estimator.reached(step.n, result.starved)
    if flags is not None:
        _fail(worker, step, flags, failed)
    if worker.slots.num_vacated != step.num_vacated:
        sampled = sampled.keep(worker.slots.admitted_step[sampled.slots] <= step.n)
    if sampled.counts is None or (worker.facts.max_tokens_per_row == 1 and _most(sampled) <= 1):
        _record_one_each(worker, step, sampled, out, ended)
    else:
        _record(worker, step, sampled, sampled.counts, out, ended)
    if len(step.prefilled):
        _end_prefilled(worker, step, ended)
    # Only now: a preempted request whose last row this is must get it before it waits again.
    worker.in_flight.num_returned = step.n
    worker.release_due()


# --- does the result fit its step? ---


def _flags(step: InFlightStep, result: StepResult) -> U8 | None:
    """The rows' flags, in the order of `step.sampled`; None when none is flagged."""
    rows = len(step.sampled)
    if len(result.slots) != 4 * rows or len(result.flags) != rows:
        raise WorkerFault(
            f"it returned {len(result.slots) // 4} rows for step {result.n}, which samples {rows}"
        )
    if result.flags.count(0) == rows:
        return None
    flags = np.frombuffer(result.flags, np.uint8)
    return flags if result.slots == step.sampled_bytes else flags[_source_rows(step, result)]


def _sampled_rows(
    worker: WorkerState, step: InFlightStep, result: StepResult, flags: U8 | None
) -> SampledRows:
    """The rows in the order of `step.sampled`."""
    counts = _counts(worker, step, result)
    tokens = np.frombuffer(result.tokens, np.int32)
    logprobs = result.logprobs
    if result.slots != step.sampled_bytes:
        source = _source_rows(step, result)
        source_tokens = source
        if counts is not None:
            source_tokens = _tokens_of_rows(counts, source)
            counts = counts[source]
        tokens = tokens[source_tokens]
        logprobs = _moved(logprobs, source_tokens)
    return SampledRows(
        step.sampled, tokens, counts, _may_end(worker, tokens, counts, flags), logprobs
    )


def _counts(worker: WorkerState, step: InFlightStep, result: StepResult) -> I32 | None:
    """Tokens of each row, in the worker's order; None when each has one."""
    rows = len(step.sampled)
    if not result.counts:
        if len(result.tokens) != 4 * rows:
            raise WorkerFault(
                f"it returned {len(result.tokens) // 4} tokens for the {rows} rows of step {result.n}"
            )
        return None
    most = worker.facts.max_tokens_per_row + worker.facts.max_forced_tokens
    if len(result.counts) != 4 * rows:
        raise WorkerFault(
            f"it returned {len(result.counts) // 4} counts for the {rows} rows of step {result.n}"
        )
    counts = np.frombuffer(result.counts, np.int32)
    if (counts < 0).any() or (counts > most).any() or 4 * counts.sum() != len(result.tokens):
        raise WorkerFault(
            f"its counts for step {result.n} do not fit: each must be 0 to {most}, and their sum "
            f"the {len(result.tokens) // 4} tokens that it returned"
        )
    return counts


def _source_rows(step: InFlightStep, result: StepResult) -> I32:
    """Where the worker put each row of `step.sampled` [rows]."""
    slots = np.frombuffer(result.slots, np.int32)
    theirs = np.argsort(slots)
    ours = np.argsort(step.sampled)
    if not np.array_equal(slots[theirs], step.sampled[ours]):
        raise WorkerFault(f"step {result.n} came back with slots that it did not sample")
    source = np.empty(len(theirs), np.int32)
    source[ours] = theirs
    return source


def _tokens_of_rows(counts: I32, rows: I32) -> I32:
    """Indices of the tokens of `rows`, one row after the other; row i has `counts[i]`."""
    ends = np.cumsum(counts)
    return np.array(
        [i for row in ints(rows) for i in range(ends[row] - counts[row], ends[row])], np.int32
    )


def _moved(logprobs: LogprobColumns | None, source: I32) -> LogprobColumns | None:
    """The same log-probabilities after token `source[i]` has become token i."""
    if logprobs is None:
        return None
    target = np.argsort(source).astype(np.int32)
    rows = target[np.frombuffer(logprobs.rows, np.int32)].tobytes()
    return LogprobColumns(rows, logprobs.counts, logprobs.ranks, logprobs.ids, logprobs.values)


def _may_end(worker: WorkerState, tokens: I32, counts: I32 | None, flags: U8 | None) -> Bools:
    """Where a token may end its request [tokens]. The tokens of a flagged row mean nothing, so they
    may lie outside the vocabulary."""
    if flags is not None:
        flagged = flags > 0
        tokens = np.where(flagged if counts is None else np.repeat(flagged, counts), 0, tokens)
    try:
        return worker.slots.stop_token_uses[tokens.view(np.uint32)] > 0
    except IndexError:
        raise WorkerFault(
            f"it sampled a token outside its vocabulary of {worker.slots.vocab_size}"
        ) from None


def _check_prompt_logprobs(step: InFlightStep, result: StepResult) -> None:
    if not result.prompt_logprobs:
        return
    run = set(slots_of(step.run))
    if any(entry.slot not in run for entry in result.prompt_logprobs):
        raise WorkerFault(
            f"step {result.n} came back with the prompts of slots that it did not run"
        )


def _check_room(worker: WorkerState, step: InFlightStep, rows: I32, counts: I32) -> None:
    """All tokens of a row but the last one have been computed, and so lie in its blocks."""
    slots = worker.slots
    length = np.minimum(slots.num_received[rows] + counts, slots.max_len[rows])
    beyond = (length - 1 > slots.num_allocated[rows]) & (slots.admitted_step[rows] <= step.n)
    if beyond.any():
        row = int(np.flatnonzero(beyond)[0])
        raise WorkerFault(
            f"it computed {length[row] - 1} tokens of a row of step {step.n} whose blocks hold "
            f"{slots.num_allocated[rows[row]]}"
        )


# --- what it changes ---


def _pass_prompt_logprobs(
    worker: WorkerState, step: InFlightStep, result: StepResult, out: Outgoing
) -> None:
    """Log-probabilities of prompts go on to the requests that still have their slots."""
    for entry in result.prompt_logprobs:
        assert entry.slot is not None
        if worker.slots.admitted_step[entry.slot] <= step.n:
            out.add_prompt_logprobs(worker.slots, entry.slot, entry)


def _fail(worker: WorkerState, step: InFlightStep, flags: U8, failed: Failed) -> None:
    slots = worker.slots
    rows = np.flatnonzero(flags)
    for slot, flag in zip(slots_of(step.sampled[rows]), ints(flags[rows]), strict=True):
        request = slots.requests[slot]
        if request is not None and slots.admitted_step[slot] <= step.n:
            position = int(slots.num_received[slot])
            if flag == GRAMMAR_FAILED:
                output = position - len(request.prompt)
                text = (
                    f"the grammar cannot be held any further, after {output} tokens: it takes too "
                    "much to be matched, or no token of the model continues the text"
                )
                param = request.grammar.param if request.grammar else None
                failed(request, Refusal(400, text, param))
            else:
                worker.kv_cache.disown(request)
                text = f"the model produced non-finite logits at position {position}"
                failed(request, Refusal(500, text))


def _record_one_each(
    worker: WorkerState, step: InFlightStep, sampled: SampledRows, out: Outgoing, ended: Ended
) -> None:
    """Each row brings one token, or none: the hot path, without a loop over rows."""
    slots = worker.slots
    late = NO_ROWS
    if sampled.counts is not None:
        late = sampled.slots[sampled.counts == 0]
        sampled = sampled.keep(sampled.counts == 1)
    rows = sampled.slots
    received = slots.num_received[rows]
    positions = received - slots.prompt_len[rows]
    slots.tokens[rows, received] = sampled.tokens
    received += 1
    slots.num_received[rows] = received
    run = _count_computed(worker, step)
    if len(late):
        slots.num_computed[late] = slots.num_received[late] - 1  # its last one is computed again
        worker.correct_lengths(late)
    _seal_full(worker, run)
    out.add_tokens(slots, rows, positions, sampled.tokens, None, sampled.logprobs)
    worker.counters.generation_tokens += len(rows)
    over = sampled.may_end | (received >= slots.max_len[rows])
    if over.any():
        for i in ints(np.flatnonzero(over)):
            _end_if_over(worker, Slot(int(rows[i])), int(sampled.tokens[i]), ended)


def _most(sampled: SampledRows) -> int:
    """Tokens that a row brings."""
    return int(sampled.counts.max(initial=0)) if sampled.counts is not None else 1


def _end_if_over(worker: WorkerState, slot: Slot, token: int, ended: Ended) -> None:
    request = worker.slots.request_in(slot)
    output_len = int(worker.slots.num_received[slot]) - len(request.prompt)
    finish = request.finish_at(token, output_len, worker.slots.eos)
    if finish is not None:
        ended(request, *finish)


def _record(
    worker: WorkerState,
    step: InFlightStep,
    sampled: SampledRows,
    counts: I32,
    out: Outgoing,
    ended: Ended,
) -> None:
    """Row i brings `counts[i]` tokens. What follows the token that ends a request is dropped."""
    slots = worker.slots
    rows = sampled.slots
    positions = slots.num_received[rows] - slots.prompt_len[rows]
    taken, finishes = _take(slots, sampled, counts)

    run = _count_computed(worker, step)
    # A row without a token computes its last one again; one with several had the others computed
    # beside it. Either way all but the last token are in the cache.
    slots.num_computed[rows] = slots.num_received[rows] - 1
    _seal_full(worker, run)

    kept = _first_tokens_of_rows(counts, taken)
    logprobs = select(sampled.logprobs, kept)
    out.add_tokens(slots, rows, positions, sampled.tokens[kept], taken, logprobs)
    worker.counters.generation_tokens += int(taken.sum())
    for request, finish, stop in finishes:
        ended(request, finish, stop)
    worker.correct_lengths(rows)


def _take(
    slots: Slots, sampled: SampledRows, counts: I32
) -> tuple[I32, list[tuple[Request, Finish, int | None]]]:
    """Note each row's tokens, up to the one that ends its request. Returns how many that were
    [rows], and the ends: request, reason, the stop token if that was it."""
    taken = np.zeros(len(counts), np.int32)
    finishes: list[tuple[Request, Finish, int | None]] = []
    first = 0
    for i, (slot, count) in enumerate(zip(slots_of(sampled.slots), ints(counts), strict=True)):
        request = slots.request_in(slot)
        tokens = ints(sampled.tokens[first : first + count])
        first += count
        received = int(slots.num_received[slot])
        for token in tokens:
            slots.tokens[slot, received] = token
            received += 1
            taken[i] += 1
            finish = request.finish_at(token, received - len(request.prompt), slots.eos)
            if finish is not None:
                finishes.append((request, *finish))
                break
        slots.num_received[slot] = received
    return taken, finishes


def _first_tokens_of_rows(counts: I32, taken: I32) -> Bools:
    """Of the tokens of rows that have `counts[i]`, the first `taken[i]` [tokens]."""
    starts = np.cumsum(counts) - counts
    index_in_row = np.arange(int(counts.sum())) - np.repeat(starts, counts)
    return index_in_row < np.repeat(taken, counts)


def _end_prefilled(worker: WorkerState, step: InFlightStep, ended: Ended) -> None:
    """The prompts of requests that want no token are computed: that was all."""
    for slot in slots_of(step.prefilled):
        request = worker.slots.requests[slot]
        if request is not None and worker.slots.admitted_step[slot] <= step.n:
            ended(request, Finish.LENGTH, None)


def _count_computed(worker: WorkerState, step: InFlightStep) -> I32:
    """The step came back good: the tokens that its rows computed, one each or a chunk, are in the
    cache. Returns the slots that it ran and whose requests are still there."""
    slots = worker.slots
    run = step.run
    counts = step.counts
    if slots.num_vacated != step.num_vacated:
        keep = slots.admitted_step[run] <= step.n
        run = run[keep]
        counts = None if counts is None else counts[keep]
    slots.num_computed[run] += 1 if counts is None else counts
    return run


def _seal_full(worker: WorkerState, rows: I32) -> None:
    """Put the blocks of the slots `rows` that are full by now into the prefix cache."""
    if not worker.kv_cache.prefix_caching:
        return
    slots = worker.slots
    block_size = worker.kv_cache.block_size
    num_full = slots.num_computed[rows] // block_size
    filled = num_full > slots.num_sealed[rows]
    if not filled.any():
        return
    rows = rows[filled]
    first = slots.num_sealed[rows]
    last = num_full[filled]
    slots.num_sealed[rows] = last
    for slot, begin, end in zip(slots_of(rows), ints(first), ints(last), strict=True):
        request = slots.request_in(slot)
        if len(request.chain) < end:
            request.extend_chain(block_size, slots.tokens[slot, : end * block_size])
        worker.kv_cache.seal(request, begin, end)
