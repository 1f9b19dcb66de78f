"""Stop strings across pieces, against the plain definition."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire.tokenizer.stop import Matcher

texts = st.text("aab\n世", max_size=40)
stops = st.lists(st.text("ab\n世", min_size=1, max_size=6), min_size=1, max_size=4).map(tuple)


def naive(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The stop string that ends first, of several the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


@settings(max_examples=1500, deadline=None)
@given(texts, stops, st.booleans(), st.lists(st.integers(0, 100), max_size=12))
def test_as_the_plain_definition_however_the_text_is_cut(
    text: str, stops: tuple[str, ...], include: bool, places: list[int]
):
    matcher = Matcher(stops, include)
    shown = seen = ""
    for piece in cut(text, places):
        seen += piece
        shown += matcher.feed(piece)
        if matcher.matched:
            break
        ends = [
            seen[at:]
            for at in range(len(seen) + 1)
            if any(stop.startswith(seen[at:]) for stop in stops)
        ]
        assert matcher.held == ends[0], (
            "exactly the longest end that could become a stop string is held back"
        )
        assert shown + matcher.held == seen
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == naive(text, stops, include)


def test_one_character_at_a_time():
    matcher = Matcher(("###", "#!"))
    assert [matcher.feed(character) for character in "a##b##!"] == ["a", "", "", "##b", "", "", "#"]
    assert matcher.matched == "#!"


def test_what_is_held_comes_at_the_end():
    matcher = Matcher(("END",))
    assert matcher.feed("the E") == "the "
    assert matcher.feed("N") == ""
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_long_stop_strings_cost_linear_time():
    stops = tuple("a" * 1000 + chr(ord("b") + n) for n in range(16))
    matcher = Matcher(stops)
    for _ in range(2000):
        matcher.feed("a")
    assert len(matcher.held) == 1000
    matcher.feed("q")
    assert matcher.matched == stops[15]
