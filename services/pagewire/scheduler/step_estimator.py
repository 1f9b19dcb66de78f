"""How long one worker's steps take, by the costs that it measured at its start: how much prefill
fits into a step, and how many steps are sent ahead of their results. Knows tokens and milliseconds;
knows neither requests nor blocks.
"""

from collections import deque
from itertools import islice
from math import inf, sqrt
from typing import Final, NamedTuple

from pagewire_protocol.messages import StepCost

from pagewire.config import SchedulerConfig

UNWATCHED: Final = 4.0
"""A step without decodes may take this many times --max-step-ms: nobody's next token waits for it,
only newcomers do."""
PRESSED: Final = 2.0
PRESSED_MS: Final = 1000.0
"""While prompts wait that would take longer than this by themselves, and more than half as many
as decode, steps may take so many times
--max-step-ms: for so many, over a second until the first token is worse than an uneven stream
  for the others."""
LEAST_CHUNK: Final = 64
"""Prefill tokens that every step may hold whatever its decodes take, so that prompts always come
forward."""
LEAST_AHEAD: Final = 2
"""Steps in flight where nobody would gain from waiting: the next one is there when a worker has
finished one."""
AHEAD_MS: Final = 4.0
"""Otherwise the next step is sent when those in flight are about to be over in so many
milliseconds, which on a quiet host is ample for hearing of the last one, for making this one, its
way to the worker and its launch, also of 256 rows with grammars (with 2.5 a GPU waited in between);
not earlier, since who arrives meanwhile would wait for it as well."""
MOST_AHEAD_MS: Final = 8.0
"""Where steps have reached a worker too late, as on a host whose processors are busy."""
LATE_MS: Final = 0.5
"""So much earlier steps are sent for each that came too late; the next hundred of those that came
in time take half a millisecond back, so that one step in a hundred or so may be late."""
IN_TIME_MS: Final = 0.005
SURE: Final = 0.8
"""Of an estimate, what a step takes at least: a worker that has finished early is idle until the
scheduler has heard of it."""
OUTLIER: Final = 4.0
"""A step that took this many times its estimate was held up by something else; more is not
believed."""
MOST_CORRECTION: Final = 2.0
SLOWNESS: Final = 32
"""Full steps after which the correction of steps with prefill has covered two thirds of its way."""
RECENT: Final = 16
"""Steps over which `step_ms` is averaged, about; and after which the correction of other steps has
covered two thirds of its way."""


def decodes_ms(cost: StepCost, rows: int, reads: int) -> float:
    """Time of a step of `rows` decodes that attend to `reads` tokens together, in milliseconds."""
    return cost.fixed_ms + rows * cost.token_ms + reads * cost.ms_per_m_kv_tokens / 1e6


def chunk_ms(cost: StepCost, context: int, tokens: int) -> float:
    """What a chunk of `tokens` new tokens after `context` computed ones adds to a step, in
    milliseconds."""
    if tokens == 1:
        return cost.token_ms + (context + 1) * cost.ms_per_m_kv_tokens / 1e6
    return (
        tokens * cost.token_ms
        + tokens * (context + (tokens + 1) / 2) * cost.ms_per_m_prefill_pairs / 1e6
    )


def longest_chunk(cost: StepCost, ms: float, context: int) -> float:
    """Tokens, not rounded, of the chunk that takes `ms` milliseconds after `context` computed
    tokens; inf when nothing limits it.

    The positive root of pair/2 c^2 + (token + pair (context + 1/2)) c = ms, in the form that
    divides by no zero when pair is 0."""
    if ms <= 0 or ms == inf:
        return max(0.0, ms)
    pair = cost.ms_per_m_prefill_pairs / 1e6
    slope = cost.token_ms + pair * (context + 0.5)
    divisor = slope + sqrt(slope * slope + 2 * pair * ms)
    return 2 * ms / divisor if divisor else inf


class SentStep(NamedTuple):
    """A step in flight: sent at `at` (monotonic seconds), estimated to take `ms`; `mixed`: with
    prefill."""

    n: int
    ms: float
    at: float
    mixed: bool


class Waiting(NamedTuple):
    """One worker's share of the requests that have no place yet, and of their tokens."""

    requests: float
    tokens: float


NO_WAITING: Final = Waiting(0, 0)


class StepEstimator:
    """Estimates for one worker's steps, and what became of them. Without `cost` nothing is limited
    by time. reserved: most tokens of a step that the worker has memory for; 0: it has said
    nothing. stages: of a pipeline, each of which computes a step of its own; one more step waits
    before the first of them."""

    def __init__(
        self,
        cost: StepCost | None,
        config: SchedulerConfig,
        reserved: int = 0,
        stages: int = 1,
    ) -> None:
        self.measured = cost is not None
        self.cost = cost or StepCost(0, 0, 0)
        usual = config.step_tokens(gpu=cost is not None)
        self.step_tokens = min(reserved, config.max_num_batched_tokens or reserved) or usual
        self._limit_ms = config.max_step_ms if self.measured and config.max_step_ms else inf
        self._most = (
            config.steps_in_flight if self.measured else min(LEAST_AHEAD, config.steps_in_flight)
        )
        self._stages = stages
        if stages > 1:
            self._most = max(self._most, stages + 1)
        self._sent: deque[SentStep] = deque()
        self._last = -inf
        self.ratio = 1.0
        """Measured time of steps with prefill over their estimate, lately."""
        self.decode_ratio = 1.0
        """The same of the others. It serves to send steps in time: rows that share what they read,
        or small models, take much less than the costs say. That they take more counts for nothing:
        part of it may be that the worker had to wait for them."""
        self.step_ms = 0.0
        """Measured time of a step, lately."""
        self.ahead_ms = AHEAD_MS
        """How long before the steps in flight are over the next one is sent."""

    def limit_ms(self, decodes: int, waiting: Waiting = NO_WAITING) -> float:
        """Most that a step with this many decodes may be estimated to take."""
        pressed = (
            2 * waiting.requests > decodes and waiting.tokens * self.cost.token_ms > PRESSED_MS
        )
        return (
            self._limit_ms
            * (UNWATCHED if not decodes else PRESSED if pressed else 1.0)
            / self.ratio
        )

    def chunk(self, limit_ms: float, ms: float, context: int) -> float:
        """Tokens that may be added after `context` ones to a step of `ms` milliseconds, not
        rounded."""
        return longest_chunk(self.cost, limit_ms - ms, context)

    def due(self, pending_tokens: float = 0.0) -> float:
        """When one more step is to be sent, in monotonic seconds; inf while only a result can
        change that. pending_tokens: prefill tokens that no step has yet; where they fill the next
        step, or nothing but throughput counts, no newcomer would be in it."""
        sent = self._sent
        if len(sent) < self._stages:
            return -inf
        if len(sent) >= self._most:
            return inf
        full = (
            pending_tokens >= self.step_tokens
            or pending_tokens * self.cost.token_ms * self.ratio >= self._limit_ms
        )
        later = self._stages - 1
        if len(sent) < LEAST_AHEAD + later and (full or self._limit_ms == inf):
            return -inf
        # What later stages compute keeps nobody waiting for the first one.
        before = islice(sent, later, None)
        least_ms = SURE * sum([step.ms * self._ratio_of(step.mixed) for step in before])
        return max(sent[0].at, self._last) + (least_ms - self.ahead_ms) / 1000

    def sent(self, n: int, ms: float, now: float, mixed: bool) -> None:
        """Step `n`, estimated to take `ms` milliseconds, is sent now; `mixed`: with prefill."""
        self._sent.append(SentStep(n, ms, now, mixed))

    def reached(self, n: int, starved: bool) -> bool:
        """The result of step `n` is there, `returned` will hear of it; starved: the worker had
        nothing left to compute when it got this step. Returns whether it was sent too late: to a
        worker that was still busy then."""
        step = next((step for step in self._sent if step.n == n), None)
        if step is None or (step is self._sent[0] and step.at >= self._last):
            return False
        earlier_ms = LATE_MS if starved else -IN_TIME_MS
        self.ahead_ms = min(MOST_AHEAD_MS, max(AHEAD_MS, self.ahead_ms + earlier_ms))
        return starved

    def returned(self, n: int, now: float) -> None:
        """The results of all steps up to `n` are there. A step began when it was sent or the one
        before it ended, whichever was later."""
        sent = self._sent
        if not sent or sent[0].n > n:
            return
        began = max(sent[0].at, self._last)
        waited_for_others = sent[0].at <= self._last
        steps = 0
        ms = 0.0
        mixed = False
        while sent and sent[0].n <= n:
            step = sent.popleft()
            steps += 1
            ms += step.ms
            mixed = mixed or step.mixed
        took = 1000 * (now - began)
        self.step_ms += (took / steps - self.step_ms) / (RECENT if self.step_ms else 1)
        if ms and waited_for_others:
            self._learn(took, ms, mixed)
        self._last = now

    def _ratio_of(self, mixed: bool) -> float:
        """What an estimate is to be multiplied by."""
        return self.ratio if mixed else min(1.0, self.decode_ratio)

    def _learn(self, took: float, ms: float, mixed: bool) -> None:
        """From steps that waited for others only, since the way to an idle worker is no part of a
        step. With prefill, large ones teach more: what is learned serves to cut prefill."""
        weight = min(1.0, ms / self._limit_ms) / SLOWNESS if mixed else 1 / RECENT
        before = self.ratio if mixed else self.decode_ratio
        ratio = before + (min(took / ms, OUTLIER) - before) * weight
        ratio = min(MOST_CORRECTION, max(1 / MOST_CORRECTION, ratio))
        if mixed:
            self.ratio = ratio
        else:
            self.decode_ratio = ratio
