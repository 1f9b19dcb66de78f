"""The launch shapes of Hopper in bfloat16 and float16, as they were measured on an H200: whoever
changes one measures again."""

from typing import Any

from pagewire_kernels import (
    attention_prefill,
    cascade,
    decode_shapes,
    gemm,
    gemm_row_int4,
    moe_shapes,
    sampling,
)
from pagewire_kernels.attention_prefill import PrefillConfig
from pagewire_kernels.decode_shapes import DecodeConfig, FewConfig
from pagewire_kernels.gemm import SkinnyConfig
from pagewire_kernels.gemm_row_int4 import Int4RowConfig
from pagewire_kernels.moe_shapes import PairConfig
from torch import device

PREFILL = {
    64: PrefillConfig(block_m=128, block_n=64, warps=8, stages=3),
    80: PrefillConfig(block_m=64, block_n=64, warps=4, stages=3),
    96: PrefillConfig(block_m=64, block_n=64, warps=4, stages=3),
    128: PrefillConfig(block_m=64, block_n=64, warps=4, stages=3),
    256: PrefillConfig(block_m=128, block_n=64, warps=8, stages=2),
}
PREFIX = {
    64: PrefillConfig(block_m=64, block_n=64, warps=4, stages=3),
    80: PrefillConfig(block_m=64, block_n=64, warps=4, stages=3),
    96: PrefillConfig(block_m=64, block_n=64, warps=4, stages=3),
    128: PrefillConfig(block_m=64, block_n=64, warps=4, stages=3),
    256: PrefillConfig(block_m=64, block_n=32, warps=4, stages=2),
}
DECODE = {
    16: (64, 2, 3, 64, 32),
    64: (32, 2, 4, 128, 16),
    128: (32, 2, 4, 256, 16),
    256: (64, 2, 3, 1024, 8),
    1024: (32, 2, 4, 1024, 4),
    4096: (32, 1, 2, 2048, 2),
    5000: (32, 1, 2, 2048, 1),
}
"""By the number of programs: the fields of a DecodeConfig; at head size 256 the first three are
WIDE."""
WIDE = (32, 2, 4)
SKINNY = {
    (8, 4096, 4096): SkinnyConfig(64, 128, 4, 4, 5),
    (8, 6144, 4096): SkinnyConfig(64, 128, 1, 4, 5),
    (1, 6144, 4096): SkinnyConfig(4, 512, 1, 1, 4),
    (1, 28672, 4096): SkinnyConfig(4, 1024, 1, 4, 3),
    (1, 4096, 14336): SkinnyConfig(8, 512, 1, 4, 3),
}
"""By rows, results and inner size."""
SEARCH = 8192
FEW = {False: FewConfig(32, 64, 2, 2, 32), True: FewConfig(64, 64, 2, 2, 32)}
"""Decode attention of few rows, without and with QK-norm; block_n is not measured yet."""
INT4_ROW = {
    (14336, 4096, True, True): (2, 2, 7),
    (12288, 4096, True, True): (2, 2, 4),
    (9728, 2560, True, True): (2, 2, 5),
    (17408, 5120, True, True): (2, 2, 5),
    (25600, 5120, True, True): (2, 2, 5),
    (28672, 8192, True, True): (2, 2, 7),
    (3072, 1024, True, True): (2, 8, 2),
    (6144, 4096, False, True): (1, 8, 4),
    (6144, 2560, False, True): (2, 8, 5),
    (10240, 8192, False, True): (2, 8, 3),
    (4096, 4096, False, False): (1, 16, 4),
    (4096, 14336, False, False): (2, 8, 7),
    (2560, 9728, False, False): (2, 8, 10),
    (5120, 17408, False, False): (2, 8, 6),
    (8192, 28672, False, False): (2, 8, 4),
}
"""One row of 4 bits in groups of 128, by results, inner size, with gate and up, and with a norm:
strips, chunks a step, splits."""
EXPERTS = {
    "up": (moe_shapes.pick_up(2048), PairConfig(1, 2048, 1, 1, early=True)),
    "down": (moe_shapes.pick_down(768, 8), PairConfig(4, 256, 4, 2, early=True)),
}
"""Of single rows, Qwen3-30B-A3B."""


def choices(place: device) -> list[tuple[str, Any, Any]]:
    """(what, the shape chosen for `place`, the measured one) of each."""
    found: list[tuple[str, Any, Any]] = []
    for dim in PREFILL:
        found.append(
            (f"prefill {dim}", attention_prefill.choose(dim, 2, 2).first(place), PREFILL[dim])
        )
        found.append((f"common blocks {dim}", cascade.choose(dim, 2, 2).first(place), PREFIX[dim]))
        for programs, fields in DECODE.items():
            for group in (1, 4, 16):
                measured = DecodeConfig(*fields) if dim <= 128 else DecodeConfig(*WIDE, *fields[3:])
                chosen = decode_shapes.choose(dim, group, programs, 2, 2).first(place)
                found.append(
                    (f"decode {dim}, {programs} programs of {group} heads", chosen, measured)
                )
    for (rows, n, k), measured in SKINNY.items():
        best = gemm.pick_config(rows, n, k)
        assert best is not None
        for itemsize in (2, 4):
            found.append(
                (
                    f"product {rows} x {n} x {k}",
                    gemm.choose(best, rows, itemsize).first(place),
                    measured,
                )
            )
    found += [
        (f"search {itemsize}", sampling.choose_block(itemsize).first(place), SEARCH)
        for itemsize in (2, 4)
    ]
    for normed, few in FEW.items():
        chosen = decode_shapes.pick_few(128, 4, 8, 2, 2, normed)
        found.append((f"decode of few rows, QK-norm {normed}", chosen, few))
    for (n, k, gated, norm), fields in INT4_ROW.items():
        config = gemm_row_int4.pick_config(n, k, gated, norm, 128)
        measured = Int4RowConfig(*fields, early=True)
        found.append((f"row of int4 {n} x {k}, {gated=} {norm=}", config, measured))
    found += [(f"experts' {what}", *shapes) for what, shapes in EXPERTS.items()]
    return found
