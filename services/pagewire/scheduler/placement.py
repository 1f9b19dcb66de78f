"""Who goes next and where: the queue of waiting requests, the choice of a worker, and refusals that
depend on the workers there are.

Knows workers by what they can hold; knows neither messages nor steps.
"""

import heapq
from collections.abc import Sequence
from typing import Final

from pagewire_protocol.columns import BlockId

from pagewire.config import SchedulerConfig

from .queue_rate import QueueRate
from .request import Phase, Refusal, Request, token_outside_vocabulary
from .worker_state import WorkerState

AFFINITY_SLACK: Final = 32
"""A worker with this many requests more than the least loaded one is not preferred for its cache:
one popular prefix must not draw every request to one worker while others idle."""

ADVICE: Final = "shorten the prompt or lower max_tokens"


class Queue:
    """Waiting requests, lower `priority` first, then in order of arrival; a preempted one is older
    than all that never ran."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self.count = 0
        self.tokens = 0

    def push(self, request: Request) -> None:
        """`request` waits."""
        heapq.heappush(self._heap, (*request.order, request))
        self._count(request, 1)

    def head(self) -> Request | None:
        """Whose turn it is; None when nobody waits."""
        while self._heap and self._heap[0][2].phase is not Phase.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        """Take the head out."""
        self._count(heapq.heappop(self._heap)[2], -1)

    def forget(self, request: Request) -> None:
        """`request`, which waits, has ended: its entry is skipped when it comes up."""
        self._count(request, -1)
        if len(self._heap) > 64 and len(self._heap) > 2 * self.count:
            self._heap = [
                entry
                for entry in self._heap
                if entry[2].phase is Phase.WAITING and entry[2] is not request
            ]
            heapq.heapify(self._heap)

    def _count(self, request: Request, sign: int) -> None:
        self.count += sign
        self.tokens += sign * len(request.tokens)

    def waiting(self) -> list[Request]:
        """All that wait, in order."""
        return [
            entry[2]
            for entry in sorted(self._heap, key=lambda e: e[:2])
            if entry[2].phase is Phase.WAITING
        ]


def choose(
    request: Request, workers: Sequence[WorkerState]
) -> tuple[WorkerState, list[BlockId]] | None:
    """The worker for `request` and the blocks it has of it already: the longest cached prefix, then
    the least load. None when it must wait.

    A request waits while blocks that it could share are being computed; those behind it lose
    nothing: that prefill goes before theirs. A worker takes new requests only while its unstarted
    prefill is less than a step's worth, so that late arrivals of higher priority and prefixes that
    are just being computed are still considered."""
    ready = [worker for worker in workers if _takes(worker, request)]
    if request.leaves is not None:
        ready = [worker for worker in ready if worker.incarnation != request.leaves] or ready
    if not ready:
        return None
    least_load = min(worker.load for worker in ready)
    best: tuple[WorkerState, list[BlockId]] | None = None
    best_score = (0, 0)
    for worker in ready:
        cached = worker.kv_cache.cached_blocks(request)
        if not worker.has_room(request, cached):
            continue
        near = worker.load - least_load <= AFFINITY_SLACK
        saved = len(cached) * worker.kv_cache.block_size if near else 0
        score = (-saved, worker.load)
        if best is None or score < best_score:
            best = worker, cached
            best_score = score
    if best is None and request.leaves is not None:
        # The others have no room for it after all.
        request.leaves = None
        return choose(request, workers)
    if best is None:
        return None
    worker, cached = best
    return None if worker.kv_cache.is_being_computed(request, cached) else best


def _takes(worker: WorkerState, request: Request) -> bool:
    """Whether `worker` considers `request` now, if it has the blocks for it."""
    return (
        worker.accepting
        and worker.holds(request)
        and bool(worker.slots.free)
        and worker.pending_prefill_tokens() < worker.estimator.step_tokens
    )


def unservable(request: Request, workers: Sequence[WorkerState]) -> Refusal | None:
    """Why no worker could ever run `request`, with the arithmetic; None when one could. `workers`
    are the ready ones, at least one."""
    prompt = len(request.prompt)
    max_tokens = request.sampling.max_tokens
    wanted = f"{prompt} prompt tokens and max_tokens {max_tokens} make {prompt + max_tokens}"
    context = min(worker.facts.max_model_len for worker in workers)
    if request.max_len > context:
        return Refusal(
            400,
            f"{wanted}, which is more than the context of {context} tokens; {ADVICE}",
            "max_tokens",
        )
    largest = max((worker.kv_cache for worker in workers), key=lambda cache: cache.max_tokens)
    if request.max_len > largest.max_tokens:
        total = largest.pool.total
        holds = f"{total} blocks of {largest.block_size} = {largest.max_tokens} tokens"
        return Refusal(
            400, f"{wanted}, which is more than the KV cache of {holds}; {ADVICE}", "max_tokens"
        )
    return token_outside_vocabulary(request, min(worker.facts.vocab_size for worker in workers))


def overload(
    request: Request, queue: Queue, config: SchedulerConfig, rate: QueueRate, step_tokens: int
) -> Refusal | None:
    """A full queue refuses first attempts only: later ones belong to clients that are being served
    already. `step_tokens`: most tokens of a step, of which some ten a second are assumed as long as
    `rate` has measured nothing."""
    if request.attempt > 1 or queue.count == 0:
        return None
    size = len(request.tokens)
    if queue.count < config.max_queued_reqs and queue.tokens + size <= config.max_queued_tokens:
        return None
    retry = rate.wait_s(queue.count, queue.tokens)
    if retry is None:
        retry = min(60, 1 + queue.tokens // (10 * step_tokens))
    return Refusal(
        429,
        f"the queue is full: {queue.count} requests with {queue.tokens} tokens wait (limits {config.max_queued_reqs} and "
        f"{config.max_queued_tokens}) and this one has {size}; try again in {retry} s",
        retry_after_s=retry,
    )
