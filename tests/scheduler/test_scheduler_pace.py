"""Steps filled to a time: the arithmetic of estimates, what a long prompt does to running decodes,
how many steps are sent ahead."""

from collections import deque
from math import ceil, inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire.config import SchedulerConfig
from pagewire.scheduler import batch, loop, step_estimator
from pagewire.scheduler.state import Scheduler, Tick
from pagewire.scheduler.step_estimator import (
    StepEstimator,
    Waiting,
    chunk_ms,
    decodes_ms,
    longest_chunk,
)
from pagewire_protocol.channels import Outbox
from pagewire_protocol.messages import (
    Heartbeat,
    Hello,
    Peer,
    Role,
    Step,
    StepCost,
    StepResult,
    Submit,
    WorkerFacts,
)
from pagewire_protocol.sampling import Sampling
from scheduler.scheduler_sim import QUICK, SLOW, World, ints

LARGE = StepCost(4.0, 0.012, 1.1, 32.0)
"""About a model of 8 billion parameters on a large GPU."""
BLOCK = 16


@pytest.fixture(autouse=True)
def least_chunk(monkeypatch):
    """The other tests here use a smaller one."""
    monkeypatch.setattr(batch, "LEAST_CHUNK", step_estimator.LEAST_CHUNK)


# --- arithmetic
#   -------------------------------------------------------------------------------------------------------


def test_estimates_count_rows_reads_and_pairs():
    cost = StepCost(2.0, 0.5, 1000.0, 3000.0)
    assert decodes_ms(cost, 0, 0) == 2.0
    assert decodes_ms(cost, 3, 2000) == pytest.approx(2 + 1.5 + 6)
    pairs = sum(100 + i + 1 for i in range(7))
    assert chunk_ms(cost, 100, 7) == pytest.approx(3.5 + pairs / 1000)
    assert chunk_ms(cost, 99, 1) == pytest.approx(0.5 + 0.3)
    assert decodes_ms(cost, 2, 300) == pytest.approx(
        2.0 + chunk_ms(cost, 99, 1) + chunk_ms(cost, 199, 1)
    )


@given(
    token=st.sampled_from([0.0, 1e-4, 0.012, 2.0]),
    megapair=st.sampled_from([0.0, 0.01, 1.1, 5e3]),
    ms=st.floats(0.01, 1e3),
    context=st.integers(0, 200_000),
)
def test_the_longest_chunk_is_the_longest(token, megapair, ms, context):
    cost = StepCost(1.0, token, megapair, 0.0)
    length = longest_chunk(cost, ms, context)
    if token == megapair == 0:
        assert length == inf
        return
    pairs = length * (context + (length + 1) / 2)
    assert length * token + pairs * megapair / 1e6 == pytest.approx(ms)


def test_no_time_is_no_chunk_and_endless_time_any():
    assert longest_chunk(LARGE, 0.0, 5) == longest_chunk(LARGE, -3.0, 5) == 0
    assert longest_chunk(LARGE, inf, 5) == inf


def test_the_most_tokens_of_a_step_are_the_flag_or_the_workers():
    assert [SchedulerConfig().step_tokens(gpu) for gpu in (False, True)] == [2048, 8192]
    assert SchedulerConfig(max_step_ms=0).step_tokens(True, stages=2) == 8192
    assert [SchedulerConfig(max_step_ms=0).step_tokens(gpu) for gpu in (False, True)] == [
        2048,
        16_384,
    ]
    assert {
        SchedulerConfig(max_num_batched_tokens=77).step_tokens(gpu) for gpu in (False, True)
    } == {77}
    assert (
        StepEstimator(None, SchedulerConfig()).step_tokens,
        StepEstimator(LARGE, SchedulerConfig()).step_tokens,
    ) == (2048, 8192)


def test_steps_are_no_larger_than_what_the_worker_has_memory_for():
    """It knows its GPU; what was asked for counts where it is less."""
    small = 24 << 30
    assert [SchedulerConfig(max_step_ms=ms).step_tokens(True, small) for ms in (25, 0)] == [
        2048,
        2048,
    ]
    assert SchedulerConfig(max_num_batched_tokens=77).step_tokens(True, small) == 77
    for reserved, asked, most in (
        (2048, 0, 2048),
        (2048, 512, 512),
        (2048, 4096, 2048),
        (0, 0, 8192),
        (0, 512, 512),
        (16_384, 0, 16_384),
    ):
        assert (
            StepEstimator(
                LARGE, SchedulerConfig(max_num_batched_tokens=asked), reserved
            ).step_tokens
            == most
        )


@pytest.mark.parametrize(
    ("cost", "max_step_ms", "watched", "unwatched"),
    [(LARGE, 25, 25, 100), (LARGE, 10, 10, 40), (LARGE, 0, inf, inf), (None, 25, inf, inf)],
)
def test_limits_of_a_step(cost, max_step_ms, watched, unwatched):
    made = StepEstimator(cost, SchedulerConfig(max_step_ms=max_step_ms))
    assert (made.limit_ms(1), made.limit_ms(0)) == (watched, unwatched)


def test_steps_take_longer_while_many_wait_and_for_over_a_second():
    made = StepEstimator(StepCost(1, 0.01, 0), SchedulerConfig())
    most = 1000 / 0.01
    limits = [
        made.limit_ms(20, Waiting(n, tokens))
        for n, tokens in ((11, most + 1), (10, most + 1), (11, most))
    ]
    assert limits == [50, 25, 25]
    assert made.limit_ms(0, Waiting(11, most + 1)) == 100
    assert StepEstimator(None, SchedulerConfig()).limit_ms(1, Waiting(11, 10 * most)) == inf


def test_a_crowd_is_let_in_by_longer_steps():
    line = decoding(LARGE, 16, blocks=40_000)
    for _ in range(100):
        line.submit(4_000, 100)
    times = [line.ms(step) for step in line.run(100)]
    assert 45 < max(times[5:]) <= 50


@pytest.mark.parametrize(
    ("ms", "ahead"),
    [(0.0, 4), (0.1, 4), (1.6, 4), (1.7, 3), (2.4, 3), (2.6, 2), (4.9, 2), (5.1, 1), (50.0, 1)],
)
def test_short_steps_are_sent_ahead_in_greater_number(ms, ahead):
    assert fill(StepEstimator(LARGE, SchedulerConfig()), ms) == ahead


def fill(made, ms, now=0.0):
    count = 0
    while made.due() <= now:
        count += 1
        made.sent(count, ms, now, False)
        assert count < 10
    return count


def test_the_flag_is_the_most_steps_ahead_and_two_are_all_without_costs():
    assert [
        fill(StepEstimator(QUICK, SchedulerConfig(steps_in_flight=n)), 0.1) for n in (1, 2, 3, 8)
    ] == [
        1,
        2,
        3,
        8,
    ]
    assert [
        fill(StepEstimator(None, SchedulerConfig(steps_in_flight=n)), 0.0) for n in (1, 2, 3, 8)
    ] == [
        1,
        2,
        2,
        2,
    ]


def test_the_next_step_is_sent_when_the_ones_in_flight_are_nearly_over():
    made = StepEstimator(LARGE, SchedulerConfig())
    assert made.due() == -inf
    made.sent(1, 25.0, 10.0, True)
    assert made.due() == pytest.approx(10.0 + (0.8 * 25 - 4) / 1000)
    made.sent(2, 10.0, 10.0175, True)
    assert made.due() == pytest.approx(10.0 + (0.8 * 35 - 4) / 1000)
    made.returned(1, 10.024)
    assert made.due() == pytest.approx(10.024 + (0.8 * 10 - 4) / 1000)
    made.returned(2, 10.034)
    assert made.due() == -inf
    full = StepEstimator(LARGE, SchedulerConfig(steps_in_flight=1))
    full.sent(1, 0.0, 10.0, False)
    assert full.due() == inf


def test_nothing_is_waited_for_that_would_not_be_in_the_next_step():
    made = StepEstimator(LARGE, SchedulerConfig())
    made.sent(1, 25.0, 10.0, True)
    enough = 25 / LARGE.token_ms
    assert made.due(enough - 1) > 10 and made.due(enough + 1) == -inf
    made.ratio = 2.0
    assert made.due(enough / 2 + 1) == -inf
    made.sent(2, 25.0, 10.0, True)
    assert made.due(enough) > 10.02
    offline = StepEstimator(LARGE, SchedulerConfig(max_step_ms=0))
    offline.sent(1, 100.0, 10.0, True)
    assert offline.due() == -inf
    offline.sent(2, 100.0, 10.0, True)
    assert offline.due() == pytest.approx(10.156)


def test_a_long_step_counts_with_its_time_and_no_more_when_it_has_returned():
    made = StepEstimator(LARGE, SchedulerConfig())
    made.sent(1, 80.0, 0.0, True)
    made.sent(2, 0.5, 0.0, False)
    assert made.due() == pytest.approx((0.8 * 80.5 - 4) / 1000)
    made.returned(1, 0.08)
    assert fill(made, 0.5, 0.08) == 3


def test_what_steps_with_prefill_take_of_their_estimate_counts():
    made = StepEstimator(LARGE, SchedulerConfig())
    made.ratio = 1.5
    made.sent(1, 20.0, 0.0, True)
    assert made.due() == pytest.approx((0.8 * 30 - 4) / 1000)
    made.sent(2, 20.0, 0.0, False)
    assert made.due() == pytest.approx((0.8 * 50 - 4) / 1000)


# --- estimates and what became of them
#   --------------------------------------------------------------------------------


def run_steps(made, steps, ms, took, mixed=True, start=0, now=0.0, ahead=2):
    """Steps one after the other, each sent while the one before it runs; returns the number of the
    last and the time."""
    n = start
    for _ in range(ahead):
        n += 1
        made.sent(n, ms, now, mixed)
    for _ in range(steps):
        now += took / 1000
        made.returned(n - ahead + 1, now)
        n += 1
        made.sent(n, ms, now, mixed)
    made.returned(n, now + ahead * took / 1000)
    return n, now + ahead * took / 1000


@pytest.mark.parametrize(
    ("took", "ratio"), [(20.0, 1.0), (30.0, 1.5), (90.0, 2.0), (15.0, 0.75), (2.0, 0.5)]
)
def test_the_ratio_follows_the_measured_time_within_bounds(took, ratio):
    made = StepEstimator(LARGE, SchedulerConfig(max_step_ms=20))
    run_steps(made, 300, 20.0, took)
    assert made.ratio == pytest.approx(ratio, rel=0.01) and made.step_ms == pytest.approx(
        took, rel=0.01
    )
    assert made.limit_ms(1) == pytest.approx(20 / made.ratio) and made.limit_ms(0) == pytest.approx(
        80 / made.ratio
    )


def test_the_ratio_moves_slowly():
    made = StepEstimator(LARGE, SchedulerConfig(max_step_ms=20))
    run_steps(made, 1, 20.0, 60_000.0)
    assert 1.0 < made.ratio < 1.3


@pytest.mark.parametrize(
    ("mixed", "ms", "ahead", "gap"),
    [(False, 20.0, 2, 0.0), (True, 0.0, 2, 0.0), (True, 20.0, 1, 0.5)],
    ids=["decodes alone", "estimated to take no time", "sent to an idle worker"],
)
def test_other_steps_teach_nothing_about_prefill(mixed, ms, ahead, gap):
    made = StepEstimator(LARGE, SchedulerConfig(max_step_ms=20))
    n, now = 0, 0.0
    for _ in range(40):
        if gap:
            made.sent(n := n + 1, ms, now + gap, mixed)
            made.returned(n, now := now + gap + 0.03)
        else:
            n, now = run_steps(made, 1, ms, 30.0, mixed, n, now + 1.0, ahead)
    assert made.ratio == 1.0 and made.step_ms == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("took", "ratio"), [(20.0, 1.0), (30.0, 1.5), (90.0, 2.0), (14.0, 0.7), (2.0, 0.5)]
)
def test_steps_of_decodes_are_sent_by_what_such_steps_have_taken(took, ratio):
    made = StepEstimator(LARGE, SchedulerConfig())
    n, now = run_steps(made, 100, 20.0, took, mixed=False)
    assert made.decode_ratio == pytest.approx(ratio, rel=0.01) and made.ratio == 1.0
    counts = min(1.0, ratio)  # more may be the worker's waiting for what was sent too late
    made.sent(n + 1, 20.0, now + 1, False)
    assert made.due() == pytest.approx(now + 1 + (0.8 * 20 * counts - 4) / 1000, abs=1e-4)
    made.sent(n + 2, 20.0, now + 1, True)
    assert made.due() == pytest.approx(now + 1 + (0.8 * 20 * (counts + 1) - 4) / 1000, abs=1e-4)
    assert made.limit_ms(1) == SchedulerConfig().max_step_ms


def test_one_step_that_was_held_up_teaches_little():
    made = StepEstimator(LARGE, SchedulerConfig())
    n, now = run_steps(made, 100, 3.0, 3.0, mixed=False)
    run_steps(made, 1, 3.0, 60_000.0, mixed=False, start=n, now=now)
    assert 1.0 < made.decode_ratio < 1.6


# --- steps that come too late
#   -----------------------------------------------------------------------------------


def play(made, steps, took, there, back, start=0):
    """Decode steps of `took` ms, with ms from the scheduler to the worker and back; the first one is
    step `start` + 1. Returns the time of a step in ms, in the second half of them."""
    n, now, end = start, 10.0 + start, -inf
    results, ends = deque(), []
    while len(ends) < steps:
        while n < start + steps and made.due() <= now:
            made.sent(n := n + 1, took, now, False)
            arrives = now + there / 1000
            starved = arrives >= end > -inf
            end = max(arrives, end) + took / 1000
            results.append((end + back / 1000, n, starved))
        due = made.due() if n < start + steps else inf
        if due < results[0][0]:
            now = due
            continue
        now, first, starved = results.popleft()
        made.reached(first, starved)
        made.returned(first, now)
        ends.append(now)
    half = ends[len(ends) // 2 :]
    return 1000 * (half[-1] - half[0]) / (len(half) - 1)


@pytest.mark.parametrize(("there", "back"), [(4.0, 3.0), (1.0, 6.0), (6.0, 0.3)])
def test_steps_are_sent_earlier_where_the_way_is_slow(there, back, monkeypatch):
    made = StepEstimator(LARGE, SchedulerConfig())
    assert play(made, 2000, 2.85, there, back) < 2.90
    assert 4.0 < made.ahead_ms <= 8.0
    monkeypatch.setattr(step_estimator, "MOST_AHEAD_MS", 4.0)
    assert play(StepEstimator(LARGE, SchedulerConfig()), 2000, 2.85, there, back) > 2.95


@pytest.mark.parametrize("took", [0.7, 2.85, 9.0, 25.0])
def test_they_are_not_where_they_come_in_time(took):
    made = StepEstimator(LARGE, SchedulerConfig())
    assert play(made, 500, took, 0.3, 0.3) == pytest.approx(took, rel=0.01)
    assert made.ahead_ms == 4.0


def test_how_much_earlier_is_bounded_and_forgotten():
    made = StepEstimator(LARGE, SchedulerConfig())
    play(made, 300, 2.85, 20.0, 20.0)
    assert made.ahead_ms == 8.0
    play(made, 1000, 2.85, 0.1, 0.1, start=300)
    assert made.ahead_ms == 4.0


def test_a_step_that_was_sent_to_an_idle_worker_is_not_late():
    made = StepEstimator(LARGE, SchedulerConfig())
    assert not made.reached(1, True)  # nobody knows it
    made.sent(1, 3.0, 10.0, False)
    assert not made.reached(1, True)
    made.returned(1, 10.003)
    made.sent(2, 3.0, 10.003, False)
    assert not made.reached(2, True)
    made.sent(3, 3.0, 10.004, False)
    assert made.ahead_ms == 4.0
    assert made.reached(3, True) and made.ahead_ms == 4.5
    made.returned(2, 10.006)
    assert made.reached(3, True) and made.ahead_ms == 5.0
    assert not made.reached(3, False) and made.ahead_ms < 5.0


# --- whole steps
#   ------------------------------------------------------------------------------------------------------


class Line:
    """A scheduler and one worker that takes as long as its costs say, times `slower`. `rows` has
    (slot, context, tokens) of each step."""

    def __init__(self, cost, slower=1.0, blocks=20_000, **config):
        self.cost, self.slower, self.now = cost, slower, 1.0
        self.starved = False
        self.steps = []
        self.scheduler = Scheduler(1, SchedulerConfig(**config), self.receive, lambda inbox: None)
        self.rows, self.times, self.ahead = [], [], []
        self.known, self.computed, self._last = {}, {}, []
        self._requests = 0
        self.handle(Tick(self.now))
        facts = WorkerFacts(blocks, BLOCK, 256, 200_000, 1000, (), "line", False, cost)
        self.handle(Hello(Peer(Role.WORKER, "w", "ipc:///w", 7, True), facts))
        self.handle(Hello(Peer(Role.TOKENIZER, "t", "ipc:///t", 8, True)))

    def receive(self, inbox, message):
        if isinstance(message, Step):
            self.steps.append(message)

    def handle(self, event):
        self.scheduler.handle(event)

    def submit(self, prompt, max_tokens):
        self._requests += 1
        tokens = (
            np.random.default_rng(self._requests)
            .integers(0, 1000, prompt)
            .astype(np.int32)
            .tobytes()
        )
        n = self._requests
        self.handle(
            Submit(
                n.to_bytes(16, "big"),
                1,
                n,
                "ipc:///t",
                tokens,
                b"",
                Sampling(seed=0, max_tokens=max_tokens),
            )
        )

    def run(self, steps=10_000):
        """The rows of the steps that were executed; the last one only frees slots when nothing is
        left."""
        first = len(self.rows)
        self.handle(Tick(self.now))
        while self.steps and len(self.rows) < first + steps:
            self.step()
        return self.rows[first:]

    def step(self):
        step = self.steps.pop(0)
        for admission in step.admit:
            self.known[admission.slot], self.computed[admission.slot] = (
                len(admission.prompt) // 4,
                admission.computed,
            )
        self._last = self._last if step.repeat else ints(step.run_slots)
        counts = [1] * len(self._last) if step.repeat else ints(step.run_counts)
        rows = [
            (slot, self.computed[slot], count)
            for slot, count in zip(self._last, counts, strict=True)
        ]
        self.rows.append(rows)
        (worker,) = self.scheduler.engine.workers.values()
        self.times.append(self.slower * self.ms(rows))
        end = self.now + self.times[-1] / 1000
        while (due := self.scheduler.engine.due(self.now)) < end:
            self.now = due
            self.handle(Tick(due))
        self.ahead.append(1 + len(self.steps))
        assert worker.estimator._sent[0].ms == pytest.approx(self.ms(rows) if rows else 0.0), (
            "the estimate is not what the costs say"
        )
        for slot, context, count in rows:
            self.computed[slot] = context + count
        sampled = [slot for slot in self._last if self.computed[slot] == self.known[slot]]
        for slot in sampled:
            self.known[slot] += 1
        self.now = end
        columns = (
            np.array(sampled, np.int32).tobytes(),
            np.full(len(sampled), 5, np.int32).tobytes(),
            bytes(len(sampled)),
        )
        self.handle(StepResult(1, 7, step.n, *columns, starved=self.starved))
        for inbox, incarnation in (("ipc:///w", 7), ("ipc:///t", 8)):
            self.handle(Heartbeat(inbox, incarnation, step.n, True))
        self.handle(Tick(self.now))

    def ms(self, rows):
        return self.cost.fixed_ms + sum(
            chunk_ms(self.cost, context, count) for _, context, count in rows
        )


def decoding(cost, count, prompt=64, **config):
    """A line with `count` running decodes."""
    line = Line(cost, **config)
    for _ in range(count):
        line.submit(prompt, 5000)
    while not line.rows or any(tokens > 1 for _, _, tokens in line.rows[-1]):
        line.run(1)
    line.run(4)
    assert len(line.rows[-1]) == count
    return line


def prefill_of(rows):
    """(step, slot, context, tokens) of the chunks."""
    return [(i, *row) for i, step in enumerate(rows) for row in step if row[2] > 1]


def test_what_a_worker_says_of_its_starving_is_counted_and_sends_steps_earlier():
    line = decoding(StepCost(3.2, 0.0, 0.0, 0.0), 8)
    line.run(20)
    assert line.scheduler.stats()["starved_steps"] == 0 and set(line.ahead[-10:]) == {3}
    line.starved = True
    line.run(20)
    assert line.scheduler.stats()["starved_steps"] == 20 and set(line.ahead[-10:]) == {4}


def test_decodes_get_a_token_in_every_step_while_a_long_prompt_comes_in():
    line = decoding(LARGE, 32)
    line.submit(100_000, 3)
    rows = line.run(400)
    chunks = prefill_of(rows)
    assert sum(tokens for *_, tokens in chunks) >= 99_999
    first, last = chunks[0][0], chunks[-1][0]
    assert [i for i, *_ in chunks] == list(range(first, last + 1)) and len(
        {slot for _, slot, *_ in chunks}
    ) == 1
    assert all(sum(1 for row in step if row[2] == 1) == 32 for step in rows[: last + 1])
    assert all(line.ms(step) <= 25.0 for step in rows)
    for i, _, context, tokens in chunks[:-1]:
        assert (
            tokens % BLOCK == 0
            and line.ms(rows[i]) + chunk_ms(LARGE, context + tokens, BLOCK) > 25.0
        )
    assert chunks[0][3] > 2 * chunks[-2][3] > 2 * step_estimator.LEAST_CHUNK


@pytest.mark.parametrize("limit", [10, 20])
def test_the_limit_is_the_flags(limit):
    line = decoding(LARGE, 4, max_step_ms=limit)
    line.submit(16_000, 2)
    times = [line.ms(step) for step in line.run(300)]
    assert limit - 0.5 < max(times) <= limit


def test_no_limit_but_tokens():
    line = decoding(LARGE, 4, max_step_ms=0)
    line.submit(16_000, 2)
    assert [tokens for *_, tokens in prefill_of(line.run(300))] == [16_000]


def test_prefill_comes_forward_where_decodes_alone_take_too_long():
    line = decoding(StepCost(30.0, 0.1, 1.0, 30.0), 8)
    line.submit(1000, 2)
    chunks = prefill_of(line.run(60))
    assert [tokens for *_, tokens in chunks] == [64] * (1000 // 64) + [1000 % 64]
    assert [i for i, *_ in chunks] == list(range(chunks[0][0], chunks[0][0] + ceil(1000 / 64)))


def test_a_step_without_decodes_takes_longer():
    line = Line(LARGE)
    line.submit(60_000, 2)
    rows = line.run()
    times = [line.ms(rows[i]) for i, *_ in prefill_of(rows)]
    assert max(times) <= 100 and min(times[:-1]) > 98 and rows[0][0][2] % BLOCK == 0
    short = Line(StepCost(1.0, 0.001, 0.1, 1.0))
    short.submit(20_000, 2)
    assert [tokens for *_, tokens in prefill_of(short.run())] == [8192, 8192, 20_000 - 2 * 8192]


def test_prompts_come_in_order_of_arrival_and_share_a_step():
    line = decoding(LARGE, 4)
    for _ in range(40):
        line.submit(500, 500)
    rows = line.run(200)
    chunks = prefill_of(rows)
    order = [slot for _, slot, *_ in chunks]
    parts = [order.count(slot) for slot in dict.fromkeys(order)]
    assert (
        len(parts) == 40
        and [slot for slot, n in zip(dict.fromkeys(order), parts, strict=True) for _ in range(n)]
        == order
    )
    assert max(parts) == 2, "a prompt lies in more steps than it must"
    for i in range(chunks[0][0], chunks[-1][0]):
        assert line.ms(rows[i]) <= 25 and sum(1 for j, *_ in chunks if j == i) > 1


def test_a_prompt_takes_nothing_from_an_older_one():
    line = decoding(LARGE, 4)
    line.submit(20_000, 100)
    line.run(4)
    line.submit(500, 100)
    chunks = prefill_of(line.run(100))
    starts = {slot: i for i, slot, *_ in reversed(chunks)}
    ends = {slot: i for i, slot, *_ in chunks}
    old, new = sorted(starts, key=lambda slot: starts[slot])
    assert starts[new] == ends[old] > 10


def test_without_costs_tokens_alone_limit_a_step():
    line = Line(LARGE, max_step_ms=0, max_num_batched_tokens=4096)
    line.submit(10_000, 1)
    assert [tokens for *_, tokens in prefill_of(line.run())] == [4096, 4096, 10_000 - 2 * 4096]
    plain = World(max_num_batched_tokens=32)
    plain.add_worker(num_blocks=64, max_model_len=200)
    plain.add_tokenizer()
    handle = plain.submit(range(100), max_tokens=2)
    plain.run()
    (worker,) = plain.workers.values()
    assert [ints(step.run_counts)[0] for step in worker.steps[:4]] == [32, 32, 32, 4]
    assert plain.output(handle) == plain.expected(handle)


@pytest.mark.parametrize(("slower", "before"), [(1.6, 40), (0.7, 17.5)])
def test_a_wrong_estimate_is_corrected(slower, before):
    line = decoding(LARGE, 16, slower=slower, blocks=40_000)
    for _ in range(4):
        line.submit(100_000, 1)
    line.run(1000)
    mixed = [
        ms
        for ms, rows in zip(line.times, line.rows, strict=True)
        if sum(tokens for *_, tokens in rows) > 200
    ]
    assert (
        mixed[2] == pytest.approx(before, rel=0.05)
        and max(mixed[150:-2]) < 26.5
        and min(mixed[150:-8]) > 22
    )
    stats = line.scheduler.stats()
    assert (
        stats["step_time_ratio"] == pytest.approx(slower, rel=0.05)
        and 0.001 < stats["step_seconds"] < 0.03
    )


@pytest.mark.parametrize(
    ("cost", "ahead"),
    [(QUICK, 4), (StepCost(1.2, 0, 0), 4), (StepCost(3.0, 0, 0), 3), (StepCost(8.0, 0, 0), 2)],
)
def test_steps_in_flight_by_their_time(cost, ahead):
    """At the end of each."""
    line = decoding(cost, 2)
    line.ahead.clear()
    line.run(50)
    assert set(line.ahead) == {ahead}


@pytest.mark.parametrize(("slower", "ahead"), [(0.5, 3), (0.7, 3), (1.0, 3), (1.6, 4)])
def test_steps_are_sent_ahead_by_the_time_that_they_really_take(slower, ahead):
    """As many milliseconds as the way to the worker needs, whatever the costs say: where they say
    too little, rather more."""
    line = decoding(StepCost(3.0 / slower, 0, 0), 2, slower=slower)
    line.run(60)
    line.ahead.clear()
    line.run(50)
    assert set(line.ahead) == {ahead}


def test_who_comes_early_in_a_long_step_is_in_the_next():
    line = decoding(LARGE, 200, prompt=900, blocks=40_000)
    assert line.times[-1] > 10
    for wait_ms, later in ((2, 1), (line.times[-1] - 1, 2)):
        line.handle(Tick(line.now + wait_ms / 1000))
        line.submit(100, 5)
        assert [i for i, *_ in prefill_of(line.run(4))] == [later]


@pytest.mark.parametrize("cost", [QUICK, SLOW], ids=["quick", "slow"])
@pytest.mark.parametrize("caching", [True, False])
def test_everything_ends_as_it_should_when_blocks_are_short(cost, caching):
    w = World(enable_prefix_caching=caching, max_step_ms=10)
    w.add_worker(num_blocks=20, max_model_len=64, cost=cost)
    w.add_tokenizer()
    handles = [w.submit(range(i, i + 3 + 3 * i), max_tokens=8 + 5 * i % 23) for i in range(12)]
    w.run()
    assert all(w.output(h) == w.expected(h) for h in handles)
    assert w.scheduler.stats()["num_preemptions"] > 0
    w.assert_idle()


@pytest.mark.parametrize(("later_ms", "pause_ms"), [(0, 11), (9.5, 1.5), (10, 1), (40, 1)])
def test_the_loop_waits_until_the_next_step_is_due_and_not_past_it(monkeypatch, later_ms, pause_ms):
    """Also when that was while the loop was busy."""
    line = decoding(LARGE, 200, prompt=900, blocks=40_000)
    scheduler, now = line.scheduler, line.scheduler.now
    monkeypatch.setattr(
        scheduler.engine, "due", lambda since: now + 0.010 if since < now + 0.010 else inf
    )
    monkeypatch.setattr(loop.time, "monotonic", lambda: now + later_ms / 1000)
    made = loop.Loop(1, SchedulerConfig(), None, Outbox())
    made.state = scheduler
    assert made._pause_s() == pytest.approx(pause_ms / 1000)
