"""A model in pipeline stages on CPUs: the runners of ranks that have some of its layers. What stages
have in common with those on other devices is in worker/stages.py.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
import torch
from pagewire_kernels.communicator import PointToPoint
from pagewire_protocol.messages import Step, StepResult
from torch import Tensor

from ..load.loader import Loaded
from ..load.rank_agreement import Ranks
from ..models.decoder import HiddenStates, LogitsHook
from ..runners import AsyncFromSync, AsyncRunner, CompletedStep, OnCpu, StepHandle
from ..stages import StepsUnderWay, decoder_of, send_message
from ..step.apply import StepRows
from ..step.slots import Ints
from .runner import CpuSteps, Runner, StepTokens

UNKNOWN: Final = -1
"""In place of a token that another stage samples."""


def start(*arguments: Any, ranks: Ranks, **options: Any) -> AsyncRunner:
    """The runner of this process, with the arguments of CpuSteps. `ranks` says which layers it has."""
    stage = ranks.stage
    if stage.is_whole:
        return AsyncFromSync(Runner(*arguments, ranks=ranks, **options))
    if stage.is_first:
        return FirstStage(*arguments, ranks=ranks, **options)
    kind = LastStage if stage.is_last else MiddleStage
    return AsyncFromSync(kind(*arguments, ranks=ranks, **options))


class HiddenStatesLink:
    """A connection to a neighbouring stage, for hidden states. A residual goes in float32, whatever
    the model's type: back ends on CPUs keep it so."""

    def __init__(self, link: PointToPoint | None, loaded: Loaded) -> None:
        assert link is not None
        self._link = link
        self._width = loaded.decoder.arch.hidden_size
        self._dtype = loaded.dtype
        self._has_residual = loaded.decoder.arch.block != "post"

    def send(self, hidden: HiddenStates) -> None:
        """Raises CommunicatorFailed."""
        parts = [hidden.x.to(self._dtype)]
        if self._has_residual:
            assert hidden.residual is not None
            parts.insert(0, hidden.residual.float())
        self._link.send(torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]))

    def recv(self, count: int) -> HiddenStates:
        """Of `count` tokens. Raises CommunicatorFailed."""
        shape = (count, self._width)
        size = count * self._width
        wide = size * torch.float32.itemsize if self._has_residual else 0
        received = torch.empty(wide + size * self._dtype.itemsize, dtype=torch.uint8)
        self._link.recv(received)
        x = received[wide:].view(self._dtype).view(shape)
        if not self._has_residual:
            return HiddenStates(x)
        return HiddenStates(x, received[:wide].view(torch.float32).view(shape))


class EarlierStage(CpuSteps):
    """What stages before the last one have in common. Arguments are those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._decoder = decoder_of(self._loaded.decoder)
        self._following = HiddenStatesLink(ranks.links.following, self._loaded)

    def _hand_on(self, hidden: HiddenStates, tokens: StepTokens) -> None:
        """Through the layers of this stage, and to the next one."""
        loaded = self._loaded
        hidden = self._decoder.run_layers(
            hidden, loaded.cos_sin, self._caches, tokens.batch, self._tick
        )
        self._following.send(hidden)

    def _count_sampled(self, rows: StepRows) -> Ints:
        """The slots that get a token with this step, which is counted as there; those whose masks
        are late get none, and compute their last one again."""
        slots = rows.slots[rows.sampling]
        if self._masks.any and len(slots):
            ready = self._masks.ready(slots, self._slots.num_output_tokens(slots))
            self._slots.hold_back(slots[~ready])
            slots = slots[ready]
        self._slots.append_tokens(slots, np.full(len(slots), UNKNOWN, np.int32))
        return slots


class FirstStage(EarlierStage, OnCpu):
    """An AsyncRunner (worker/runners.py): the stage that is given tokens and answers. Arguments are
    those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._under_way = StepsUnderWay(
            self._slots, self._masks, ranks.links.results, self._incarnation
        )

    def notify(self, wake: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        """See AsyncRunner."""
        self._under_way.receiver.wake = wake

    def clear(self) -> None:
        """Forget every request: there is a new scheduler. Results of steps under way still come."""
        super().clear()
        self._under_way.clear()

    def launch(self, step: Step) -> StepHandle:
        """See AsyncRunner. Waits for tokens that the step's own rows begin with. Raises
        CommunicatorFailed."""
        self._under_way.collect()
        self._under_way.admit(step)
        rows = self._begin(step)
        if not len(rows.slots):
            return CompletedStep(self._empty_result(step))
        self._under_way.wait_for(rows.slots)
        with torch.inference_mode():
            tokens = self._prepare(rows)
            self._hand_on(self._decoder.embed(self._ids(tokens), tokens.batch), tokens)
        return self._under_way.add(step, self._count_sampled(rows))


class MiddleStage(EarlierStage):
    """A SyncRunner (worker/runners.py) between two other stages. Arguments are those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._previous = HiddenStatesLink(ranks.links.previous, self._loaded)

    def execute(self, step: Step) -> StepResult:
        """This stage's part of a forward pass; the result is empty. Raises BadStep for a step that
        contradicts the slots, and CommunicatorFailed."""
        rows = self._begin(step)
        if len(rows.slots):
            with torch.inference_mode():
                tokens = self._prepare(rows)
                self._hand_on(self._previous.recv(len(tokens.positions)), tokens)
            self._count_sampled(rows)
        return self._empty_result(step)


class LastStage(Runner):
    """A SyncRunner (worker/runners.py): the stage that samples. Arguments are those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._decoder = decoder_of(self._loaded.decoder)
        self._previous = HiddenStatesLink(ranks.links.previous, self._loaded)
        assert ranks.links.results is not None
        self._results = ranks.links.results
        self._encode = msgspec.msgpack.Encoder().encode

    def execute(self, step: Step) -> StepResult:
        """The end of a forward pass. Its result goes to the first stage, too. Raises BadStep for a
        step that contradicts the slots, and CommunicatorFailed."""
        rows = self._begin(step)
        result = self._answer(step, rows)
        if len(rows.slots):
            send_message(self._results, self._encode(result))
        return result

    def _logits(self, tokens: StepTokens, wanted: Tensor | None, hook: LogitsHook | None) -> Tensor:
        loaded = self._loaded
        hidden = self._decoder.run_layers(
            self._previous.recv(len(tokens.positions)),
            loaded.cos_sin,
            self._caches,
            tokens.batch,
            self._tick,
        )
        return self._decoder.logits(hidden, tokens.batch, wanted, hook)
