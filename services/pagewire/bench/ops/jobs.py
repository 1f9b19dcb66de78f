"""The list of kernels and shapes: those with a target or a peer first."""

import torch

from .attention import cascade, decode, mixed, prefill, ragged
from .case import Job
from .gemm import fused, gemm_job, layer, row_layer, tuned_gemm_job
from .sampling import KINDS, sampling

LARGE = (
    ("o", 4096, 4096),
    ("qkv", 6144, 4096),
    ("gate_up", 28672, 4096),
    ("down", 4096, 14336),
    ("lm_head", 128256, 4096),
)
SMALL = (
    ("0.6B o", 1024, 2048),
    ("0.6B qkv", 4096, 1024),
    ("0.6B gate_up", 6144, 1024),
    ("0.6B down", 1024, 3072),
)


def jobs() -> list[Job]:
    return [
        *attention(),
        *layers(),
        *(sampling(rows, kind) for rows in (1, 64, 256) for kind in KINDS),
    ]


def attention() -> list[Job]:
    cases = [
        decode(256, 1024, target=290),
        decode(64, 1024, target=78),
        decode(8, 16384, target=137),
        decode(1, 1024, target=10),
    ]
    cases += [
        decode(rows, length)
        for rows, length in ((8, 1024), (16, 1024), (32, 1024), (1, 16384), (8, 32768))
    ]
    cases += [decode(256, 1024, 16), decode(64, 4096, window=1024)]
    cases += [decode(64, 1024, 32, dim) for dim in (64, 80, 96, 256)]
    cases += [
        prefill(1, 8192, 8192, target=1200),
        prefill(4, 2048, 2048, target=370),
        prefill(4, 512, 8192, target=620),
    ]
    cases += [
        prefill(4, 512, 512),
        prefill(1, 8192, 8192, 16),
        prefill(4, 1000, 3000, 32, 64),
        prefill(2, 700, 1500, 16, 256),
    ]
    cases += [
        ragged(32, 16, torch.bfloat16),
        ragged(8, 128, torch.bfloat16),
        ragged(24, 32, torch.float16),
    ]
    cases += [cascade(256, 2048, 64), cascade(256, 2048, 64, 8), cascade(64, 1024, 512)]
    return [
        *cases,
        mixed(64, 1024, 512, 2048),
        mixed(8, 16384, 512, 2048),
        mixed(200, 1024, 1024, 1024),
    ]


def layers() -> list[Job]:
    cases = [layer(rows, 1024, 4096, 14336, 32, "8B") for rows in (1, 8, 64)]
    cases += [layer(rows, 1024, 1024, 3072, 16, "0.6B") for rows in (1, 8, 64)]
    cases += [row_layer(1024, 4096, 14336, 32, "8B"), row_layer(1024, 1024, 3072, 16, "0.6B")]
    for rows in (1, 2, 4, 8):
        cases += [
            gemm_job(*weight, rows) for weight in (LARGE + SMALL if rows in (1, 8) else LARGE[:4])
        ]
    cases += [tuned_gemm_job(*weight, rows) for rows in (256, 768, 8192) for weight in LARGE[:4]]
    return cases + [job for rows in (1, 256, 2048) for job in fused(rows)]
