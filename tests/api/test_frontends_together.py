"""Counts of several frontends: whoever is asked gives the sum of all that have ever been, which
never falls, and is not stopped by a file that is none."""

import multiprocessing
import random
import threading
from pathlib import Path

import pytest
from pagewire.process import alive
from pagewire.requests import counter_exchange
from pagewire.requests.counter_exchange import CounterExchange
from pagewire.requests.counters import Counters


def tally(tokens: int, seconds: float, status: int) -> Counters:
    made = Counters()
    made.generation_tokens = tokens
    made.first_token(seconds)
    made.responded("GET", "/x", status)
    made.finished("stop")
    return made


def test_whoever_is_asked_gives_the_sum(tmp_path: Path) -> None:
    one, two = (
        CounterExchange(tmp_path, 1, tally(10, 0.02, 200)),
        CounterExchange(tmp_path, 2, tally(5, 0.3, 429)),
    )
    one.publish()
    two.publish()
    for asked in (one, two):
        total = asked.total({1, 2})
        assert total.generation_tokens == 15 and total.responses == {
            "GET /x 200": 1,
            "GET /x 429": 1,
        }
        assert total.reasons == {"stop": 2, "length": 0, "abort": 0, "error": 0}
        assert (
            sum(total.time_to_first_token.counts) == 2
            and abs(total.time_to_first_token.sum - 0.32) < 1e-5
        )


def test_own_counts_are_never_old_and_are_not_changed(tmp_path: Path) -> None:
    mine = tally(10, 0.02, 200)
    one = CounterExchange(tmp_path, 1, mine)
    one.publish()
    mine.generation_tokens = 11
    assert one.total({1}).generation_tokens == 11 and one.total(set()).generation_tokens == 11
    assert mine.generation_tokens == 11 and sum(mine.time_to_first_token.counts) == 1


def test_the_dead_stay_in_the_sum_and_their_gauges_do_not(tmp_path: Path) -> None:
    one = CounterExchange(tmp_path, 1, tally(10, 0.02, 200))
    counts = tally(5, 0.3, 200)
    counts.key_usage = {"running k": 3, "requests k": 7}
    CounterExchange(tmp_path, 2, counts).publish()
    assert one.total({1, 2}).key_usage == {"running k": 3, "requests k": 7}
    for _ in range(2):
        total = one.total({1})
        assert total.generation_tokens == 15 and total.key_usage == {"requests k": 7}
        one.fold(lambda: {1})
    assert not (tmp_path / "counters-0000000000000002").exists()


def test_folding_again_and_again_counts_once(tmp_path: Path) -> None:
    """Also where a file could not be removed after it was folded."""
    one = CounterExchange(tmp_path, 1, Counters())
    for incarnation in range(2, 30):
        CounterExchange(tmp_path, incarnation, tally(1, 0.02, 200)).publish()
        file = tmp_path / f"counters-{incarnation:016x}"
        content = file.read_bytes()
        one.fold(lambda: {1})
        file.write_bytes(content)
        assert one.total({1}).generation_tokens == incarnation - 1
    one.fold(lambda: {1})
    assert len(list(tmp_path.iterdir())) <= 2


def test_files_folded_while_a_reader_is_among_them_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often others fold between the reader's first file and its reading of the sum."""
    reader, folding = (CounterExchange(tmp_path, number, Counters()) for number in (1, 999))
    left = list(range(2, 30))
    for incarnation in left:
        CounterExchange(tmp_path, incarnation, tally(1, 0.02, 200)).publish()
    read = counter_exchange._read

    def late(path: Path) -> bytes:
        monkeypatch.setattr(counter_exchange, "_read", read)
        while left:
            left.pop()
            folding.fold(lambda: {1, 999, *left})
        return read(path)

    monkeypatch.setattr(counter_exchange, "_read", late)
    assert reader.total({1}).generation_tokens == 28
    assert not left and reader.total({1}).generation_tokens == 28


def test_a_reader_sees_no_count_fall_while_others_fold(tmp_path: Path) -> None:
    reader = CounterExchange(tmp_path, 1, Counters())
    for incarnation in range(2, 200):
        CounterExchange(tmp_path, incarnation, tally(1, 0.02, 200)).publish()
    seen: list[float] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(reader.total({1}).generation_tokens)

    thread = threading.Thread(target=read)
    thread.start()
    left = list(range(2, 200))
    folding = CounterExchange(tmp_path, 999, Counters())
    while left:
        for _ in range(random.randrange(1, 20)):
            if left:
                left.pop()
        folding.fold(lambda: {1, 999, *left})
    done.set()
    thread.join()
    assert set(seen) == {198}


def test_seconds_do_not_fall_by_the_order_in_which_they_are_added(tmp_path: Path) -> None:
    """In its last bit alone would be enough: Prometheus takes it for a count that begins anew."""
    draws = random.Random(7)
    exchanges: list[CounterExchange] = []
    for incarnation in range(1, 13):
        counters = Counters()
        for _ in range(20):
            counters.first_token(draws.random())
        exchanges.append(CounterExchange(tmp_path, incarnation, counters))
        exchanges[-1].publish()
    everybody = set(range(1, 13))
    sums = {exchange.total(everybody).time_to_first_token.sum for exchange in exchanges}
    for left in range(12, 1, -1):
        exchanges[0].fold(lambda left=left: set(range(1, left)))
        sums.add(exchanges[0].total(set(range(1, left))).time_to_first_token.sum)
    assert len(sums) == 1


def test_a_damaged_file_is_no_count(tmp_path: Path) -> None:
    one, two = (
        CounterExchange(tmp_path, 1, tally(10, 0.02, 200)),
        CounterExchange(tmp_path, 2, tally(5, 0.3, 200)),
    )
    two.publish()
    (file,) = tmp_path.iterdir()
    for content in (b"", b"[]", b'{"no_such_count": 1}', b'{"responses": {"x": 1}}', b"\xff"):
        file.write_bytes(content)
        assert one.total({1, 2}).generation_tokens == 10


def _live(run_dir: Path, incarnation: int, is_there: object, may_end: object) -> None:
    alive.Alive(run_dir, "frontend", incarnation)
    is_there.set()  # type: ignore[attr-defined]
    may_end.wait(30)  # type: ignore[attr-defined]


def test_who_lives_is_known_however_a_process_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_there, never = context.Event(), context.Event()
    process = context.Process(target=_live, args=(tmp_path, 7, is_there, never))
    process.start()
    try:
        assert is_there.wait(30)
        assert alive.living(tmp_path, "frontend") == {7: False}
    finally:
        process.kill()
        process.join()
    assert alive.living(tmp_path, "frontend") == {} and not list(tmp_path.iterdir())


def test_who_leaves_is_known(tmp_path: Path) -> None:
    leaving = alive.Alive(tmp_path, "frontend", 1)
    staying = alive.Alive(tmp_path, "frontend", 2)
    leaving.leave()
    assert alive.living(tmp_path, "frontend") == {1: True, 2: False}
    leaving.close()
    assert alive.living(tmp_path, "frontend") == {2: False}
    staying.close()
    assert alive.living(tmp_path, "frontend") == {}
