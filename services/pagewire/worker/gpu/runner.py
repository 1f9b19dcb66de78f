"""The runner on a GPU: steps are launched ahead and their tokens read back later, so that the GPU
never waits for the CPU.

`launch` puts a step on the stream and returns at once; its Flight knows when the result has
arrived. Slots are kept twice: as columns on the host (lengths and tables, which are known ahead)
and on the device (last tokens too, which are not).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import astuple, replace
from pagewire_kernels import cuda
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.columns import FIRST_INCARNATION, Incarnation
from pagewire_protocol.messages import Shared, Step, StepResult, WorkerFacts
from torch import Tensor

from ...config import ModelConfig, SchedulerConfig, WorkerConfig
from ..load import gpu_memory, loader, memory_errors, weights
from ..step.apply import NO_SLOTS, apply_step, facts_of, spread
from ..step.slots import Ints, Slots
from . import gemm_autotune, step_cost, verify_hopper
from .decode_graphs import DecodeGraphs
from .mixed_steps import MixedSteps
from .resample import Extra, ExtraSampling
from .staging import Uploads, Waiter
from .step_meter import Meter

log = logging.getLogger("pagewire.worker")
RING: Final = 16
"""Results that may be on their way at once."""


@dataclass
class Flight:
    """A launched step. `report` is pinned memory, meaningful once `event` has happened: a token a
    row, -1 where logits were not finite."""

    step: Step
    incarnation: Incarnation
    slots: npt.NDArray[np.int32]
    report: Tensor
    event: torch.cuda.Event
    extra: Extra | None

    def done(self) -> bool:
        """Raises RuntimeError when the GPU has failed."""
        return self.event.query()

    def result(self) -> StepResult:
        tokens = self.report.numpy()[: len(self.slots)]
        bad = tokens < 0
        logprobs, prompts = (
            (self.extra.columns(tokens), self.extra.prompt_logprobs()) if self.extra else (None, ())
        )
        kept = np.where(bad, 0, tokens).astype(np.int32)
        step = self.step
        columns = self.slots.tobytes(), kept.tobytes(), bad.view(np.uint8).tobytes()
        return StepResult(step.epoch, self.incarnation, step.n, *columns, logprobs, prompts)


class CudaRunner:
    """facts, launch, clear: what the loop uses. See `runner.Runner` for what a step means; raises
    BadStep likewise."""

    def __init__(
        self,
        path: Path,
        model: ModelConfig,
        scheduler: SchedulerConfig,
        config: WorkerConfig,
        incarnation: Incarnation = FIRST_INCARNATION,
        progress: weights.Progress = lambda stage, fraction: None,
    ) -> None:
        self._incarnation = incarnation
        self._loaded = loader.load(path, model, config, progress, scheduler)
        sizing, plan, eager = (
            self._loaded.sizing,
            self._loaded.on_gpu,
            config.enforce_eager or not self._loaded.capturable,
        )
        self._slots = Slots(plan.rows, sizing.max_model_len, config.block_size)
        cascade = scheduler.enable_cascade and not plan.attends_by_torch
        with torch.inference_mode(), memory_errors.explained("capturing graphs", sizing):
            self._state = SlotState.empty(
                self._slots.count + 1, self._slots.tables.shape[1], "cuda"
            )
            self._uploads, pool = Uploads("cuda"), torch.cuda.graph_pool_handle()
            self._graphs = DecodeGraphs(
                self._loaded, self._state, self._slots.count, eager, cascade, pool
            )
            self._special = ExtraSampling(self._loaded, self._slots, self._state, self._uploads)
            self._steps = MixedSteps(
                self._loaded, self._slots, self._state, self._uploads, eager, cascade, pool
            )
            if config.hopper_attention:
                verify_hopper.check_prefill(
                    cuda.OPS.choices,
                    self._loaded.caches[0],
                    self._loaded.decoder.arch.num_heads,
                    self._steps.row_counts(),
                )
            else:
                cuda.OPS.choices.hopper_prefill = False
            if not eager:
                self._choose_products(plan.step_tokens, progress)
            self._steps.capture_all(
                plan.step_tokens,
                lambda fraction: progress("capturing steps with prompts", fraction),
            )
            self._graphs.capture_all(lambda fraction: progress("capturing decode steps", fraction))
            self._special.warm_up()
            self._cost = step_cost.measure(self._steps, self._loaded, plan.step_tokens)
        log.info(
            gpu_memory.outcome(
                sizing,
                torch.cuda.memory_reserved(),
                torch.cuda.max_memory_reserved(),
                torch.cuda.mem_get_info()[0],
            )
        )
        log.info(
            "steps take %.2f ms and %.4f a token; %.2f and %.2f a million pairs and reads",
            *astuple(self._cost),
        )
        self._ring = [
            torch.empty(self._slots.count, dtype=torch.int32, pin_memory=True) for _ in range(RING)
        ]
        self._waiter: Waiter | None = None
        self._meters = _meters(config)
        self._last = NO_SLOTS
        self._resident = NO_SLOTS
        """What the graphs' slot buffer holds."""
        self._cascade_size = 0
        """The bucket of the resident rows where they have blocks in common, else 0."""

    def _choose_products(self, largest: int, progress: weights.Progress) -> None:
        rows = sorted({*self._graphs.sizes, *self._graphs.cascade_sizes, *self._steps.row_counts()})
        tokens = sorted({*rows, *self._steps.sizes(largest)})
        gemm_autotune.choose(
            cuda.OPS.choices.gemm,
            self._steps.probe,
            tokens,
            rows,
            lambda fraction: progress("timing matrix products", fraction),
        )

    def facts(self) -> WorkerFacts:
        facts = facts_of(self._loaded, self._slots.count, bool(self._graphs.cascade_sizes))
        return replace(
            facts, cost=self._cost, max_num_batched_tokens=self._loaded.on_gpu.step_tokens
        )

    def notify(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from another thread, whenever a flight is done."""
        self._waiter = Waiter(wake)

    def clear(self) -> None:
        self._slots.clear()
        self._last = NO_SLOTS

    def launch(self, step: Step) -> Flight:
        with torch.inference_mode():
            slots, counts = apply_step(self._slots, step, self._last)
            self._last = slots
            for meter in self._meters:
                meter.begin()
            self._mirror(step)
            first, end = self._slots.take(slots, counts)
            sampling = self._slots.samples(slots, end)
            rows = slots[sampling]
            report, extra = self._run(step, slots, counts, first, end, sampling)
            self._slots.known[rows] += 1
            for meter in self._meters:
                meter.end(int(counts.sum()))
            return self._flight(step, rows.astype(np.int32), report, extra)

    def _flight(
        self, step: Step, rows: npt.NDArray[np.int32], report: Tensor | None, extra: Extra | None
    ) -> Flight:
        host = self._ring[step.n % RING]
        if report is not None:
            host[: len(rows)].copy_(report[: len(rows)], non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record()
        if self._waiter is not None:
            self._waiter.watch(event)
        return Flight(step, self._incarnation, rows, host, event, extra)

    def _mirror(self, step: Step) -> None:
        """Bring what the step changed in the host's slots to the device."""
        slots, state = self._slots, self._state
        if step.admit:
            self._admit(np.array([admission.slot for admission in step.admit], np.int64))
        if step.grow_slots:
            grown, extra = np.unique(
                np.frombuffer(step.grow_slots, np.int32).astype(np.int64), return_counts=True
            )
            rows, back = spread(np.zeros_like(grown), extra)
            last = slots.blocks[grown][rows] - 1 - back
            at = self._uploads.up(
                np.stack((grown[rows], last, slots.tables[grown[rows], last].astype(np.int64)))
            )
            state.table[at[0], at[1]] = at[2].int()

    def _admit(self, new: Ints) -> None:
        slots, state, up = self._slots, self._state, self._uploads.up
        index = up(new)
        width = max(1, int(slots.blocks[new].max()))
        state.table[:, :width][index] = up(slots.tables[new, :width])
        whole = np.stack(
            (slots.tokens[new, slots.known[new] - 1], slots.computed[new], slots.top_k[new])
        ).astype(np.int32)
        columns = up(whole)
        state.last_token[index], state.computed[index], state.top_k[index] = (
            columns[0],
            columns[1],
            columns[2],
        )
        state.odds[index] = up(
            np.stack((slots.temperature[new], slots.top_p[new], slots.min_p[new]), axis=1).astype(
                np.float32
            )
        )
        state.seeds[index] = up(slots.seed[new])
        self._special.admit(new)

    def _run(
        self,
        step: Step,
        slots: Ints,
        counts: Ints,
        first: Ints,
        end: Ints,
        sampling: npt.NDArray[np.bool_],
    ) -> tuple[Tensor | None, Extra | None]:
        if not len(slots):
            return None, None
        if sampling.all() and (counts == 1).all():
            return self._decode(slots, step.shared)
        return self._mixed(slots, counts, first, end, sampling, step.shared)

    def _filtered(self, slots: Ints) -> bool:
        columns = self._slots
        return bool(
            (
                (columns.top_p[slots] < 1) | (columns.top_k[slots] > 0) | (columns.min_p[slots] > 0)
            ).any()
        )

    def _decode(self, slots: Ints, shared: Shared | None) -> tuple[Tensor, Extra | None]:
        if slots is not self._resident:
            padded = np.full(len(self._graphs.slots), -1, np.int32)
            padded[: len(slots)] = slots
            self._uploads.up(padded, out=self._graphs.slots)
            self._resident, self._cascade_size = (
                slots,
                self._graphs.group(shared, len(slots), self._uploads),
            )
        size = self._cascade_size or self._graphs.bucket(len(slots))
        decoded = self._graphs.run(size, self._filtered(slots), self._cascade_size > 0)
        return decoded.report, self._special.resample(decoded.logits, slots, decoded.report)

    def _mixed(
        self,
        slots: Ints,
        counts: Ints,
        first: Ints,
        end: Ints,
        sampling: npt.NDArray[np.bool_],
        shared: Shared | None,
    ) -> tuple[Tensor | None, Extra | None]:
        extra = Extra()
        tap = self._special.prompt_tap(slots, first, end, extra)
        decoded = self._steps.run(
            slots, counts, first, end, np.flatnonzero(sampling), self._special.told, shared, tap
        )
        rows = slots[sampling]
        if not len(rows):
            return None, extra
        return decoded.report, self._special.resample(decoded.logits, rows, decoded.report, extra)


def _meters(config: WorkerConfig) -> list[Any]:
    """What looks on at every step."""
    found: list[Any] = [Meter()] if config.log_steps else []
    if config.log_kernels:
        from .kernel_profile import (
            KernelLog,
        )  # torch's profiler, which those who do not ask for it need not have

        found.append(KernelLog())
    return found
