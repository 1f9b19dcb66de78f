"""How often a matcher process looks at what it may have been told."""

from itertools import accumulate, repeat

import pytest
from pagewire.grammar.pace import LEAST_S, LOOKS, MOST_S, TOGETHER_S, Pace


class Looks:
    """A process that is told the tokens of steps that end at `steps`, and looks as its pace says."""

    def __init__(self, steps: list[float]) -> None:
        self.lags: list[float] = []
        """Of each step: how long its tokens lay there."""
        self.looks = 0
        pace, now = Pace(), 0.0
        pace.begin(now)
        for end in steps:
            while now < end:
                pause = pace.pause_s(now)
                assert LEAST_S <= pause <= MOST_S
                now += pause
                self.looks += 1
            self.lags.append(now - end)
            pace.told(now)
            pace.told(now + 0.5 * TOGETHER_S)  # rows of that step that were a little later


@pytest.mark.parametrize("step_s", [0.0015, 0.003, 0.009, 0.02])
def test_tokens_of_steps_are_found_soon_and_by_a_few_looks(step_s: float) -> None:
    looks = Looks(list(accumulate(repeat(step_s, 200))))
    late = looks.lags[5:]
    assert max(late) <= max(LEAST_S, step_s / 12)
    assert looks.looks / 200 < 12


def test_steps_that_become_shorter_are_followed() -> None:
    looks = Looks([0.015 * k for k in range(1, 11)] + [0.15 + 0.002 * k for k in range(1, 101)])
    assert max(looks.lags[-40:]) <= 2 * LEAST_S


def test_after_a_pause_tokens_are_found_within_a_few_milliseconds() -> None:
    looks = Looks([0.003, 0.006, 60.0, 60.06, 60.063, 60.066, 60.069])
    assert looks.lags[2] <= MOST_S and looks.looks < 13_000
    assert max(looks.lags[-3:]) <= 0.001


def late_rows(steps: list[float]) -> list[bool]:
    """Of a row of steps that take so long: at which ones its mask is not there, so that it gets no
    token."""
    pace, now, end = Pace(), 0.0, 0.0
    pace.begin(now)
    late: list[bool] = []
    told = False
    for step in steps:
        end += step
        while now < end:
            if told:
                pace.told(now)
                told = False
            now += pace.pause_s(now)
        late.append(told)
        told = True
    return late


@pytest.mark.parametrize("step_s", [0.0015, 0.003, 0.009])
@pytest.mark.parametrize("prompt_s", [0.012, 0.03, 0.045, 0.2])
def test_behind_a_step_with_prompts_rows_are_late_for_a_small_part_of_it(
    step_s: float, prompt_s: float
) -> None:
    """It takes longer than those before it and behind it."""
    late = late_rows(([step_s] * 9 + [prompt_s]) * 20)
    assert sum(late) * step_s <= 20 * prompt_s / LOOKS


@pytest.mark.parametrize("step_s", [0.0015, 0.003, 0.009])
@pytest.mark.parametrize("prompt_s", [0.012, 0.03, 0.045])
def test_behind_many_steps_with_prompts_rows_are_not_late_for_long(
    step_s: float, prompt_s: float
) -> None:
    late = late_rows([prompt_s] * 9 + [step_s] * 90)
    assert sum(late) * step_s <= MOST_S and not any(late[-80:])
