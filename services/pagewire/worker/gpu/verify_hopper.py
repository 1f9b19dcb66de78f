"""Kernels for Hopper are held against the general ones before they serve anybody: attention in the
very shapes it will be captured with, products with matrices of 4 bits in each way in which they are
shared out.

They are written in a language that changes between releases of Triton. Where two kernels disagree,
or one does not compile, the general one serves alone, and the log says so: slower answers, not wrong
ones.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Final

import torch
from pagewire_kernels import attention_prefill, hopper_plan
from pagewire_kernels.attention_prefill import LEAST_TOKENS, choose, prefill_attention
from pagewire_kernels.cuda_quantized import pack_matrix
from pagewire_kernels.gemm_quantized import dequantize
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.quantized import Quantized
from torch import Tensor

log = logging.getLogger("pagewire.worker")
COUNTS: Final = (130, 1, 7, 64, 1, 300, 16)
BEFORE: Final = (0, 40, 333, 5, 900, 128, 17)
"""New tokens of the rows, in turns, and tokens computed before them."""
LIVE: Final = 64
"""Rows with tokens, spread over the batch: enough, whatever its size."""
QUANTIZED_SHAPES: Final = (
    (70, 1024, 4096),
    (100, 1024, 512),
    (384, 28672, 512),
    (200, 1024, 4096),
    (300, 1024, 512),
    (768, 6144, 512),
)
"""Rows of x, and of a matrix, and its columns: tiles of 128 rows of x that are cut into splits, not
cut, and cut into ranges of steps, and the same with 256, on a GPU of 132 multiprocessors."""
TOLERANCE: Final = 0.02
"""Relative, several times what the rounding to bf16 of one kernel's weights makes."""


def check_prefill(choices: KernelChoices, cache: Tensor, heads: int, rows: Sequence[int]) -> None:
    """Switch the kernel off in `choices` where it is wrong or fails. cache [2, blocks, Hkv,
    block_size, D] of a layer, which is written over; heads: query heads; rows: the batches' padded
    row counts."""
    why = _what_is_wrong(comparisons(choices, cache, heads, rows))
    if not why:
        return
    choices.hopper_prefill = False
    log.warning(
        "the attention kernel for Hopper GPUs is not used: %s; prompts of thousands of tokens take up to a quarter longer",
        why,
    )


def check_quantized(choices: KernelChoices, dtype: torch.dtype, device: torch.device) -> None:
    """Switch the products of 4 bits off in `choices` where they are wrong or fail, with inputs of
    `dtype`."""
    why = _what_is_wrong(quantized_comparisons(choices, dtype, device))
    if not why:
        return
    choices.hopper_quantized = False
    log.warning(
        "the product of 4 bits for Hopper GPUs is not used: %s; steps of more than %d tokens take longer",
        why,
        hopper_plan.LEAST_ROWS - 1,
    )


def _what_is_wrong(runs: Sequence[Callable[[], float]]) -> str:
    """Of a kernel, by what `runs` say of its results; empty where all is well."""
    try:
        worst = max((run() for run in runs), default=0.0)
    except Exception as error:  # whatever an experimental compiler raises
        return f"it failed: {str(error)[:200]}"
    if worst <= TOLERANCE:
        return ""
    return f"its results differ from the general kernel's by {worst:.3g} of their size"


def quantized_comparisons(
    choices: KernelChoices, dtype: torch.dtype, device: torch.device
) -> list[Callable[[], float]]:
    """A `quantized_disagreement` for each way of sharing out and each form of the matrices that were
    packed; none where the kernel is switched off or takes no such products."""
    probe = torch.empty(hopper_plan.LEAST_ROWS, 64, dtype=dtype, device=device)
    if not choices.hopper_quantized or not hopper_plan.takes_inputs(probe):
        return []
    return [
        functools.partial(quantized_disagreement, form, shape, dtype, device)
        for form in sorted(choices.int4_groups)
        for shape in QUANTIZED_SHAPES
    ]


def quantized_disagreement(
    form: tuple[int, bool], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> float:
    """The relative norm of the difference between the kernel's product of random numbers and the
    one with the dequantized matrix; infinity for NaN. form: see KernelChoices.int4_groups; shape:
    rows of x, and of the matrix, and columns."""
    from pagewire_kernels.gemm_quantized_hopper import hopper_linear

    group, rest = form
    rows, n, k = shape
    scale = torch.rand(n, k // group, device=device) * 0.01 + 0.01
    minimum = scale * (-7.3 if rest else -7.0)
    codes = torch.randint(16, (n, k), dtype=torch.uint8, device=device)
    matrix = pack_matrix([Quantized(codes, scale.half().float(), minimum.half().float())])
    x = torch.randn(rows, k, dtype=dtype, device=device)
    out = torch.full((rows, n), float("nan"), dtype=dtype, device=device)
    hopper_linear(x, matrix, None, out)
    exact = (x @ dequantize(matrix, dtype).T).float()
    error = float((out.float() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


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
