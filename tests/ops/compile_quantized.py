"""Products with quantized matrices compiled without a GPU; lines of JSON for each launch.

    python tests/ops/compile_quantized.py 90 86

waits: the numbers of products that may still be under way at each wait for tensor cores (Hopper's).
Codes are decoded into registers that such a product reads while it runs, so that only 0 is right.
sums: of norms, how a row is spread over threads where it is summed up, and so in which order.
products: of codes of 4 bits and one row, how operands of `mma` are spread over threads.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from ops.assembler import assembled, spilled_bytes
from pagewire_kernels import (
    gemm_quantized,
    gemm_row,
    gemm_row_codes,
    gemm_row_int4,
    moe_quantized,
    norm,
    quantized_shapes,
    row_int4_products,
    shapes,
)
from pagewire_kernels.lookup_tables import ROW_TABLES
from pagewire_kernels.packed_matrix import PackedExperts, PackedMatrix
from pagewire_kernels.quantized_decode import DECODERS, EIGHT_BITS, FP8, INT4, INT8
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LIMITS = {80: shapes.KIB_163, 86: shapes.KIB_99, 90: shapes.KIB_227, 120: shapes.KIB_99}
NUMBERS = (INT4, INT8, FP8)
FORMS = ((INT4, 128, False), (INT4, 32, True), (INT8, 0, False), (FP8, 0, False),
         ("nf4", 64, False), ("iq4", 32, False), (ROW_TABLES, 0, False))  # fmt: skip
ROWS = (1, 256)
N, K = 4096, 4096
NORMS = (1024, 5120)
NORM_TYPES = {
    "residual": "*bf16", "weight": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32",
}  # fmt: skip
TYPES = {
    "x": "*bf16", "words": "*i32", "scales": "*i32", "row_scale": "*fp32", "factors": "*fp32", "out": "*bf16",
    "part": "*fp32", "squares": "*fp32", "arrived": "*i32", "order": "*i32", "tiles": "*i32", "norm": "*bf16",
    "factor": "fp32", "eps": "fp32", "unit": "fp32",
}  # fmt: skip
ROWS_OF_INT4 = (
    (torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 64), (torch.bfloat16, 32),
)  # fmt: skip
ROWS_OF_CODES = ((FP8, 128), (INT8, 16), (INT8, 32))
UNALIGNED = {"M", "factor", "unit", "eps", "span", "slots", "scale_stride"}


def matrix(form: str, group: int, rest: bool) -> PackedMatrix:
    """Without memory."""
    shape = (N, K // 4) if form in EIGHT_BITS else (N // 64, K // 64, 128, 4)
    words = torch.empty(shape, dtype=torch.int32, device="meta")
    table = None if form in NUMBERS else torch.empty(16, device="meta")
    return PackedMatrix(words, None, None, torch.Size((N, K)), form, group, rest, 1.0, table=table)


def without(form: str, group: int) -> dict[str, Any]:
    """Operands that such a matrix has not, and what the type of its table is."""
    TYPES["table"] = "*fp32" if form == ROW_TABLES else "*i32"
    absent: dict[str, Any] = {"table": None} if form in NUMBERS else {}
    return {**absent, **({"row_scale": None} if group else {"scales": None})}


def compiled(
    kernel: Any,
    capability: int,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    types: dict[str, str] | None = None,
    assemble: bool = False,
) -> dict[str, Any]:
    """What a launch came to: its shared memory, the waits and the sums. types: of arguments, where
    other than TYPES. assemble: by the assembler too, for Hopper; else spilled is 0."""
    names = kernel.arg_names
    known = TYPES | (types or {})
    signature = {
        name: "constexpr" if name in constants else known.get(name, "i32") for name in names
    }
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name not in constants and name not in UNALIGNED
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    result: Any = compile_kernel(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    ttgir = result.asm["ttgir"]
    return {
        "capability": capability,
        "shared": result.metadata.shared,
        "limit": LIMITS[capability],
        "waits": sorted({int(n) for n in re.findall(r"pendings = (\d+)", ttgir)}),
        "sums": _sums(ttgir),
        "products": _products(ttgir),
        "spilled": spilled_bytes(assembled(result.asm["ptx"])) if assemble else 0,
    }


def _products(ttgir: str) -> list[str]:
    """The layouts of what is multiplied by `mma` in inline assembly."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    lines = re.findall(r"elementwise_inline_asm .*?mma\.sync.*", ttgir)
    return [layouts[re.findall(r"tensor<[^,]*, (#\w+)>", line)[0]] for line in lines]


def _sums(ttgir: str) -> list[str]:
    """The layouts of what is reduced, in order."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    reduced = re.findall(r"\"tt\.reduce\".*?\) : \(tensor<[^,]*, (#\w+)>\) ->", ttgir, re.DOTALL)
    return [layouts[name] for name in reduced]


def add_norm(width: int, full: bool, group: int | None) -> dict[str, Any]:
    """An addition and RMSNorm: the result, and its codes in groups; None: no codes."""
    block = triton.next_power_of_2(width)
    constants = {
        "bias": None, "H": width, "BLOCK": block, "ADD": True, "CENTRE": False, "BIAS": False, "FULL": full,
        "ROUND": group is not None, "GROUP": group or 0, "PDL": True,
    }  # fmt: skip
    if not full:
        constants["out"] = None
    if group is None:
        constants |= {"codes": None, "scales": None}
    kernel: Any = norm._norm
    launch = compiled(kernel, 90, constants, norm.warps(block), 3, NORM_TYPES)
    return {"launch": f"norm of {width}, full {full}, group {group}", **launch}


def product(capability: int, form: str, group: int, rest: bool, rows: int) -> dict[str, Any]:
    weight = matrix(form, group, rest)
    best = quantized_shapes.pick_config(rows, weight, torch.bfloat16)
    with shapes.pretend(LIMITS[capability]):
        chosen = quantized_shapes.choose(best, form, 2).first(torch.device("cpu"))
    constants = {
        "bias": None, "BM": chosen.block_m, "BN": chosen.block_n, "BK": chosen.block_k, "GROUP": group, "FORM": form,
        "REST": rest, "LATE": chosen.late and weight.scales_late(chosen.block_k), "SPLITS": chosen.splits, "BIAS": False,
        "ASM": DECODERS[form, torch.bfloat16], "STAGES": chosen.stages, "PDL": capability >= 90, **without(form, group),
    }  # fmt: skip
    kernel: Any = gemm_quantized._quantized
    launch = compiled(kernel, capability, constants, chosen.warps, chosen.stages)
    return {"launch": f"{form} groups of {group}, {rows} rows: {chosen}", **launch}


def experts(capability: int, form: str, group: int, rest: bool, rows: float) -> dict[str, Any]:
    """The first product of experts with so many rows each."""
    best = moe_quantized.pick_config(rows, _experts(form, group, rest))
    with shapes.pretend(LIMITS[capability]):
        chosen = moe_quantized.choose(best, form, 2, 2).first(torch.device("cpu"))
    late = chosen.late and bool(group) and not rest and group % chosen.block_k == 0
    constants = {
        "K": K, "HALVES": 2, "TOP_K": 8, "BM": chosen.block_m, "BN": chosen.block_n, "BK": chosen.block_k, "GROUP": group,
        "FORM": form, "REST": rest, "LATE": late, "ASM": DECODERS[form, torch.bfloat16], "PAIRS": rows < 1,
        "STAGES": chosen.stages, "PDL": capability >= 90, **without(form, group),
    }  # fmt: skip
    kernel: Any = moe_quantized._grouped_quantized
    launch = compiled(kernel, capability, constants, chosen.warps, chosen.stages)
    return {"launch": f"experts, {form} groups of {group}, {rows} rows: {chosen}", **launch}


def _experts(form: str, group: int, rest: bool) -> PackedExperts:
    """Without memory."""
    one = matrix(form, group, rest)
    words = one.words.expand(2, 2, *one.words.shape)
    return PackedExperts(words, None, None, words, one.shape, N, form, group, rest, one.table)


def dequantized(form: str, group: int) -> dict[str, Any]:
    """A matrix with a table, in float32."""
    constants = {
        "BN": 64, "BK": 128, "GROUP": group, "FORM": form, "REST": False, "ASM": "", "PDL": True, **without(form, group),
    }  # fmt: skip
    TYPES["table"] = "*fp32"
    kernel: Any = gemm_quantized._dequantize
    return {"launch": f"{form}, dequantized", **compiled(kernel, 90, constants, 4, 3)}


def row(form: str) -> dict[str, Any]:
    """Gate and up of one row, with its norm, of codes with a scale a row."""
    chosen = gemm_row.pick_config_of_codes(N, K, True)
    constants = {
        "bias": None, "residual": None, "K": K, "BN": chosen.block_n, "BK": chosen.block_k, "FORM": form, "NORM": True,
        "GATED": True, "BIAS": False, "ADD": False, "EVEN": True, "STAGES": chosen.stages, "EARLY": chosen.early, "PDL": True,
    }  # fmt: skip
    TYPES["weight"] = "*fp8e4nv" if form == FP8 else "*u8"
    kernel: Any = gemm_row._row
    launch = compiled(kernel, 90, constants, chosen.warps, chosen.stages)
    return {"launch": f"one row, {form}: {chosen}", **launch}


def row_codes(form: str, group: int) -> dict[str, Any]:
    """The same of codes with scales of groups."""
    chosen = gemm_row_codes.pick_config(N, K, True)
    constants = {
        "bias": None, "residual": None, "K": K, "BN": chosen.block_n, "WARPS": chosen.warps, "FORM": form, "GROUP": group,
        "NORM": True, "GATED": True, "BIAS": False, "ADD": False, "EVEN": True, "EARLY": chosen.early, "PDL": True,
    }  # fmt: skip
    kernel: Any = gemm_row_codes._row_codes
    launch = compiled(kernel, 90, constants, chosen.warps, 3, assemble=True)
    return {"launch": f"one row in groups, {form} of {group}: {chosen}", **launch}


def row_int4(dtype: torch.dtype, group: int, gated: bool) -> dict[str, Any]:
    """One row and codes of 4 bits: gate and up with a norm, or a sum with a residual."""
    chosen = gemm_row_int4.pick_config(N, K, gated, gated, group)
    asm, of_inputs, times = row_int4_products.assembly(dtype)
    constants = {
        "bias": None, "residual" if gated else "norm": None, "K": K, "CHUNKS": chosen.chunks, "GROUP": group, "NORM": gated,
        "GATED": gated, "PAIR": not gated and chosen.strips == 2, "BIAS": False, "ADD": not gated, "EVEN": True,
        "SPLITS": chosen.splits, "ASM": asm, "SUM": of_inputs, "TIMES": times, "EARLY": chosen.early, "PDL": True,
    }  # fmt: skip
    kind = "*bf16" if dtype == torch.bfloat16 else "*fp16"
    types: dict[str, str] = dict.fromkeys(("x", "norm", "residual", "out"), kind)
    kernel: Any = gemm_row_int4._row_int4
    launch = compiled(kernel, 90, constants, chosen.warps, 3, types, assemble=True)
    return {"launch": f"one row, int4 groups of {group}, {dtype}: {chosen}", **launch}


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for form, group, rest in FORMS:
            for rows in ROWS if capability == 90 else ROWS[-1:] if form != INT8 else ():
                print(json.dumps(product(capability, form, group, rest, rows)), flush=True)
            if form not in NUMBERS and capability == 90:
                print(json.dumps(dequantized(form, group)), flush=True)
            if form != INT8 and capability in (80, 90):
                for rows in (0.5, 100) if capability == 90 else (10,):
                    print(json.dumps(experts(capability, form, group, rest, rows)), flush=True)
        if capability == 90:
            for form in (FP8, INT8):
                print(json.dumps(row(form)), flush=True)
            for form, group in ROWS_OF_CODES:
                print(json.dumps(row_codes(form, group)), flush=True)
            for dtype, group in ROWS_OF_INT4:
                for gated in (True, False):
                    print(json.dumps(row_int4(dtype, group, gated)), flush=True)
            for width in NORMS:
                for full, group in ((True, None), (False, 0), (True, 0), (False, 128)):
                    print(json.dumps(add_norm(width, full, group)), flush=True)


if __name__ == "__main__":
    main()
