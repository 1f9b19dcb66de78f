"""What the ranks of a group must have alike: blocks, rows and lengths are the least that any of them
has room for. It is also where they wait for each other before anything large is allocated: what is
free is measured before.
"""

from dataclasses import replace

import torch
from pagewire_kernels.communicator import Communicator

from .gpu_plan import GpuPlan
from .kv_sizing import Sizing


def agreed(sizing: Sizing, communicator: Communicator) -> Sizing:
    """`sizing` of this rank with no more than any rank has."""
    if communicator.size == 1:
        return sizing
    blocks, longest = _least([sizing.num_blocks, sizing.max_model_len], communicator, "cpu")
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
        "cuda",
    )
    sizing = replace(sizing, num_blocks=blocks, max_model_len=longest)
    return GpuPlan(sizing, tokens, rows, bool(by_torch))


def _least(values: list[int], communicator: Communicator, device: str) -> list[int]:
    own = torch.tensor([values], dtype=torch.int64, device=device)
    least: list[int] = communicator.all_gather(own, 0).amin(0).tolist()
    return least
