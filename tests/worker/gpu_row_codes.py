"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_row_codes.py [--device cuda|cpu] [--times]

Products of one row with codes of 8 bits (gemm_row_codes.py), as gpu_row_int4.py checks those of 4. With
`--times`, and all well, launch shapes are timed for the sizes of an 8B layer and of its head, beside
the product for several rows without anything around it; then the same sizes with codes of 4 bits in
groups of 32, as GGUF has them.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import ops.conftest  # noqa: F401  # mends the interpreter

import torch
from pagewire_kernels import gemm_row_codes, gemm_row_int4
from pagewire_kernels.gemm_quantized import quantized_linear
from pagewire_kernels.gemm_row import Config
from pagewire_kernels.gemm_row_codes import CodesRowConfig
from pagewire_kernels.quantized import Quantized, quantize
from torch import Tensor
from worker import gpu_row_int4
from worker.gpu_oracle import begin, conclude
from worker.gpu_row_int4 import around, faults, products, time_of, told
from worker.product_times import SHAPES, compile_launches, microseconds, packed

HEAD = (128256, 4096)
CONFIGS = (None, CodesRowConfig(8, 2), CodesRowConfig(4, 1, early=False))
CASES = (
    ("int8", 4096, 14336, 16), ("int8", 6144, 4096, 32), ("int8", 28672, 4096, 128), ("int8", 4096, 4096, 0),
    ("int8", 1000, 1088, 64), ("minima", 1024, 4096, 32), ("fp8", 6144, 4096, 128), ("fp8", 4096, 14336, 0),
)  # fmt: skip
SMALL = (("int8", 64, 576, 16), ("minima", 30, 192, 32), ("fp8", 64, 256, 128))
"""(kind of codes, rows, columns, group; 0: a scale a row)."""


def rounded_to(kind: str, weight: Tensor, group: int) -> Quantized:
    """Weights [N, K] as codes; "minima": with zero points that are no whole numbers."""
    columns = weight.shape[1]
    by_group = weight.unflatten(1, (-1, group or columns))
    if kind == "fp8":
        scale = (by_group.abs().amax(2) / 448).half().float()
        codes = (by_group / scale[:, :, None]).flatten(1).to(torch.float8_e4m3fn)
        return Quantized(codes, scale)
    if kind == "int8":
        return quantize(weight, 8, group or columns)
    low = by_group.amin(2).half().float()
    scale = ((by_group.amax(2) - low) / 31).half().float()
    codes = ((by_group - low[:, :, None]) / scale[:, :, None]).round().clamp(0, 31)
    return Quantized(codes.flatten(1).to(torch.int8), scale, low)


def check(device: str) -> list[str]:
    """What is wrong, a line each."""
    small = device == "cpu"
    wrong: list[str] = []
    types = (torch.float32,) if small else (torch.bfloat16, torch.float16)
    for case, dtype in itertools.product(SMALL if small else CASES, types):
        torch.manual_seed(13)
        kind, n, k, group = case
        rounded = rounded_to(kind, torch.randn(n, k, device=device) * 0.02, group)
        configs = CONFIGS if group else (None,)
        wrong += told(f"{case}, {dtype}", list(faults(rounded, configs, dtype)))
    return wrong


def _candidates() -> Iterator[CodesRowConfig]:
    for block_n, warps in itertools.product((2, 4), (1, 2, 4, 8)):
        yield CodesRowConfig(block_n, warps)
    yield CodesRowConfig(8, 8)


def timed(bits: int, group: int, n: int, k: int) -> str:
    """Of a product: microseconds as chosen, and in the fastest launch shapes."""
    copies = packed(n, k, lambda w: quantize(w, bits, group))
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    name = {6144: "norm_linear", 28672: "norm_gated"}.get(n, "linear_add")
    product = products(around(k, n, x.dtype, "cuda"))[name]
    gated = name == "norm_gated"
    results = n // 2 if gated else n
    chosen: Config = gemm_row_codes.pick_config(results, k, gated)
    configs: set[Config] = set(_candidates())
    if bits == 4:
        chosen = gemm_row_int4.pick_config(results, k, gated, name.startswith("norm"), group)
        configs = {c for c in gpu_row_int4.candidates(results, k, gated) if c.early}
    configs.add(chosen)
    compile_launches(lambda c=config: product(x, copies[0], c) for config in configs)
    tried = {config: time_of(product, copies, x, config) for config in configs}
    alone = microseconds([lambda x, w=w: quantized_linear(x, w) for w in copies], x)
    fastest = sorted(tried, key=lambda config: tried[config])[:4]
    text = "; ".join(f"{tried[config]:.1f} {config}" for config in fastest)
    return (
        f"{bits} bits, group {group}, {n} x {k} ({copies[0].nbytes / 1e6:.0f} MB): {tried[chosen]:.1f} us"
        f" {chosen}; for several rows, alone {alone:.1f}; {text}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Products of one row with codes of 8 bits.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--times", action="store_true", help="time launch shapes, on a GPU")
    options = parser.parse_args()
    if not begin("gpu_row_codes", options.device):
        return 2
    status = conclude("gpu_row_codes", lambda: check(options.device))
    if options.device == "cuda" and not status and options.times:
        sets = ((8, 16, (SHAPES[3], (1024, 4096), HEAD)), (8, 32, SHAPES),
                (4, 32, (*SHAPES, (5120, 4096))))  # fmt: skip
        for bits, group, sizes in sets:
            for n, k in sizes:
                print(timed(bits, group, n, k), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
