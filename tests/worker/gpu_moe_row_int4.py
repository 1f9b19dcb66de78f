"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_moe_row_int4.py [--device cuda|cpu] [--times]

One row through experts with codes of 4 bits (moe_row_int4.py), of Qwen3-30B-A3B's and Mixtral
8x7B's sizes, against float64 over the dequantized matrices; as chosen and in other launch shapes,
with a place that has no expert, each twice for the same bits, and in a captured graph whose inputs
change. With `--times`, and all well: microseconds of both products, as chosen, with every other
shape of the one or the other, and of the grouped products that other rows take. The exit status is 0 when all is well.
With `--device cpu` in Triton's interpreter, small sizes: does the check itself work?
"""

import argparse
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import ops.conftest  # noqa: F401  # mends the interpreter

import torch
from ops.moe_cases import MoeCase
from pagewire_kernels import moe_quantized, moe_row_int4
from pagewire_kernels.cuda_quantized import CudaQuantized
from pagewire_kernels.gemm_row_int4 import Int4RowConfig
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.packed_matrix import PackedExperts
from pagewire_kernels.quantized import quantize
from torch import Tensor

GROUP = 128
SETS = 4
"""Of matrices, so that caches do not hold what is timed."""
UP = tuple(itertools.product((8, 4, 2), (1, 2, 4, 8)))
"""(chunks a step, splits) to try."""
DOWN = (
    (2, 3), (2, 4), (2, 6), (4, 1), (4, 2), (4, 3), (4, 8), (4, 14), (8, 1), (8, 2), (8, 4), (8, 7), (8, 8), (8, 14)
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int


CUDA = (Sizes("Qwen3-30B-A3B", 2048, 768, 128, 8), Sizes("Mixtral 8x7B", 4096, 14336, 8, 2))
SMALL = (Sizes("small", 256, 384, 6, 3),)


def packed(sizes: Sizes, halves: int, device: str) -> tuple[PackedExperts, Tensor]:
    """Matrices, and what their codes stand for: [E, halves * N, K] float32."""
    n, k = (sizes.inner, sizes.hidden) if halves == 2 else (sizes.hidden, sizes.inner)
    ops = CudaQuantized(KernelChoices())
    parts = [
        [
            quantize(torch.randn(n, k, device=device) * 0.02, 4, GROUP, whole_zeros=True)
            for _ in range(halves)
        ]
        for _ in range(sizes.experts)
    ]
    full = torch.stack([torch.cat([part.dequantize() for part in each]) for each in parts])
    stacked = ops.pack_experts(parts)
    assert stacked is not None
    return stacked, full


@dataclass
class Inputs:
    x: Tensor
    ids: Tensor
    shares: Tensor
    residual: Tensor


def inputs_of(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    chosen = torch.randperm(sizes.experts, device=device)[: sizes.top_k]
    return Inputs(
        torch.randn(1, sizes.hidden, device=device).to(dtype),
        chosen[None].int().contiguous(),
        torch.rand(1, sizes.top_k, device=device),
        torch.randn(1, sizes.hidden, device=device).to(dtype),
    )


def that_fit(shapes: Sequence[tuple[int, int]], k: int) -> list[Int4RowConfig]:
    """Those in which each split of an inner dimension has a step."""
    found: list[Int4RowConfig] = []
    for chunks, splits in shapes:
        steps = math.ceil(k // 64 / chunks)
        span = math.ceil(steps / splits)
        if splits == math.ceil(steps / span):
            found.append(Int4RowConfig(1, chunks, splits, early=True))
    return found


def shapes_of(sizes: Sizes) -> Iterator[tuple[Int4RowConfig | None, Int4RowConfig | None]]:
    """Of both products: as chosen, and the one or the other in another shape."""
    yield None, None
    for config in that_fit(UP, sizes.hidden):
        yield config, None
    for config in that_fit(DOWN, sizes.inner):
        yield None, config


def exact(case: Inputs, gate_up: Tensor, down: Tensor) -> Tensor:
    """float64; places without an expert add nothing."""
    there = case.ids[0] >= 0
    ids, shares = case.ids[:, there], case.shares[:, there]
    found = MoeCase(case.x.double(), gate_up, down, ids, shares).exact()
    return found.double() + case.residual.double()


def check(sizes: Sizes, device: str) -> Iterator[str]:
    """What is wrong."""
    gate_up, full_up = packed(sizes, 2, device)
    down, full_down = packed(sizes, 1, device)
    for dtype in (torch.bfloat16, torch.float16):
        for number, shapes in enumerate(shapes_of(sizes)):
            case = inputs_of(sizes, dtype, device)
            if number % 3 == 2:
                case.ids[0, -1] = -1
            run = lambda c=case, s=shapes: moe_row_int4.experts_of_row(  # noqa: E731
                c.x, gate_up, down, c.ids, c.shares, c.residual, *s
            )
            out, again = run(), run()
            wanted = exact(case, full_up, full_down)
            apart = float((out.double() - wanted).norm() / wanted.norm())
            if not apart < 2 * torch.finfo(dtype).eps:
                yield f"{sizes.name}, {dtype}, {shapes}: error {apart:.1e}"
            if not torch.equal(out, again):
                yield f"{sizes.name}, {dtype}, {shapes}: not the same bits again"
    if device == "cuda":
        yield from check_replays(sizes, gate_up, down)


def check_replays(sizes: Sizes, gate_up: PackedExperts, down: PackedExperts) -> Iterator[str]:
    case = inputs_of(sizes, torch.bfloat16, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_row_int4.experts_of_row(
            case.x, gate_up, down, case.ids, case.shares, case.residual
        )
    for number in range(20):
        fresh = inputs_of(sizes, torch.bfloat16, "cuda")
        for name, value in vars(fresh).items():
            getattr(case, name).copy_(value)
        graph.replay()
        alone = moe_row_int4.experts_of_row(
            case.x, gate_up, down, case.ids, case.shares, case.residual
        )
        if not torch.equal(out, alone):
            yield f"{sizes.name}: replay {number} differs"


def microseconds(launch: Callable[[int], Any]) -> float:
    for i in range(SETS):
        launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(6 * SETS):
            launch(i % SETS)
    times: list[float] = []
    for _ in range(5):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / (6 * SETS))
    return statistics.median(times)


def timed(sizes: Sizes) -> Iterator[str]:
    """A line for both as chosen and as grouped products, and one for the shapes of each."""
    sets = [(packed(sizes, 2, "cuda")[0], packed(sizes, 1, "cuda")[0]) for _ in range(SETS)]
    cases = [inputs_of(sizes, torch.bfloat16, "cuda") for _ in range(SETS)]

    def run(i: int, up: Int4RowConfig | None = None, sums: Int4RowConfig | None = None) -> Tensor:
        c = cases[i]
        return moe_row_int4.experts_of_row(c.x, *sets[i], c.ids, c.shares, c.residual, up, sums)

    def grouped(i: int) -> Tensor:
        c = cases[i]
        return moe_quantized.experts(c.x, *sets[i], c.ids, c.shares, residual=c.residual)

    yield f"{sizes.name}: both {microseconds(run):.1f} us; grouped {microseconds(grouped):.1f}"
    chosen = moe_row_int4.pick_up(sizes.inner, sizes.hidden, sizes.top_k, GROUP)
    up = {
        c: microseconds(lambda i, c=c: run(i, up=c)) for c in {chosen, *that_fit(UP, sizes.hidden)}
    }
    yield f"  up: {in_order(up, chosen)}"
    chosen = moe_row_int4.pick_down(sizes.hidden, sizes.inner, sizes.top_k)
    down = {
        c: microseconds(lambda i, c=c: run(i, sums=c))
        for c in {chosen, *that_fit(DOWN, sizes.inner)}
    }
    yield f"  down: {in_order(down, chosen)}"


def in_order(times: dict[Int4RowConfig, float], chosen: Int4RowConfig) -> str:
    """The time of both products by the shape of one, the fastest first."""
    return "; ".join(
        f"{times[c]:.1f} ({c.chunks}, {c.splits})" + " as chosen" * (c == chosen)
        for c in sorted(times, key=lambda c: times[c])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="One row through experts of 4 bits.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(5)
    wrong: list[str] = []
    every = CUDA if options.device == "cuda" else SMALL
    for sizes in every:
        wrong += check(sizes, options.device)
    if options.times and not wrong and options.device == "cuda":
        print(torch.cuda.get_device_name())
        for sizes in every:
            print("\n".join(timed(sizes)), flush=True)
    print("\n".join([*wrong, f"gpu_moe_row_int4: {len(wrong)} wrong: {'bad' if wrong else 'ok'}"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
