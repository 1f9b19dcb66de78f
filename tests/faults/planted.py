"""Rules of the protocol, each broken on purpose: the simulation must find every one of these bugs, or
what it does not find proves nothing."""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple
from unittest import mock

from pagewire.requests.owner import RequestOwner
from pagewire.requests.request import OwnedRequest
from pagewire.scheduler.engine import Engine
from pagewire.scheduler.state import Scheduler
from pagewire.tokenizer import rows
from pagewire.tokenizer.requests import Requests
from pagewire.worker.loop import _Server


class Change(NamedTuple):
    """In the source of `holder.function`, `old` becomes `new`."""

    holder: Any
    function: str
    old: str
    new: str


class Bug(NamedTuple):
    """`name`: the rule that is broken."""

    name: str
    changes: tuple[Change, ...]


_ANY_EXECUTION: Final = (
    Change(
        RequestOwner,
        "_accept",
        "if request.execution != NO_EXECUTION:",
        "if False:",
    ),
    Change(
        rows,
        "_accept",
        "if stream.execution == NO_EXECUTION:",
        "if True:",
    ),
)
BUGS: Final = (
    Bug("rows of a second execution are accepted", _ANY_EXECUTION),
    Bug(
        "a gap is accepted",
        (
            Change(RequestOwner, "_accept", "if position > len(out):", "if position < len(out):"),
            Change(RequestOwner, "_accept", "if position != len(out):", "if position < len(out):"),
        ),
    ),
    Bug(
        "a repetition is accepted",
        (Change(RequestOwner, "_accept", "if position != len(out):", "if position > len(out):"),),
    ),
    Bug(
        "the output so far is not sent along",
        (Change(OwnedRequest, "next_attempt", "self.out.tobytes()", "b''"),),
    ),
    Bug(
        "the next attempt still waits for the execution of the last one",
        (Change(RequestOwner, "_dispatch", "request.execution = NO_EXECUTION", "pass"),),
    ),
    Bug(
        "what a vanished tokenizer had is not sent again",
        (Change(RequestOwner, "on_roster", "or r.tokenizer not in present", ""),),
    ),
    Bug(
        "what a former scheduler had is not sent again",
        (
            Change(RequestOwner, "on_roster", "roster.epoch > self._epoch", "False"),
            Change(Requests, "on_roster", "if new_epoch:", "if False:"),
        ),
    ),
    Bug(
        "a frontend that was given up does not send again what it owns",
        (
            Change(
                RequestOwner, "on_roster", "elif self._listed_in == roster.epoch:", "elif False:"
            ),
        ),
    ),
    Bug(
        "what a dead worker had is not reported as lost",
        (Change(Engine, "lose_worker", "for request in worker.requests():", "for request in ():"),),
    ),
    Bug(
        "an older attempt replaces a newer one",
        (Change(Engine, "submit", "old.attempt >= submit.attempt", "False"),),
    ),
    Bug(
        "a preempted request gets a new execution",
        (Change(Engine, "_put", "if request.execution:", "if False:"),),
    ),
    Bug(
        "an announced death is not acted upon",
        (
            Change(
                Scheduler,
                "handle",
                "self._remove(Incarnation(event.incarnation), event.cause, died=True)",
                "self.peers.remove(Incarnation(event.incarnation))",
            ),
        ),
    ),
    Bug(
        "a worker takes steps that newer ones have overtaken",
        (Change(_Server, "_take", "if step.n <= self._newest_step:", "if False:"),),
    ),
    Bug(
        "the steps of a worker that is taken back are numbered from 1 again",
        (
            Change(
                Engine,
                "add_worker",
                "worker.in_flight.continue_after(self._newest_lost_step)",
                "pass",
            ),
        ),
    ),
    Bug(
        "a worker that is taken back keeps what its slots hold",
        (Change(_Server, "_take", "if step.clear:", "if False:"),),
    ),
)


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Within the context, the code has `bug`. Raises AssertionError where it is no longer written as
    the bug expects."""
    with ExitStack() as stack:
        for function_changes in _by_function(bug.changes):
            holder, name, _, _ = function_changes[0]
            function = getattr(holder, name)
            source = textwrap.dedent(inspect.getsource(function))
            for change in function_changes:
                assert change.old in source, f"{name} has no {change.old!r}"
                source = source.replace(change.old, change.new)
            made: dict[str, Any] = {}
            exec(compile(source, f"<{bug.name}>", "exec"), function.__globals__, made)
            stack.enter_context(mock.patch.object(holder, name, made[name]))
        yield


def _by_function(changes: tuple[Change, ...]) -> list[list[Change]]:
    grouped: dict[tuple[Any, str], list[Change]] = {}
    for change in changes:
        grouped.setdefault((change.holder, change.function), []).append(change)
    return list(grouped.values())
