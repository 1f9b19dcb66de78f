"""Whether the GPUs of one group's ranks may be of different kinds. Works on what torch reported."""

from collections.abc import Sequence

from .gpus import Gpu, NoUsableGpu


def check_alike(gpus: Sequence[Gpu]) -> str:
    """A line where the GPUs of the ranks, in their order, differ in what makes no other results;
    empty where they are of one kind. Raises NoUsableGpu where they differ in their compute
    capability: every rank samples all tokens by itself, and machine code of two kinds may draw
    different ones from the same logits."""
    if len({gpu.capability for gpu in gpus}) > 1:
        raise NoUsableGpu(
            f"the ranks' GPUs have different compute capabilities ({_capabilities(gpus)}): ranks draw "
            "the same tokens only with the same machine code; CUDA_VISIBLE_DEVICES chooses GPUs of one kind"
        )
    if len({gpu.name for gpu in gpus}) == 1 and _are_close([gpu.total for gpu in gpus]):
        return ""
    titles = ", ".join(f"rank {rank}: {gpu.title()}" for rank, gpu in enumerate(gpus))
    return (
        f"the ranks' GPUs are not of one kind ({titles}): all get the KV blocks and steps that the "
        "smallest has room for, and wait for the slowest"
    )


def _capabilities(gpus: Sequence[Gpu]) -> str:
    return ", ".join(
        f"rank {rank}: {gpu.title()}, {gpu.capability[0]}.{gpu.capability[1]}"
        for rank, gpu in enumerate(gpus)
    )


def _are_close(totals: Sequence[int]) -> bool:
    """Cards of one kind differ by what their drivers keep."""
    return max(totals) - min(totals) <= max(totals) // 50
