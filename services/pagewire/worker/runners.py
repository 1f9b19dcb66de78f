"""What the worker's loop wants of a runner: the one thing that knows how to compute a step.

There are two kinds. An AsyncRunner (gpu/runner.py, cpu/stages.py) launches steps ahead and tells
when they are done; a SyncRunner (cpu/runner.py, fake.py) computes while it is called, and
`AsyncFromSync` makes the first kind of it. Knows no tensors.
"""

from collections.abc import Callable
from typing import Protocol

from pagewire_protocol.messages import Step, StepResult, WorkerFacts


class BadStep(ValueError):
    """The scheduler asked for something impossible; the message has the numbers."""


class StepHandle(Protocol):
    """A step in flight."""

    def done(self) -> bool:
        """Whether `result` can be had. Raises RuntimeError when the device has failed."""
        ...

    def result(self) -> StepResult:
        """What the step sampled, complete with epoch, incarnation and n. Once it is done."""
        ...


class AsyncRunner(Protocol):
    """A runner that launches steps ahead of their results."""

    def facts(self) -> WorkerFacts:
        """What it can hold."""
        ...

    def notify(self, wake: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        """`wake` is called, perhaps from another thread, whenever a step in flight is done;
        `meanwhile` by `launch`, where it has to wait: steps before that one may be done."""
        ...

    def launch(self, step: Step) -> StepHandle:
        """Steps are computed in the order of their launches. Raises BadStep for a step that
        contradicts the slots."""
        ...

    def catch_up(self) -> None:
        """Results have been sent: what need not come before that, but soon."""
        ...

    def clear(self) -> None:
        """Forget every request: there is a new scheduler."""
        ...

    def idle(self) -> bool:
        """Nothing has come for a while: a bit of what was put off, for less than a tenth of a second.
        Whether there was any."""
        ...


class SyncRunner(Protocol):
    """A runner that computes while it is called."""

    def facts(self) -> WorkerFacts:
        """What it can hold."""
        ...

    def execute(self, step: Step) -> StepResult:
        """One forward pass: what the step sampled, complete with epoch, incarnation and n. Raises
        BadStep for a step that contradicts the slots."""
        ...

    def clear(self) -> None:
        """Forget every request: there is a new scheduler."""
        ...


class CompletedStep:
    """The handle of a step that was done when it was launched."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def done(self) -> bool:
        """See StepHandle."""
        return True

    def result(self) -> StepResult:
        """See StepHandle."""
        return self._result


class OnCpu:
    """Base of AsyncRunners whose steps share a CPU with others, and may take minutes."""

    def catch_up(self) -> None:
        """Nothing waits for results to be sent."""

    def idle(self) -> bool:
        """Nothing is ever put off."""
        return False


class AsyncFromSync(OnCpu):
    """An AsyncRunner whose steps are done when `launch` returns."""

    def __init__(self, runner: SyncRunner) -> None:
        self._execute = runner.execute
        self.facts = runner.facts
        self.clear = runner.clear

    def notify(self, wake: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        """Nothing is ever in flight between two calls."""

    def launch(self, step: Step) -> StepHandle:
        """See AsyncRunner."""
        return CompletedStep(self._execute(step))
