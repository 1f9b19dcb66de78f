"""A model in pipeline stages on GPUs: the runners of ranks that have some of its layers. Each is the
runner of a whole model with another beginning, hidden states of the stage before, or another end,
hidden states for the next one. See worker/stages.py for how stages work together.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from pagewire_kernels.communicator import (
    CheckedCommunicator,
    CheckedConnections,
    PointToPoint,
)
from pagewire_protocol.columns import Incarnation
from pagewire_protocol.messages import Shared, Step, StepCost, StepResult, WorkerFacts

from ..load.rank_agreement import ALONE, Ranks
from ..stages import StagedStep, StepsUnderWay, send_message
from ..step.apply import StepRows
from ..step.slots import Ints
from . import runner
from .decode_graphs import Decoded
from .runner import (
    GpuParts,
    GpuRunner,
    GpuStep,
    LaunchedRun,
    StepObserver,
)
from .stage_part import StagePart


def start(*arguments: Any, ranks: Ranks = ALONE, **options: Any) -> GpuRunner:
    """The runner of this process, with the arguments of runner.start. `ranks` says which layers it
    has."""
    return runner.start(*arguments, ranks=ranks, kind=kind_of(ranks), **options)


def kind_of(ranks: Ranks) -> type[GpuRunner]:
    """What runs the layers of such a rank."""
    stage = ranks.stage
    if stage.is_whole:
        return GpuRunner
    if stage.is_first:
        return FirstStage
    return LastStage if stage.is_last else EarlierStage


class EarlierStage(GpuRunner):
    """An AsyncRunner (worker/runners.py): a stage before the last one. As it is, one between two
    others, whose results are empty. Arguments are those of GpuRunner."""

    def __init__(self, parts: GpuParts, *others: Any) -> None:
        super().__init__(parts, *others)
        self._stage = _part_of(parts)

    def _decode(self, slots: Ints, shared: Shared | None) -> LaunchedRun:
        decoded = self._replay(slots, shared, filtered=False)
        return self._hand_on(decoded, len(slots), slots)

    def _run_mixed(self, rows: StepRows, shared: Shared | None) -> LaunchedRun:
        decoded = self._mixed.run(rows, self._extra.host_known_len, shared)
        return self._hand_on(decoded, int(rows.counts.sum()), rows.slots[rows.sampling])

    def _hand_on(self, decoded: Decoded, tokens: int, sampling: Ints) -> LaunchedRun:
        """A step of `tokens` to the next stage, where `sampling` get a token, those whose masks are
        late excepted."""
        self._stage.hand_on(decoded.hidden, tokens)
        return LaunchedRun(ready=self._ready(sampling) if len(sampling) else None)

    def _admit_extra(self, new: Ints) -> None:
        # nothing is sampled here, so nothing need be counted for it
        self._extra.host_known_len[new] = self._slots.num_tokens[new]

    def _note_grammars(self, handle: GpuStep, slots: Ints) -> None:
        """Tokens come from the last stage."""


@dataclass
class FirstStep(GpuStep):
    """The handle of a step that begins here and ends in the last stage. staged: None where it has
    no rows, which no other stage answers."""

    staged: StagedStep | None = None

    def done(self) -> bool:
        """See GpuStep."""
        if self.staged is None:
            return super().done()
        if self.communicator is not None:
            self.communicator.check()
        return self.staged.done()

    def result(self) -> StepResult:
        """See runners.StepHandle."""
        return super().result() if self.staged is None else self.staged.result()


class FirstStage(EarlierStage):
    """The stage that is given tokens and answers. Arguments are those of GpuRunner."""

    def __init__(self, parts: GpuParts, *others: Any) -> None:
        super().__init__(parts, *others)
        results = self._stage.ranks.links.results
        self._under_way = StepsUnderWay(
            self._slots, self._masks, results, self._incarnation, self._upload_tokens
        )
        self._has_rows = False
        """The step that is launched."""

    def facts(self) -> WorkerFacts:
        """See AsyncRunner."""
        stages = self._stage.ranks.stage.count
        return replace(super().facts(), pipeline_parallel_size=stages)

    def notify(self, wake: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        """See AsyncRunner; `wake` is called from another thread."""
        self._under_way.receiver.wake = wake

    def clear(self) -> None:
        """See AsyncRunner. Results of steps under way still come."""
        super().clear()
        self._under_way.clear()

    def launch(self, step: Step) -> GpuStep:
        """See AsyncRunner. Waits for tokens that the step's own rows begin with. Raises
        CommunicatorFailed."""
        self._under_way.collect()
        self._under_way.admit(step)
        return super().launch(step)

    def _run(self, rows: StepRows, shared: Shared | None) -> LaunchedRun:
        self._has_rows = len(rows.slots) > 0
        if self._has_rows:
            self._under_way.wait_for(rows.slots)
        return super()._run(rows, shared)

    def _handle(self, step: Step, slots: npt.NDArray[np.int32], run: LaunchedRun) -> GpuStep:
        own = super()._handle(step, slots, run)
        staged = None
        if self._has_rows:
            staged = self._under_way.add(step, run.brings(slots.astype(np.int64)))
        known = {field.name: getattr(own, field.name) for field in fields(own)}
        return FirstStep(**known, staged=staged)

    def _upload_tokens(self, slots: Ints, tokens: npt.NDArray[np.int32]) -> None:
        """To the device, where the next step embeds them."""
        if not len(slots):
            return
        with torch.inference_mode():
            columns = np.stack((slots, tokens.astype(np.int64)))
            index, last_token = self._uploads.up(columns).unbind(0)
            self._state.last_token[index] = last_token.int()


class LastStage(GpuRunner):
    """An AsyncRunner (worker/runners.py): the stage that samples. What each step has sampled goes to
    the first stage, too. Arguments are those of GpuRunner."""

    def __init__(
        self,
        parts: GpuParts,
        cost: StepCost,
        incarnation: Incarnation,
        observers: list[StepObserver],
        communicator: CheckedCommunicator | None = None,
    ) -> None:
        ranks = _part_of(parts).ranks
        self._sender = ResultSender(ranks)
        connections = [self._sender, *([communicator] if communicator is not None else ())]
        super().__init__(parts, cost, incarnation, observers, CheckedConnections(connections))
        self._has_rows = False
        """The step that is launched."""

    def _run(self, rows: StepRows, shared: Shared | None) -> LaunchedRun:
        self._has_rows = len(rows.slots) > 0
        return super()._run(rows, shared)

    def _handle(self, step: Step, slots: npt.NDArray[np.int32], run: LaunchedRun) -> GpuStep:
        handle = super()._handle(step, slots, run)
        if self._has_rows:
            self._sender.put(handle)
        return handle


class ResultSender:
    """Sends the result of each step to the first stage as soon as it is there, in a thread: the
    worker's loop waits for other things too. A CheckedCommunicator."""

    def __init__(self, ranks: Ranks) -> None:
        """Of a rank of the last stage."""
        link = ranks.links.results
        assert link is not None
        self._link: PointToPoint = link
        layers = ranks.layers
        self._layers = layers if isinstance(layers, CheckedCommunicator) else None
        self._encode = msgspec.msgpack.Encoder().encode
        self._steps: queue.SimpleQueue[GpuStep] = queue.SimpleQueue()
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name="results", daemon=True).start()

    def put(self, step: GpuStep) -> None:
        """After those before it."""
        self._steps.put(step)

    def serve(self) -> None:
        """See CheckedCommunicator."""

    def check(self) -> None:
        """Raises what has ended the thread: CommunicatorFailed, or the GPU's RuntimeError."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while True:
                self._send(self._steps.get())
        except (OSError, RuntimeError) as error:
            self._failure = error

    def _send(self, step: GpuStep) -> None:
        step.event.synchronize()
        if self._layers is not None:
            self._layers.check()
        send_message(self._link, self._encode(step.result()))


def _part_of(parts: GpuParts) -> StagePart:
    assert parts.stage is not None
    return parts.stage
