"""Which refusals are waited out, and for how long."""

import pytest
from pagewire.requests.errors import ErrorKind, RequestError, failed, invalid, unavailable
from pagewire.requests.retries import MAX_UNAVAILABLE_S, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("error", [invalid("no"), failed()])
def test_what_would_be_refused_again_is_not_sent_again(error: RequestError) -> None:
    assert not RetryBudget(Clock()).allows(error)


def test_full_queues_are_waited_out_without_limit() -> None:
    clock = Clock()
    retries = RetryBudget(clock)
    for _ in range(5):
        assert retries.allows(RequestError(ErrorKind.OVERLOADED, "full"))
        clock.now += MAX_UNAVAILABLE_S


def test_missing_services_are_waited_for_but_not_for_ever() -> None:
    clock = Clock()
    retries = RetryBudget(clock)
    assert retries.allows(unavailable("starting"))
    clock.now += MAX_UNAVAILABLE_S - 1
    assert retries.allows(unavailable("starting"))
    clock.now += 1
    assert not retries.allows(unavailable("starting"))


def test_the_wait_is_counted_anew_after_another_answer() -> None:
    clock = Clock()
    retries = RetryBudget(clock)
    assert retries.allows(unavailable("starting"))
    clock.now += MAX_UNAVAILABLE_S - 1
    assert retries.allows(RequestError(ErrorKind.OVERLOADED, "full"))
    clock.now += MAX_UNAVAILABLE_S - 1
    assert retries.allows(unavailable("starting"))
