"""What the ranks of a group must have alike: blocks, rows and lengths are the least that any of
them has room for. It is also where they wait for each other before anything large is allocated:
what is free is measured before.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import torch
from pagewire_kernels.communicator import (
    SINGLE_RANK,
    CheckedCommunicator,
    CheckedConnections,
    Communicator,
    PointToPoint,
)

from ..device.gpu_kinds import check_alike
from ..device.gpus import Gpu
from ..models.ranks import WHOLE_MODEL, PipelineStage
from .gpu_plan import GpuPlan
from .kv_sizing import DoesNotFit, Sizing

log = logging.getLogger("pagewire.worker")
GPU_BYTES: Final = 1024
"""Room for what ranks say of their GPUs."""


@dataclass(frozen=True)
class StageLinks:
    """A pipeline stage's connections to others, of this rank to the one with the same number in its
    tensor-parallel group. previous, following: of hidden states, from the stage before and to the
    stage after. results: of what was sampled, from the last stage to the first. None: there is none
    at this stage."""

    previous: PointToPoint | None = None
    following: PointToPoint | None = None
    results: PointToPoint | None = None


@dataclass(frozen=True)
class Ranks:
    """How a worker reaches the other ranks of its group. layers: those that hold parts of the same
    layers, for tensors on the model's device, within steps. host: all of them, for tensors on the
    CPU while a model is loaded, which may take long. stage: which layers those are. of_host: (the
    number of this one among those of its host, how many these are) where there are several
    hosts."""

    layers: Communicator
    host: Communicator
    stage: PipelineStage = WHOLE_MODEL
    links: StageLinks = StageLinks()
    of_host: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.host.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.host.size

    @property
    def local(self) -> tuple[int, int]:
        """(the number of this process among the ranks of its host, how many these are), who share
        cores, memory and caches."""
        return self.of_host or (self.rank, self.size)

    def checked(self) -> CheckedCommunicator | None:
        """The connections whose operations may fail unseen, as one; None: there are none."""
        connections = (self.layers, self.links.previous, self.links.following)
        found = [each for each in connections if isinstance(each, CheckedCommunicator)]
        return CheckedConnections(found) if found else None

    def wait(self) -> None:
        """Until all ranks are here."""
        self.host.all_gather(torch.zeros(1), 0)


ALONE: Final = Ranks(SINGLE_RANK, SINGLE_RANK)


@contextlib.contextmanager
def named_rank(communicator: Communicator) -> Iterator[None]:
    """Within, a DoesNotFit says which rank has too little room."""
    try:
        yield
    except DoesNotFit as error:
        if communicator.size == 1:
            raise
        raise DoesNotFit(f"rank {communicator.rank} of {communicator.size}: {error}") from None


def agreed(sizing: Sizing, communicator: Communicator) -> Sizing:
    """`sizing` of this rank with no more than any rank has."""
    if communicator.size == 1:
        return sizing
    blocks, longest = _least([sizing.num_blocks, sizing.max_model_len], communicator)
    return replace(sizing, num_blocks=blocks, max_model_len=longest)


def agreed_plan(plan: GpuPlan, communicator: Communicator) -> GpuPlan:
    """The same for a plan on a GPU."""
    if communicator.size == 1:
        return plan
    sizing = plan.sizing
    blocks, longest, tokens, rows, by_torch = _least(
        [
            sizing.num_blocks,
            sizing.max_model_len,
            plan.step_tokens,
            plan.rows,
            -int(plan.attends_by_torch),
        ],
        communicator,
    )
    sizing = replace(sizing, num_blocks=blocks, max_model_len=longest)
    return GpuPlan(sizing, tokens, rows, bool(by_torch))


def check_gpus(gpu: Gpu, communicator: Communicator) -> None:
    """Say once where the ranks' GPUs are not of one kind; `gpu` is this rank's. Raises
    gpus.NoUsableGpu, on all ranks alike, where they cannot be one group."""
    if communicator.size == 1:
        return
    text = msgspec.json.encode(replace(gpu, others=()))
    mine = torch.zeros(1, GPU_BYTES, dtype=torch.uint8)
    mine[0, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    every = [bytes(row.tolist()).rstrip(b"\0") for row in communicator.all_gather(mine, 0)]
    line = check_alike([msgspec.json.decode(row, type=Gpu) for row in every])
    if line and communicator.rank == 0:
        log.warning("%s", line)


def _least(values: list[int], communicator: Communicator) -> list[int]:
    mine = torch.tensor([values], dtype=torch.int64)
    least: list[int] = communicator.all_gather(mine, 0).amin(0).tolist()
    return least
