"""What a GPU's runner works with, on the CPU: its kernels then run in Triton's interpreter, and what is
on its way to the device is there at once.
"""

from typing import Any

import numpy as np
import torch
from pagewire.worker.gpu.awaited_sampling import AwaitedSampling
from pagewire.worker.gpu.decode_graphs import DecodeGraphs
from pagewire.worker.gpu.mixed_steps import MixedSteps
from pagewire.worker.gpu.resample import ExtraSampling
from pagewire.worker.gpu.runner import RING, GpuParts
from pagewire.worker.gpu.stage_part import StagePart
from pagewire.worker.load.loader import Loaded
from pagewire.worker.step.grammar_masks import GrammarMasks
from pagewire.worker.step.slots import Slots
from pagewire_kernels.masked_sampling import sample_masked
from pagewire_kernels.slot_state import SlotState


class Uploads:
    def up(self, values: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        copy = torch.from_numpy(np.ascontiguousarray(values).copy())
        return copy if out is None else out.copy_(copy)

    def staging(self, size: int) -> "Staging":
        return Staging(size)


class Staging:
    def __init__(self, size: int) -> None:
        self.host = torch.zeros(size, dtype=torch.uint8)

    def wait(self) -> None:
        pass

    def send(self, size: int, out: torch.Tensor) -> None:
        out[:size].copy_(self.host[:size])


class Event:
    def __init__(self, **options: Any) -> None:
        self._recorded = False

    def record(self) -> None:
        self._recorded = True

    def query(self) -> bool:
        return self._recorded

    def synchronize(self) -> None:
        assert self._recorded


class SlowEvent(Event):
    """Not seen to have happened before `LOOKS` more looks at any of them, or until it is waited
    for."""

    LOOKS = 5
    looks = 0

    def record(self) -> None:
        super().record()
        self._at = SlowEvent.looks + self.LOOKS

    def query(self) -> bool:
        SlowEvent.looks += 1
        return self._recorded and SlowEvent.looks >= self._at

    def synchronize(self) -> None:
        super().synchronize()
        self._at = 0


def parts(
    loaded: Loaded,
    count: int,
    masks: GrammarMasks,
    stage: StagePart | None = None,
    awaits: bool = False,
) -> GpuParts:
    """Of a model on the CPU, with `count` slots. Nothing is captured. awaits: the device takes masks
    itself."""
    slots = Slots(count, loaded.sizing.max_model_len, loaded.sizing.block_size)
    state = SlotState.empty(count + 1, slots.tables.shape[1], "cpu")
    uploads: Any = Uploads()
    awaited = None
    if awaits:
        vocab_size = loaded.decoder.arch.vocab_size
        awaited = AwaitedSampling(slots, state, uploads, masks, vocab_size, sample_masked)
    eager: Any = {"eager": True, "cascade": False, "pool": None, "stage": stage}
    return GpuParts(
        loaded,
        slots,
        state,
        uploads,
        DecodeGraphs(loaded, state, count, **eager),
        MixedSteps(loaded, slots, state, uploads, **eager),
        ExtraSampling(loaded, slots, state, uploads, masks, awaited=awaited),
        masks,
        [torch.empty(count, dtype=torch.int32) for _ in range(RING)],
        stage,
    )
