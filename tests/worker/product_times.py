"""How long products with quantized matrices take on a GPU, beside those of the same sizes in
bfloat16: the four of an 8B layer, summed, in replayed graphs over more weights than caches hold.
And whether other launch shapes would be faster than those that are chosen.
"""

import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import torch
from pagewire_kernels import gemm
from pagewire_kernels.compile_ahead import Wanted, compile_all, noting
from pagewire_kernels.cuda_quantized import CudaQuantized, QuantizedMatrices
from pagewire_kernels.gemm_cublaslt import GemmAlgorithms
from pagewire_kernels.gemm_quantized import quantized_linear as multiply
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.packed_matrix import PackedMatrix
from pagewire_kernels.quantized import Quantized
from pagewire_kernels.quantized_shapes import QuantizedConfig, pick_config
from torch import Tensor
from triton.runtime.errors import OutOfResources

SHAPES: Final = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS: Final = (1, 16, 64, 128, 192, 256, 384, 512, 1024, 4096)
LEAST_BYTES: Final = 400_000_000
"""Of all copies of a matrix: several times the second-level cache."""
REPLAYS: Final = 30

Product = Callable[[Tensor], Tensor]
Rounded = Callable[[Tensor], Quantized]


def lines(forms: Mapping[str, Rounded]) -> Iterator[str]:
    """A line for bfloat16 and one for each form: microseconds by rows, and the share of
    bfloat16's."""
    plain = _sums(_dense)
    yield "bf16: " + ", ".join(f"{rows} rows {us:.1f} us" for rows, us in plain.items())
    for title, rounded in forms.items():
        sums = _sums(lambda n, k, rounded=rounded: [_quantized(n, k, rounded)])
        each = (f"{rows} rows {us:.1f} us ({us / plain[rows]:.2f})" for rows, us in sums.items())
        yield f"{title}: " + ", ".join(each)


def shapes(forms: Mapping[str, Rounded], most: int = 3) -> Iterator[str]:
    """For each form, size and number of rows the time with the chosen launch shape, and the `most`
    fastest that were tried."""
    for (title, rounded), (n, k) in itertools.product(forms.items(), SHAPES):
        copies = packed(n, k, rounded)
        for rows in ROWS[:5]:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            chosen = pick_config(rows, copies[0], x.dtype)
            configs = {chosen, *_candidates(rows, n, k)}
            compile_launches(
                lambda c=config, m=copies[0], x=x: multiply(x, m, config=c) for config in configs
            )
            tried = {config: _shape_time(copies, x, config) for config in configs}
            fastest = sorted(tried, key=lambda config: tried[config])[:most]
            others = "; ".join(f"{tried[config]:.1f} {config}" for config in fastest)
            yield f"{title}, {n} x {k}, {rows} rows: {tried[chosen]:.1f} us {chosen}; {others}"


def _candidates(rows: int, n: int, k: int) -> Iterator[QuantizedConfig]:
    """Some 100 to 1,100 programs, each of which has four steps at least."""
    row_tiles = (64, 128) if rows > 64 else (next(size for size in (16, 32, 64) if rows <= size),)
    tiles = itertools.product(row_tiles, (64, 128), (64, 128), (1, 2, 4, 8))
    for block_m, block_n, block_k, splits in tiles:
        programs = -(-rows // block_m) * n // block_n * splits
        if k // block_k // splits < 4 or not (100 <= programs <= 1100 or splits == 1):
            continue
        for warps in (4, 8) if block_n == 128 and block_m >= 64 else (4,):
            stages = 4 if block_m == 16 else 3
            yield QuantizedConfig(block_m, block_n, block_k, splits, warps, stages)


def _shape_time(copies: list[PackedMatrix], x: Tensor, config: QuantizedConfig) -> float:
    """Of one that is too large for this card: infinity."""
    try:
        return microseconds(
            [lambda x, m=matrix: multiply(x, m, config=config) for matrix in copies], x
        )
    except OutOfResources:
        return float("inf")


def _sums(make: Callable[[int, int], list[list[Product]]]) -> dict[int, float]:
    """make: for a shape, ways to the product, each over several copies of the matrix; the fastest
    counts. Microseconds of all SHAPES together, by rows."""
    sums: dict[int, float] = {}
    for n, k in SHAPES:
        ways = make(n, k)
        for rows in ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            fastest = min(microseconds(copies, x) for copies in ways)
            sums[rows] = sums.get(rows, 0.0) + fastest
    return sums


def _dense(n: int, k: int) -> list[list[Product]]:
    """cuBLAS, and whatever gemm.linear chooses."""
    count = -(-LEAST_BYTES // (2 * n * k))
    weights = [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16).mul_(0.02) for _ in range(count)
    ]
    algorithms = GemmAlgorithms()
    return [
        [lambda x, w=weight: torch.nn.functional.linear(x, w) for weight in weights],
        [lambda x, w=weight: gemm.linear(x, w, None, algorithms) for weight in weights],
    ]


def _quantized(n: int, k: int, rounded: Rounded) -> list[Product]:
    return [QuantizedMatrices([one], KernelChoices()) for one in packed(n, k, rounded)]


def packed(n: int, k: int, rounded: Rounded) -> list[PackedMatrix]:
    """Copies of a matrix of random weights."""
    matrices = CudaQuantized(KernelChoices()).pack(
        [rounded(torch.randn(n, k, device="cuda") * 0.02)], False
    )
    assert matrices is not None
    count = -(-LEAST_BYTES // matrices.nbytes)
    return [_copied(matrices.parts[0]) for _ in range(count)]


def _copied(matrix: PackedMatrix) -> PackedMatrix:
    scales = None if matrix.scales is None else matrix.scales.clone()
    return replace(matrix, words=matrix.words.clone(), scales=scales)


def compile_launches(calls: Iterable[Callable[[], object]]) -> None:
    """Compile the kernels that the calls launch, many at a time."""
    wanted: dict[Wanted, None] = {}
    with noting(wanted):
        for call in calls:
            call()
    compile_all(list(wanted), os.cpu_count() or 1, torch.device("cuda", 0))


def microseconds(copies: list[Product], x: Tensor) -> float:
    """Of one product: the median of replays of a graph that runs all copies."""
    for product in copies[:2]:
        product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in copies:
            product(x)
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(copies))
    return statistics.median(times)
