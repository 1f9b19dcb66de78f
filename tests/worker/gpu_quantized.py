"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_quantized.py [--device cuda|cpu] [--only float8] [--float8] [--times] [--shapes]

Products with quantized matrices of every form, and mixtures of experts, through the kernels and through dequantizing,
against float64: the error may be 1.05 times that of torch's product over the dequantized weights in
bfloat16. Where rows are rounded to float8, the exact product is that of the rounded rows. Each is run
twice and must give the same bits. Norms and activation functions that give float8 must give the bits
of their results rounded by themselves, and dequantized tables those of full weights. One line for each
form, one for the verdict; the exit status is 0 when all is well. --only: forms whose name has this text.
--float8: products in float8 at the sizes of an 8B layer, checked and timed (gpu_float8.py). With
`--device cpu` in Triton's interpreter, small sizes: does the check itself work?
With `--times`, and all well, products of an 8B layer are timed beside bfloat16's, with `--shapes`
those of tables in other launch shapes (product_times.py).
"""

import argparse
import functools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import ops.conftest  # noqa: F401  # mends the interpreter

import torch
from ops.moe_cases import MoeCase, choices
from pagewire.worker.models.rounding import fp8_rows, in_blocks, int8_rows
from pagewire_kernels import moe, moe_quantized
from pagewire_kernels.cuda_quantized import CudaQuantized, QuantizedMatrices
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.lookup_tables import named
from pagewire_kernels.quantized import Quantized, quantize
from pagewire_kernels.routing import NO_EXPERT
from torch import Tensor
from worker import product_times
from worker.gpu_float8 import as_rounded, check_and_time, check_bits, fp8_blocks
from worker.gpu_oracle import begin, conclude

MOST = 1.05
"""Times the error of the product over dequantized weights."""
INTERPRETED = 6e-4
"""Relative, in float32: zero points that are no whole numbers have the digits of float16."""


def cases(rows: int, columns: int, device: str) -> Iterator[tuple[str, list[Quantized]]]:
    """Matrices that read the same input, by what they are."""
    torch.manual_seed(11)

    def full(count: int = rows) -> Tensor:
        return torch.randn(count, columns, device=device) * 0.02

    yield "4 bits, groups of 128", [quantize(full(), 4, 128, whole_zeros=True)]
    yield "4 bits, groups of 64", [quantize(full(), 4, 64, whole_zeros=True)]
    yield "4 bits with minima, groups of 32", [quantize(full(), 4), quantize(full(48), 4)]
    yield "8 bits, groups of 32", [quantize(full(), 8)]
    yield "8 bits with minima, groups of 16", [_with_minima(full())]
    yield "8 bits, a scale a row", [int8_rows(full())]
    yield "float8, a scale a row", [fp8_rows(full())]
    yield "float8, groups of 128", [_groups(full())]
    yield "float8, blocks of 128 x 128", [fp8_blocks(full())]
    yield "4 and 8 bits side by side", [quantize(full(), 4), quantize(full(96), 8)]
    yield "nf4, blocks of 64", [in_blocks(full(), "nf4"), in_blocks(full(48), "nf4")]
    yield "fp4, blocks of 64", [in_blocks(full(), "fp4")]
    yield "iq4, blocks of 32", [iq4(full())]
    yield "a table a row", [row_tables(full()), row_tables(full(48))]


def iq4(weight: Tensor) -> Quantized:
    """In the table of IQ4_NL, with scales of more digits than float16 has."""
    scale = weight.float().unflatten(1, (-1, 32)).abs().amax(-1) / 127
    codes = (weight.float().unflatten(1, (-1, 32)) / scale[:, :, None] / 16 + 8).clamp(0, 15)
    table = named("iq4", weight.device)
    return Quantized(codes.to(torch.uint8).flatten(1), scale, table=table)


def row_tables(weight: Tensor) -> Quantized:
    """A table of 16 values of each row, as SqueezeLLM's."""
    tables = weight[:, :16].half().float().sort(dim=1).values
    codes = torch.searchsorted(tables, weight.float()).clamp_(max=15).to(torch.uint8)
    return Quantized(codes, torch.ones_like(tables[:, :1]), table=tables)


def _with_minima(weight: Tensor) -> Quantized:
    rounded = quantize(weight, 8).regrouped(16)
    return Quantized(rounded.values, rounded.scale, rounded.scale.half().float() * 3.5)


def _groups(weight: Tensor) -> Quantized:
    rounded = fp8_rows(weight)
    groups = weight.shape[1] // 128
    return Quantized(rounded.values, rounded.scale.half().float().expand(-1, groups).contiguous())


def met(matrices: QuantizedMatrices, x: Tensor) -> Tensor:
    """x [T, K] as the product meets it, float64: rounded to float8 where that is so."""
    group = matrices.input_group(len(x), x.dtype)
    return x.double() if group is None else as_rounded(x, group)


def fault(
    matrices: QuantizedMatrices, weight: Tensor, tokens: int, dtype: torch.dtype
) -> tuple[float, str]:
    """(the error over what it may be, what is wrong, empty: nothing)."""
    x = torch.randn(tokens, weight.shape[1], device=weight.device).to(dtype)
    exact = met(matrices, x) @ weight.double().T
    out = matrices(x)
    again = matrices(x)
    error = float((out.double() - exact).norm() / exact.norm())
    plain = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()).double()
    allowed = MOST * float((plain - exact).norm() / exact.norm())
    if dtype == torch.float32:
        allowed = INTERPRETED
    share = error / allowed
    if not torch.equal(out, again):
        return share, f"{tokens} rows of {dtype}: two runs differ"
    if not share <= 1:
        return share, f"{tokens} rows of {dtype}: error {error:.2e}, {allowed:.2e} allowed"
    return share, ""


EXPERTS = (
    "4 bits", "4 bits with minima", "8 bits", "8 bits, a scale a row", "float8", "nf4", "iq4", "a table a row",
)  # fmt: skip


def rounded(form: str, weight: Tensor) -> Quantized:
    """weight [N, K] as one of EXPERTS."""
    match form:
        case "4 bits":
            return quantize(weight, 4, 128, whole_zeros=True)
        case "4 bits with minima":
            return quantize(weight, 4)
        case "8 bits":
            return quantize(weight, 8)
        case "float8":
            return fp8_rows(weight)
        case "nf4":
            return in_blocks(weight, "nf4")
        case "iq4":
            return iq4(weight)
        case "a table a row":
            return row_tables(weight)
        case _:
            return int8_rows(weight)


def experts_outcome(device: str, form: str) -> tuple[str, list[str]]:
    """outcome() of a mixture of experts: its error may be 1.05 times that of our own kernels over the
    dequantized matrices."""
    small = device == "cpu"
    experts, k, hidden, inner = (4, 2, 128, 128) if small else (32, 4, 2048, 768)
    torch.manual_seed(12)
    ops = CudaQuantized(KernelChoices())
    full, packed = [], []
    for halves, n, columns in ((2, inner, hidden), (1, hidden, inner)):
        parts = [
            [rounded(form, torch.randn(n, columns, device=device) * 0.02) for _ in range(halves)]
            for _ in range(experts)
        ]
        stacked = ops.pack_experts(parts)
        assert stacked is not None
        packed.append(stacked)
        full.append(
            torch.stack([torch.cat([part.dequantize() for part in each]) for each in parts])
        )
    wrong: list[str] = []
    worst = 0.0
    for dtype in (torch.float32,) if small else (torch.bfloat16, torch.float16):
        for tokens in (1, 9) if small else (1, 4, 8, 40, 150, 300, 3000):
            ids = choices(tokens, k, experts, device)
            ids[-1] = NO_EXPERT if tokens > 1 else ids[-1]
            x = torch.randn(tokens, hidden, device=device).to(dtype)
            shares = torch.rand(tokens, k, device=device)
            exact = MoeCase(x, full[0], full[1], ids, shares).exact()
            out = moe_quantized.experts(x, packed[0], packed[1], ids, shares)
            again = moe_quantized.experts(x, packed[0], packed[1], ids, shares)
            error = float((out.double() - exact).norm() / exact.norm())
            matrices = [matrix.to(torch.bfloat16) for matrix in full]
            plain = moe.grouped_experts(
                x.bfloat16(), matrices[0], matrices[1], ids, shares
            ).double()
            allowed = MOST * float((plain - exact).norm() / exact.norm())
            worst = max(worst, error / allowed)
            if not error <= allowed or not torch.equal(out, again):
                wrong.append(
                    f"experts, {form}: {tokens} tokens of {dtype}: {error:.2e}, {allowed:.2e} allowed"
                )
    return (
        f"experts, {form}: errors up to {worst:.3f} of what is allowed; {len(wrong)} wrong",
        wrong,
    )


def outcome(device: str, number: int) -> tuple[str, list[str]]:
    """(a line, what is wrong) of one case."""
    small = device == "cpu"
    rows, columns = (96, 256) if small else (6144, 2048)
    tokens = (1, 3, 17) if small else (1, 4, 16, 33, 64, 100, 128, 200, 500, 700)
    types = (torch.float32,) if small else (torch.bfloat16, torch.float16)
    ops = CudaQuantized(KernelChoices())
    title, parts = next(islice(cases(rows, columns, device), number, None))
    matrices = ops.pack(parts, False)
    assert matrices is not None
    weight = torch.cat([part.dequantize() for part in parts])
    outcomes = [fault(matrices, weight, count, dtype) for dtype in types for count in tokens]
    wrong = [f"{title}: {text}" for _, text in outcomes if text]
    if all(part.table is not None for part in parts):
        wrong += [
            f"{title}: dequantized to {dtype}, it is not what full weights are"
            for dtype in (torch.bfloat16, torch.float16)
            if not torch.equal(matrices.dense(dtype), weight.to(dtype))
        ]
    worst = max(share for share, _ in outcomes)
    return f"{title}: errors up to {worst:.3f} of what is allowed; {len(wrong)} wrong", wrong


def check(device: str, only: str, float8: bool) -> list[str]:
    """What is wrong, a line each."""
    titles = [title for title, _ in cases(64, 256, "cpu")]
    numbers = [number for number, title in enumerate(titles) if only in title]
    experts = [form for form in EXPERTS if only in form]
    one = functools.partial(outcome, device)
    of_experts = functools.partial(experts_outcome, device)
    if device == "cpu":
        outcomes = [*map(one, numbers), *map(of_experts, experts)]
    else:
        # kernels are compiled in as many processes as there are cases
        processes = max(1, len(numbers) + len(experts))
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            mixtures = pool.map(of_experts, experts)
            outcomes = [*pool.map(one, numbers), *mixtures]
    for line, _ in outcomes:
        print(line, flush=True)
    wrong = [text for _, texts in outcomes for text in texts] + check_bits(device)
    return wrong + check_and_time() if float8 else wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Products with quantized matrices on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="forms whose name has this text")
    parser.add_argument("--float8", action="store_true", help="float8 at sizes of 8B, timed")
    parser.add_argument("--times", action="store_true", help="time products too, on a GPU")
    parser.add_argument("--shapes", action="store_true", help="time other launch shapes too")
    options = parser.parse_args()
    if not begin("gpu_quantized", options.device):
        return 2
    status = conclude("gpu_quantized", lambda: check(options.device, options.only, options.float8))
    if options.device == "cuda" and not status:
        tables = {
            "nf4, blocks of 64": lambda weight: in_blocks(weight, "nf4"),
            "iq4, blocks of 32": iq4,
            "a table a row": row_tables,
        }
        numbers = {"4 bits, groups of 128": lambda w: quantize(w, 4, 128, whole_zeros=True)}
        forms = {title: form for title, form in (numbers | tables).items() if options.only in title}
        for line in product_times.lines(forms) if options.times else ():
            print(line, flush=True)
        for line in product_times.shapes(forms) if options.shapes else ():
            print(line, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
