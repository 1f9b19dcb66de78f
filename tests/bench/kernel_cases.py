"""Runs every kind of kernel case at a small shape in Triton's interpreter on the CPU and prints the
relative errors as JSON.

A process of its own: the interpreter must be chosen before a kernel is defined, and stays chosen.
"""

import json
import runpy
import warnings
from importlib import import_module
from pathlib import Path

import torch

warnings.simplefilter("ignore")
runpy.run_path(str(Path(__file__).parents[1] / "ops" / "conftest.py"))
attention, gemm, inputs, sampling = (
    import_module(f"pagewire.bench.ops.{name}")
    for name in ("attention", "gemm", "inputs", "sampling")
)

inputs.DEVICE, inputs.DTYPE, inputs.PAGES, inputs.WEIGHT_BYTES = "cpu", torch.float32, 64, 1e4
JOBS = [
    attention.decode(2, 48, heads=16),
    attention.decode(2, 48, heads=16, dim=64, window=20),
    attention.prefill(2, 20, 40, heads=16),
    attention.cascade(2, 16, 16),
    attention.mixed(1, 16, 18, 32),
    gemm.gemm_job("o", 64, 128, 1),
    gemm.layer(1, 16, 128, 64, 8, "tiny"),
    gemm.row_layer(16, 128, 64, 8, "tiny"),
    *gemm.fused(3),
    *(sampling.sampling(2, kind, 500) for kind in sampling.KINDS),
]
print(json.dumps({f"{job.name} {job.shape}": job.make().check() for job in JOBS}))
