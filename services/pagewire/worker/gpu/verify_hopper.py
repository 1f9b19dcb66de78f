"""The Hopper kernel is held against the general one before it serves anybody, in the very shapes it
will be captured with.

It is written in a language that changes between releases of Triton. Where the two disagree, or it
does not compile, the general kernel serves alone, and the log says so: slower answers, not wrong
ones.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Final

import torch
from pagewire_kernels import attention_prefill
from pagewire_kernels.attention_prefill import LEAST_TOKENS, choose, prefill_attention
from pagewire_kernels.kernel_choices import KernelChoices
from torch import Tensor

log = logging.getLogger("pagewire.worker")
COUNTS: Final = (130, 1, 7, 64, 1, 300, 16)
BEFORE: Final = (0, 40, 333, 5, 900, 128, 17)
"""New tokens of the rows, in turns, and tokens computed before them."""
LIVE: Final = 64
"""Rows with tokens, spread over the batch: enough, whatever its size."""
TOLERANCE: Final = 0.02
"""Relative, several times what the rounding to bf16 of one kernel's weights makes."""


def check_prefill(choices: KernelChoices, cache: Tensor, heads: int, rows: Sequence[int]) -> None:
    """Switch the kernel off in `choices` where it is wrong or fails. cache [2, blocks, Hkv,
    block_size, D] of a layer, which is written over; heads: query heads; rows: the batches' padded
    row counts."""
    runs = comparisons(choices, cache, heads, rows)
    if not runs:
        return
    try:
        worst = max(run() for run in runs)
        if worst <= TOLERANCE:
            return
        why = f"its results differ from the general kernel's by {worst:.3g} of their size"
    except Exception as error:  # whatever an experimental compiler raises
        why = f"it failed: {str(error)[:200]}"
    choices.hopper_prefill = False
    log.warning(
        "the attention kernel for Hopper GPUs is not used: %s; prompts of thousands of tokens take up to a quarter longer",
        why,
    )


def _batch(rows: int, room: int) -> tuple[list[int], list[int]]:
    """(new tokens, all tokens) of each of `rows` rows, none longer than `room`; zeros are padding,
    as the last three rows of several are."""
    counts = [0] * rows
    lengths = [0] * rows
    apart = -(-rows // LIVE)
    for i, row in enumerate(range(0, max(1, rows - 3), apart)):
        counts[row] = min(COUNTS[i % len(COUNTS)], room)
        lengths[row] = min(counts[row] + BEFORE[i % len(BEFORE)], room)
    return counts, lengths


def comparisons(
    choices: KernelChoices, cache: Tensor, heads: int, rows: Sequence[int]
) -> list[Callable[[], float]]:
    """A `disagreement` for each of `rows`; none where the kernel is switched off or takes no such
    heads. Arguments are those of check_prefill."""
    keys, values = cache
    probe = torch.empty(
        LEAST_TOKENS, heads, cache.shape[-1], dtype=cache.dtype, device=cache.device
    )
    if not choices.hopper_prefill or not attention_prefill.takes_hopper(probe, keys, values):
        return []
    return [functools.partial(disagreement, keys, values, heads, count) for count in rows]


def disagreement(keys: Tensor, values: Tensor, heads: int, rows: int) -> float:
    """The relative norm of the two kernels' difference over a batch of `rows` rows, some of one
    token, some padding; infinity for NaN."""
    blocks, _, page, dim = keys.shape
    used = min(blocks, 256)
    keys[:used].normal_()
    values[:used].normal_()
    counts, lengths = _batch(rows, used * page)
    device = keys.device
    starts = torch.tensor([0, *counts], device=device).cumsum(0).int()
    tables = torch.randint(used, (rows, -(-max(lengths) // page)), dtype=torch.int32, device=device)
    q = torch.randn(max(LEAST_TOKENS, sum(counts)), heads, dim, dtype=keys.dtype, device=device)
    results: list[Tensor] = []
    for config in (None, choose(dim, q.element_size(), keys.element_size()).first(device)):
        out = torch.zeros(len(q), heads * dim, dtype=q.dtype, device=device)
        sizes = torch.tensor(lengths, device=device).int()
        prefill_attention(
            q, keys, values, tables, sizes, starts, dim**-0.5, skip_one=True, out=out, config=config
        )
        results.append(out.float())
    error = float((results[0] - results[1]).norm() / results[1].norm())
    return error if error == error else float("inf")
