"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_row_int4.py [--device cuda|cpu] [--times] [--shapes]

Products of one row with codes of 4 bits (gemm_row_int4.py), with their norm, SiLU and residual, in
other launch shapes too, against float64: the error may be 1.05 times that of the same in torch with
weights, and x after its norm, in the type of x. Each is run twice and must give the same bits. A line
for each matrix, one for the verdict; the exit status is 0 when all is well. With `--device cpu` in
Triton's interpreter, small sizes. With `--times`, and all well, the four of an 8B layer are timed,
beside the product for several rows without anything around it; with `--shapes` in other launch
shapes, the five fastest of which are told.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import ops.conftest  # noqa: F401  # mends the interpreter

import torch
from pagewire_kernels import gemm_row, gemm_row_int4, reference
from pagewire_kernels.cuda_quantized import CudaQuantized
from pagewire_kernels.gemm_quantized import quantized_linear
from pagewire_kernels.gemm_row import Config
from pagewire_kernels.gemm_row_int4 import Int4RowConfig
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.packed_matrix import PackedMatrix
from pagewire_kernels.quantized import Quantized, quantize
from pagewire_kernels.quantized_decode import TILE
from torch import Tensor
from worker.gpu_oracle import begin, conclude
from worker.product_times import SHAPES, compile_launches, microseconds, packed

MOST = 1.05
EPS = 1e-5
ROWS = 8
"""Whose errors are taken together: few results of one row, some of which are large, say little."""
CONFIGS = (None, Int4RowConfig(1, 2, 3), Int4RowConfig(2, 8, 2, early=True))
MATRICES = (
    (28672, 4096, 128, True), (4096, 14336, 128, True), (6144, 4096, 64, True), (1536, 2112, 32, False),
    (1000, 1088, 64, False), (320, 896, 128, False),
)  # fmt: skip
SMALL = ((256, 512, 128, True), (70, 192, 32, False))
Product = Callable[[Tensor, PackedMatrix, Config | None], Tensor]


class Around(NamedTuple):
    """What a product has around it: norm [K], bias [N], residual [1, N]."""

    norm: Tensor
    bias: Tensor
    residual: Tensor


def around(k: int, n: int, dtype: torch.dtype, device: str) -> Around:
    return Around(*(torch.randn(size, device=device).to(dtype) for size in ((k,), (n,), (1, n))))


def products(o: Around) -> dict[str, Product]:
    """By name, each of x [1, K]."""
    return {
        "norm_linear": lambda x, w, c: gemm_row.norm_linear(x, o.norm, EPS, w, o.bias, c),
        "norm_gated": lambda x, w, c: gemm_row.norm_gated(x, o.norm, EPS, w, c),
        "linear_add": lambda x, w, c: gemm_row.linear_add(x, w, o.bias, o.residual, c),
    }


def expected(name: str, x: Tensor, full: Tensor, o: Around, dtype: torch.dtype) -> Tensor:
    """In float64; x after its norm, weights and results rounded to `dtype`."""
    if name != "linear_add":
        x = reference.rms_norm(x.float(), o.norm.float(), EPS)
    sums = x.to(dtype).double() @ full.to(dtype).double().T
    if name == "norm_gated":
        if len(full) % (2 * TILE):
            # SiLU comes after the product
            sums = sums.to(dtype).double()
        gate, up = sums.chunk(2, 1)
        return (torch.nn.functional.silu(gate) * up).to(dtype).double()
    sums = sums + o.bias.double()
    if name == "linear_add":
        sums = sums + o.residual.double()
    return sums.to(dtype).double()


def faults(
    rounded: Quantized, configs: Sequence[Config | None], dtype: torch.dtype
) -> Iterator[tuple[float, str]]:
    """(the error over what it may be, what is wrong, empty: nothing) of each product and shape."""
    matrices = CudaQuantized(KernelChoices()).pack([rounded], False)
    assert matrices is not None
    assert matrices.takes_row
    matrix = matrices.parts[0]
    n, k = matrix.shape
    device = matrix.words.device.type
    if device == "cuda":
        # kernels read weights before their wait: what makes these must be over
        torch.cuda.synchronize()
    full = matrices.dense(torch.float32).clone()
    rows = torch.randn(ROWS, 1, k, device=device).to(dtype)
    others = around(k, n, dtype, device)
    kinds = list(itertools.product(products(others).items(), configs))
    if device == "cuda":
        compile_launches(
            lambda product=product, config=config: product(rows[0], matrix, config)
            for (_, product), config in kinds
        )
    for (name, product), config in kinds:
        exact = [expected(name, x, full, others, torch.float64) for x in rows]
        rounded_to = torch.bfloat16 if device == "cpu" else dtype
        plain = [expected(name, x, full, others, rounded_to) for x in rows]
        out = [product(x, matrix, config) for x in rows]
        again = [product(x, matrix, config) for x in rows]
        share = _error(out, exact) / _error(plain, exact) / MOST
        text = f"{name} of {n} x {k}, groups of {matrix.group}, {dtype}, {config}"
        if not all(map(torch.equal, out, again)):
            yield share, f"{text}: two runs differ"
        else:
            yield share, "" if share <= 1 else f"{text}: {share:.2f} of the error allowed"


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Of all rows together."""
    return float((torch.cat(results).double() - torch.cat(exact)).norm())


def told(title: str, found: Sequence[tuple[float, str]]) -> list[str]:
    """What is wrong of `found`, which is printed as a line."""
    texts = [text for _, text in found if text]
    worst = max(share for share, _ in found)
    print(f"{title}: errors up to {worst:.3f} of what is allowed; {len(texts)} wrong", flush=True)
    return texts


def check(device: str) -> list[str]:
    """What is wrong, a line each."""
    small = device == "cpu"
    wrong: list[str] = []
    types = (torch.float32,) if small else (torch.bfloat16, torch.float16)
    for matrix, dtype in itertools.product(SMALL if small else MATRICES, types):
        torch.manual_seed(13)
        n, k, group, whole = matrix
        rounded = quantize(torch.randn(n, k, device=device) * 0.02, 4, group, whole_zeros=whole)
        wrong += told(f"{matrix}, {dtype}", list(faults(rounded, CONFIGS, dtype)))
    return wrong


def candidates(n: int, k: int, gated: bool) -> Iterator[Int4RowConfig]:
    """Up to some 2,000 programs, each of which has a step at least."""
    for strips, chunks, splits, early in itertools.product(
        (2,) if gated else (1, 2), (2, 4, 8), (1, 2, 4, 7, 8, 14, 16), (False, True)
    ):
        programs = n // 64 // (1 if gated else strips) * splits
        if (100 <= programs <= 2000 or splits == 1) and k // 64 // splits >= chunks:
            yield Int4RowConfig(strips, chunks, splits, early=early)


def time_of(
    product: Product, copies: list[PackedMatrix], x: Tensor, config: Config | None
) -> float:
    """Microseconds."""
    return microseconds([lambda x, w=w: product(x, w, config) for w in copies], x)


def timed(other_shapes: bool) -> Iterator[str]:
    """A line for each product of an 8B layer: microseconds."""
    names = ("norm_linear", "linear_add", "norm_gated", "linear_add")
    for (n, k), name in zip(SHAPES, names, strict=True):
        copies = packed(n, k, lambda w: quantize(w, 4, 128, whole_zeros=True))
        x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        product = products(around(k, n, x.dtype, "cuda"))[name]
        gated = name == "norm_gated"
        results = n // 2 if gated else n
        chosen = gemm_row_int4.pick_config(results, k, gated, name.startswith("norm"), 128)
        others = set(candidates(results, k, gated)) if other_shapes else set[Int4RowConfig]()
        tried = {c: time_of(product, copies, x, c) for c in others | {chosen}}
        alone = microseconds([lambda x, w=w: quantized_linear(x, w) for w in copies], x)
        fastest = sorted(tried, key=lambda config: tried[config])[:5]
        text = "; ".join(f"{tried[config]:.1f} {config}" for config in fastest)
        yield f"{name} {n} x {k}: {tried[chosen]:.1f} us {chosen}; without norm, residual and SiLU {alone:.1f}; {text}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Products of one row with codes of 4 bits.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--times", action="store_true", help="time the products of 8B, on a GPU")
    parser.add_argument("--shapes", action="store_true", help="time other launch shapes too")
    options = parser.parse_args()
    if not begin("gpu_row_int4", options.device):
        return 2
    status = conclude("gpu_row_int4", lambda: check(options.device))
    if options.device == "cuda" and not status and (options.times or options.shapes):
        for line in timed(options.shapes):
            print(line, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
