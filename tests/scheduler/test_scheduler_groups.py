"""Groups of rows with common blocks: which are found, when they are sent, and that they claim
nothing that is not shared."""

import numpy as np
import pytest
from pagewire.scheduler.prefix_groups import PrefixFinder
from pagewire_protocol.agreed import MAX_PREFIX_GROUPS
from scheduler.scheduler_sim import World

SIZE = 64
FACTS = {"num_blocks": 256, "block_size": SIZE, "max_num_seqs": 16, "max_model_len": 1024}


def found(tables, lengths=None, rows=None, size=16):
    """{common tokens: [rows]} of each group, by what `PrefixFinder` says of block tables given as
    lists."""
    prefixes = PrefixFinder(len(tables), size)
    for slot, blocks in enumerate(tables):
        prefixes.placed(slot, blocks)
    rows = np.arange(len(tables), dtype=np.int32) if rows is None else np.array(rows, np.int32)
    lengths = np.array(
        [len(tables[slot]) * size for slot in rows] if lengths is None else lengths, np.int64
    )
    shared = prefixes.find(rows, lengths)
    if shared is None:
        return []
    order, starts, sizes = (
        np.frombuffer(column, np.int32).tolist()
        for column in (shared.order, shared.starts, shared.lengths)
    )
    return [(order[starts[i] : starts[i + 1]], tokens) for i, tokens in enumerate(sizes)]


def tables(prefix, count, first, own=2):
    return [[*prefix, *range(first + i * own, first + (i + 1) * own)] for i in range(count)]


A, B = list(range(1000, 1020)), list(range(2000, 2040))


def test_two_groups_and_strangers():
    rows = [*tables(A, 5, 0), *tables([], 3, 100), *tables(B, 4, 200)]
    assert found(rows) == [([8, 9, 10, 11], 640), ([0, 1, 2, 3, 4], 320)]


def test_nothing_in_common():
    assert found(tables([], 8, 0, own=30)) == []


@pytest.mark.parametrize(
    ("count", "blocks", "hit"), [(4, 16, True), (3, 16, False), (4, 15, False), (3, 40, False)]
)
def test_thresholds(count, blocks, hit):
    assert bool(found(tables(B[:blocks], count, 0))) == hit


def test_indices_are_those_of_the_step_not_the_slots():
    rows = tables(A, 8, 0)
    assert found(rows, rows=[7, 2, 5, 1]) == [([0, 1, 2, 3], 320)]


def test_the_last_token_is_never_shared():
    """A row with as many tokens as the common blocks hold still has one to compute in the last of
    them."""
    rows = tables(A, 4, 0)
    assert found(rows, lengths=[321, 400, 400, 400]) == [([0, 1, 2, 3], 320)]
    assert found(rows, lengths=[320, 400, 400, 400]) == [([0, 1, 2, 3], 304)]


def test_a_longer_common_part_of_most_rows_is_worth_leaving_the_others():
    rows = [*tables(B, 6, 0), [*B[:18], 900, 901]]
    assert found(rows) == [([0, 1, 2, 3, 4, 5], 640)]


def test_parts_with_longer_prefixes_of_their_own():
    rows = [*tables([*A, *B], 8, 0), *tables([*A, *range(3000, 3040)], 8, 500)]
    assert found(rows) == [(list(range(8)), 960), (list(range(8, 16)), 960)]
    few = [*tables([*A, 50], 8, 0), *tables([*A, 60], 8, 500)]
    assert found(few) == [(list(range(16)), 320)]


def test_the_most_worthwhile_are_sent():
    rows = [
        row
        for g in range(12)
        for row in tables(list(range(g * 100, g * 100 + 16 + g)), 4, 5000 + g * 100)
    ]
    assert (
        sorted(tokens for _, tokens in found(rows))
        == [16 * (16 + g) for g in range(12)][-MAX_PREFIX_GROUPS:]
    )


def world(facts=None, **config):
    made = World(max_num_seqs=16, max_num_batched_tokens=4096, **config)
    worker = made.add_worker(**FACTS, **(facts or {}))
    made.add_tokenizer()
    made.tick()
    return made, worker


def warm(w, prompt):
    """Leave the blocks of `prompt` in the cache."""
    w.submit(prompt, max_tokens=1)
    w.run()


PROMPT = [i % 900 for i in range(5 * SIZE)]
OTHER = [(7 * i + 3) % 900 for i in range(6 * SIZE)]


def sent(worker):
    return [step for step in worker.steps if step.shared is not None]


def test_requests_with_one_system_prompt_are_grouped_until_too_few_are_left():
    w, worker = world()
    warm(w, [*PROMPT, 1])
    warm(w, [*OTHER, 1])
    ends = [10, 20, 20, 20, 30]
    handles = [w.submit([*PROMPT, 3, i], max_tokens=n, ignore_eos=True) for i, n in enumerate(ends)]
    handles += [w.submit([*OTHER, 4, i], max_tokens=15, ignore_eos=True) for i in range(4)]
    sizes = set()
    w.tick()
    while worker.inbox:
        w.step()
        sizes.add(tuple(sorted((len(slots), tokens) for slots, tokens in worker.groups())))
    w.run()
    assert sizes == {
        (),
        ((4, 6 * SIZE), (5, 5 * SIZE)),
        ((4, 5 * SIZE), (4, 6 * SIZE)),
        ((4, 5 * SIZE),),
    }
    assert all(w.output(h) == w.expected(h) for h in handles)
    assert len(sent(worker)) < sum(step.repeat for step in worker.steps), (
        "groups are sent once a set of rows"
    )
    w.assert_idle()


@pytest.mark.parametrize(
    ("facts", "config"),
    [
        ({"cascade": False}, {}),
        ({}, {"enable_cascade": False}),
        ({}, {"enable_prefix_caching": False}),
    ],
)
def test_no_groups_where_nobody_can_use_them(facts, config):
    w, worker = world(facts, **config)
    warm(w, [*PROMPT, 1])
    for i in range(5):
        w.submit([*PROMPT, 3, i], max_tokens=5)
    w.run()
    assert not sent(worker)


def test_a_step_with_a_prompt_in_it_keeps_the_groups_of_its_decodes():
    w, worker = world()
    warm(w, [*PROMPT, 1])
    for i in range(5):
        w.submit([*PROMPT, 3, i], max_tokens=12, ignore_eos=True)
    for _ in range(6):
        w.step()
    assert worker.groups()
    late = w.submit(OTHER[:100], max_tokens=3)
    w.run()
    mixed = [
        step
        for step in worker.steps
        if any(a.prompt == np.array(OTHER[:100], np.int32).tobytes() for a in step.admit)
    ]
    assert mixed and mixed[0].shared is not None
    assert np.frombuffer(mixed[0].run_counts, np.int32).tolist()[-1] > 1 and w.output(
        late
    ) == w.expected(late)
