"""Counts of several frontends: whoever is asked gives the sum of those that live, and is not
stopped by a file that is none."""

from pathlib import Path

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
            and abs(total.time_to_first_token.sum - 0.32) < 1e-9
        )


def test_own_counts_are_never_old_and_are_not_changed(tmp_path: Path) -> None:
    mine = tally(10, 0.02, 200)
    one = CounterExchange(tmp_path, 1, mine)
    one.publish()
    mine.generation_tokens = 11
    assert one.total({1}).generation_tokens == 11 and one.total(set()).generation_tokens == 11
    assert mine.generation_tokens == 11 and sum(mine.time_to_first_token.counts) == 1


def test_the_dead_and_the_silent_do_not_count(tmp_path: Path) -> None:
    one, two = (
        CounterExchange(tmp_path, 1, tally(10, 0.02, 200)),
        CounterExchange(tmp_path, 2, tally(5, 0.3, 200)),
    )
    two.publish()
    assert one.total({1, 3}).generation_tokens == 10
    two.remove()
    assert one.total({1, 2}).generation_tokens == 10 and not list(tmp_path.iterdir())


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
