"""Who goes next and where: the queue of waiting requests, the choice of a worker, and refusals that
depend on the workers there are.

Knows replicas by what they can hold; knows neither messages nor steps.
"""

import heapq
from collections.abc import Sequence
from typing import Final

from pagewire.config import SchedulerConfig

from .request import Phase, Refusal, Request, foreign_token
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
        heapq.heappush(self._heap, (*request.order, request))
        self._counted(request, 1)

    def head(self) -> Request | None:
        while self._heap and self._heap[0][2].phase is not Phase.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        """Take the head out."""
        self._counted(heapq.heappop(self._heap)[2], -1)

    def forget(self, request: Request) -> None:
        """`request`, which waits, has ended: its entry is skipped when it comes up."""
        self._counted(request, -1)
        if len(self._heap) > 64 and len(self._heap) > 2 * self.count:
            self._heap = [
                entry
                for entry in self._heap
                if entry[2].phase is Phase.WAITING and entry[2] is not request
            ]
            heapq.heapify(self._heap)

    def _counted(self, request: Request, sign: int) -> None:
        self.count += sign
        self.tokens += sign * len(request.tokens)

    def waiting(self) -> list[Request]:
        return [
            entry[2]
            for entry in sorted(self._heap, key=lambda e: e[:2])
            if entry[2].phase is Phase.WAITING
        ]


def choose(
    request: Request, replicas: Sequence[WorkerState]
) -> tuple[WorkerState, list[int]] | None:
    """The worker for `request` and the blocks it has of it already: the longest cached prefix, then
    the least load. None when it must wait.

    A request waits while blocks that it could share are being computed; those behind it lose
    nothing: that prefill goes before theirs. A worker takes new requests only while its unstarted
    prefill is less than a step's worth, so that late arrivals of higher priority and prefixes that
    are just being computed are still considered."""
    ready = [
        r
        for r in replicas
        if r.accepting and holds(r, request) and r.slots.free and r.backlog() < r.pace.step_tokens
    ]
    if not ready:
        return None
    lightest = min(r.load for r in ready)
    scored: list[tuple[int, int, WorkerState, list[int]]] = []
    for replica in ready:
        cached = replica.cached_blocks(request)
        if replica.has_room(request, cached):
            near = replica.load - lightest <= AFFINITY_SLACK
            scored.append(
                (-len(cached) * replica.block_size if near else 0, replica.load, replica, cached)
            )
    if not scored:
        return None
    _, _, replica, cached = min(scored, key=lambda entry: entry[:2])
    return None if replica.is_computing(request, cached) else (replica, cached)


def holds(replica: WorkerState, request: Request) -> bool:
    return request.longest <= min(replica.capacity, replica.facts.max_model_len)


def unservable(request: Request, replicas: Sequence[WorkerState]) -> Refusal | None:
    """Why no worker could ever run `request`, with the arithmetic; None when one could. `replicas`
    are the ready ones, at least one."""
    prompt, more = len(request.prompt), request.sampling.max_tokens
    asked = f"{prompt} prompt tokens and max_tokens {more} make {prompt + more}"
    context = min(r.facts.max_model_len for r in replicas)
    if request.longest > context:
        return Refusal(
            400,
            f"{asked}, which is more than the context of {context} tokens; {ADVICE}",
            "max_tokens",
        )
    largest = max(replicas, key=lambda r: r.capacity)
    if request.longest > largest.capacity:
        has = (
            f"{largest.facts.num_blocks} blocks of {largest.block_size} = {largest.capacity} tokens"
        )
        return Refusal(
            400, f"{asked}, which is more than the KV cache of {has}; {ADVICE}", "max_tokens"
        )
    return foreign_token(request, min(r.facts.vocab_size for r in replicas))


def overload(
    request: Request, queue: Queue, config: SchedulerConfig, step_tokens: int
) -> Refusal | None:
    """A full queue refuses first attempts only: later ones belong to clients that are being served
    already. `step_tokens`: most tokens of a step, of which some ten a second are assumed."""
    if request.attempt > 1 or queue.count == 0:
        return None
    size = len(request.tokens)
    if queue.count < config.max_queued_reqs and queue.tokens + size <= config.max_queued_tokens:
        return None
    retry = min(60, 1 + queue.tokens // (10 * step_tokens))
    return Refusal(
        429,
        f"the queue is full: {queue.count} requests with {queue.tokens} tokens wait (limits {config.max_queued_reqs} and "
        f"{config.max_queued_tokens}) and this one has {size}; try again in {retry} s",
        retry_after_s=retry,
    )
