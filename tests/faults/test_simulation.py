"""The simulated stack keeps its promises under thousands of seeds, and does not where a rule is broken
on purpose."""

import pytest
from faults.planted import BUGS, Bug, planted
from faults.simulate import broken, run
from faults.simulation import simulate

SEEDS = 5_000
MOST_SEEDS = 2_000
"""In which a planted bug must show. Each shows in some hundred at the latest."""


def test_no_seed_breaks_a_promise() -> None:
    """The same seeds each time; `python -m tests.faults.simulate` takes others."""
    failures = [failure for _, found in run(0, SEEDS) for failure in found]
    assert not failures, f"{len(failures)} seeds, such as {failures[0][0]}:\n{failures[0][1]}"


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_is_found(bug: Bug) -> None:
    with planted(bug):
        assert any(broken(range(seed, seed + 1)) for seed in range(MOST_SEEDS))


def test_one_seed_is_one_history() -> None:
    first, second = simulate(77), simulate(77)
    assert first.said == second.said and first.now == second.now
