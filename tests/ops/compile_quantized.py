"""Products with quantized matrices compiled without a GPU; lines of JSON for each launch.

    python tests/ops/compile_quantized.py 90 86

waits: the numbers of products that may still be under way at each wait for tensor cores (Hopper's).
Codes are decoded into registers that such a product reads while it runs, so that only 0 is right.
"""

import json
import re
import sys
from typing import Any

import torch
from pagewire_kernels import gemm_quantized, shapes
from pagewire_kernels.gemm_quantized import PackedMatrix
from pagewire_kernels.quantized_decode import DECODERS, FP8, INT4, INT8
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LIMITS = {80: shapes.KIB_163, 86: shapes.KIB_99, 90: shapes.KIB_227, 120: shapes.KIB_99}
FORMS = ((INT4, 128, False), (INT4, 32, True), (INT8, 0, False), (FP8, 0, False))
ROWS = (1, 256)
N, K = 4096, 4096


def matrix(form: str, group: int, rest: bool) -> PackedMatrix:
    """Without memory."""
    shape = (N // 64, K // 64, 128, 4) if form == INT4 else (N, K // 4)
    words = torch.empty(shape, dtype=torch.int32, device="meta")
    return PackedMatrix(words, None, None, torch.Size((N, K)), form, group, rest, 1.0)


def compiled(capability: int, form: str, group: int, rest: bool, rows: int) -> dict[str, Any]:
    weight = matrix(form, group, rest)
    best = gemm_quantized.pick_config(rows, weight, torch.bfloat16)
    with shapes.pretend(LIMITS[capability]):
        chosen = gemm_quantized.choose(best, form, 2).first(torch.device("cpu"))
    kernel: Any = gemm_quantized._quantized
    constants = {
        "bias": None, "BM": chosen.block_m, "BN": chosen.block_n, "BK": chosen.block_k, "GROUP": group, "FORM": form,
        "REST": rest, "LATE": chosen.late and weight.scales_late(chosen.block_k), "SPLITS": chosen.splits, "BIAS": False,
        "ASM": DECODERS[form, torch.bfloat16], "STAGES": chosen.stages, "PDL": capability >= 90,
    }  # fmt: skip
    types = {
        "x": "*bf16", "words": "*i32", "scales": "*i32", "row_scale": "*fp32", "out": "*bf16", "part": "*fp32",
        "arrived": "*i32", "factor": "fp32",
    }  # fmt: skip
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name not in constants and name not in ("M", "factor", "span")
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
        options={"num_warps": chosen.warps, "num_stages": chosen.stages},
    )
    return {
        "capability": capability,
        "launch": f"{form} groups of {group}, {rows} rows: {chosen}",
        "shared": result.metadata.shared,
        "limit": LIMITS[capability],
        "waits": sorted({int(n) for n in re.findall(r"pendings = (\d+)", result.asm["ttgir"])}),
    }


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for form, group, rest in FORMS:
            for rows in ROWS if capability == 90 else ROWS[-1:] if form != INT8 else ():
                print(json.dumps(compiled(capability, form, group, rest, rows)), flush=True)


if __name__ == "__main__":
    main()
