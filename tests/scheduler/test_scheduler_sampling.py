"""Limits and log-probabilities as the scheduler sees them: what it refuses, what it forwards, when
a prompt is computed whole."""

import numpy as np
import pytest
from pagewire.scheduler.outgoing import Outgoing, select
from pagewire.scheduler.slots import Slots
from pagewire_protocol.messages import Finish, LogprobColumns, pack, unpack
from scheduler.scheduler_sim import VOCAB, world

PROMPT = list(range(50, 63))


INF, NAN = float("inf"), float("nan")
REFUSED = {
    "bias beyond the vocabulary": (
        {"bias_ids": pack("i", [VOCAB]), "bias_values": pack("f", [1.0])},
        "logit_bias",
    ),
    "negative bias id": (
        {"bias_ids": pack("i", [-1]), "bias_values": pack("f", [1.0])},
        "logit_bias",
    ),
    "more ids than values": (
        {"bias_ids": pack("i", [1, 2]), "bias_values": pack("f", [1.0])},
        "logit_bias",
    ),
    "values without ids": ({"bias_values": pack("f", [1.0])}, "logit_bias"),
    "half a bias id": ({"bias_ids": b"ab", "bias_values": pack("f", [1.0])}, "logit_bias"),
    "half a bias value": ({"bias_ids": pack("i", [1]), "bias_values": b"abc"}, "logit_bias"),
    "bias over 100": (
        {"bias_ids": pack("i", [1]), "bias_values": pack("f", [100.5])},
        "logit_bias",
    ),
    "infinite bias": ({"bias_ids": pack("i", [1]), "bias_values": pack("f", [-INF])}, "logit_bias"),
    "bias that is no number": (
        {"bias_ids": pack("i", [1]), "bias_values": pack("f", [NAN])},
        "logit_bias",
    ),
    "allowed beyond the vocabulary": (
        {"allowed_ids": pack("i", [1, 2**31 - 1])},
        "allowed_token_ids",
    ),
    "half an allowed id": ({"allowed_ids": b"abcde"}, "allowed_token_ids"),
    "bad word beyond the vocabulary": (
        {"bad_words": (pack("i", [1]), pack("i", [2, VOCAB]))},
        "bad_words",
    ),
    "half a bad word": ({"bad_words": (b"a",)}, "bad_words"),
    "bad word of nothing": ({"bad_words": (b"",)}, "bad_words"),
    "nothing left": (
        {"allowed_ids": pack("i", [7, 8]), "bad_words": (pack("i", [7]), pack("i", [8]))},
        "allowed_token_ids",
    ),
}


@pytest.mark.parametrize("late", [False, True], ids=["", "worker later"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_break_a_worker_is_refused_and_the_next_request_served(name, late):
    """`late`: no worker, so no vocabulary, is known when the request comes."""
    sampling, param = REFUSED[name]
    w = world(workers=0 if late else 1)
    handle = w.submit(PROMPT, **sampling)
    if late:
        w.add_worker()
    w.tick()
    end = w.end(handle)
    assert end.finish is Finish.REFUSED and end.status == 400 and end.param == param, end
    good = w.submit(
        PROMPT,
        bias_ids=pack("i", [VOCAB - 1]),
        bias_values=pack("f", [-100.0]),
        allowed_ids=pack("i", [0]),
    )
    w.run()
    assert w.end(good).finish is Finish.LENGTH
    w.assert_idle()


@pytest.mark.parametrize("budget", [2048, 5])
def test_a_scored_prompt_is_computed_whole_and_its_blocks_are_shared(budget):
    w = world(max_num_batched_tokens=budget)
    first = w.submit(PROMPT)
    w.run()
    scored = w.submit(PROMPT, prompt_logprobs=0)
    w.run()
    again = w.submit(PROMPT)
    w.run()
    assert (
        w.attempts[first].placed.cached_tokens == 0 and w.attempts[again].placed.cached_tokens == 12
    )
    assert w.attempts[scored].placed.cached_tokens == 0 and w.attempts[scored].scores == dict(
        enumerate(PROMPT[1:], 1)
    )
    assert w.attempts[first].scores == w.attempts[again].scores == {}
    assert w.output(first) == w.output(scored) == w.output(again)
    w.assert_idle()


def test_a_scored_prompt_waits_for_nobody_and_fills_the_cache():
    w = world(max_num_batched_tokens=8)
    long = list(range(30))
    w.submit(long)
    w.step()
    scored = w.submit(long, prompt_logprobs=2)
    w.run()
    cached = w.submit(long)
    w.run()
    assert (
        w.attempts[scored].scores == dict(enumerate(long[1:], 1))
        and w.attempts[cached].placed.cached_tokens == 28
    )
    w.assert_idle()


def test_after_preemption_each_position_came_and_a_resumed_request_reads_the_cache():
    w = world(facts={"num_blocks": 14}, max_num_batched_tokens=8)
    handles = [w.submit([i, *range(9)], max_tokens=20, prompt_logprobs=0) for i in range(3)]
    w.run()
    assert w.scheduler.engine.counters.num_preemptions > 0
    for i, handle in enumerate(handles):
        assert w.attempts[handle].scores == dict(enumerate(range(9), 1)) and w.output(
            handle
        ) == w.expected(handle), i
    w.assert_idle()


def test_a_resubmission_with_output_scores_no_prompt():
    w = world()
    first = w.submit(PROMPT, prompt_logprobs=0, max_tokens=4)
    w.run()
    said = w.output(first)
    second = w.submit(
        PROMPT, rid=b"r" * 16, attempt=2, output=said[:2], prompt_logprobs=0, max_tokens=4
    )
    w.run()
    assert (
        w.attempts[second].scores == {}
        and w.attempts[second].placed.cached_tokens == 12
        and w.output(second) == said
    )


def test_prompt_scores_of_a_slot_that_was_not_run_are_distrusted():
    w = world()
    worker = next(iter(w.workers.values()))
    handle = w.submit(PROMPT, prompt_logprobs=0)
    w.tick()
    worker.execute()
    result = worker.results[0]
    import msgspec

    worker.results[0] = msgspec.structs.replace(
        result, prompt_logprobs=(msgspec.structs.replace(result.prompt_logprobs[0], slot=5),)
    )
    w.deliver(worker)
    w.tick()
    assert w.end(handle).finish is Finish.LOST


def columns(rows):
    """rows: (row, rank, [(id, value), ...])."""
    entries = [entry for _, _, part in rows for entry in part]
    return LogprobColumns(
        pack("i", [row for row, _, _ in rows]),
        pack("i", [len(part) for _, _, part in rows]),
        pack("i", [rank for _, rank, _ in rows]),
        pack("i", [token for token, _ in entries]),
        pack("f", [value for _, value in entries]),
    )


def listed(given):
    """The inverse of `columns`."""
    rows, counts, ranks, ids = (
        unpack("i", c).tolist() for c in (given.rows, given.counts, given.ranks, given.ids)
    )
    entries = iter(zip(ids, unpack("f", given.values).tolist(), strict=True))
    return [
        (row, rank, [next(entries) for _ in range(count)])
        for row, count, rank in zip(rows, counts, ranks, strict=True)
    ]


ROWS = [
    (0, 1, [(10, -1.0)]),
    (2, 4, [(12, -2.0), (5, -0.5), (6, -0.75)]),
    (3, 2, [(13, -3.0), (7, -0.25)]),
]


def test_logprobs_of_kept_rows():
    keep = np.array([False, True, True, True])
    assert listed(select(columns(ROWS), keep)) == [(1, *ROWS[1][1:]), (2, *ROWS[2][1:])]
    assert (
        select(columns(ROWS), np.array([False, True, False, False])) is None
        and select(None, keep) is None
    )


def test_logprobs_go_to_the_owner_of_each_row_over_several_steps():
    slots, out = Slots(4, 100, ()), Outgoing()
    slots.reply_route[:] = [7, 8, 7, 8]
    slots.handle[:] = [100, 101, 102, 103]
    everyone = np.arange(4, dtype=np.int32)
    out.add_tokens(slots, everyone, np.zeros(4, np.int64), everyone, None, columns(ROWS))
    out.add_tokens(slots, everyone[:1], np.ones(1, np.int64), everyone[:1], None, None)
    out.add_tokens(
        slots,
        everyone[2:],
        np.ones(2, np.int64),
        everyone[2:],
        None,
        columns([(0, 9, [(1, -4.0)])]),
    )
    mail = {owner: part.message() for owner, part in out.take().items()}
    assert unpack("I", mail[7].handles).tolist() == [100, 102, 100, 102] and unpack(
        "I", mail[8].handles
    ).tolist() == [101, 103, 103]
    assert listed(mail[7].logprobs) == [(0, *ROWS[0][1:]), (1, *ROWS[1][1:]), (3, 9, [(1, -4.0)])]
    assert listed(mail[8].logprobs) == [(1, *ROWS[2][1:])]
