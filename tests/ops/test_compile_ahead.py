"""Kernels are noted instead of launched, compiled in threads, and found by their launches. Compiled
for a GPU by processes without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pagewire_kernels import compile_ahead, quantized_decode
from pagewire_kernels.table_lookup import LOOKUPS

PROGRAM = """
import json, sys, threading, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

driver.set_active(Driver())
from pagewire_kernels import attention_decode, attention_prefill_hopper, compile_ahead, norm, sampling

def launch():
    bf16, i32 = {"dtype": torch.bfloat16}, {"dtype": torch.int32}
    x, w = torch.zeros(4, 1024, **bf16), torch.ones(1024, **bf16)
    norm.rms_norm(x, w, 1e-6)
    norm.rms_norm(x, w, 1e-5)  # the same kernel
    q, cache = torch.zeros(64, 32, 128, **bf16), torch.zeros(64, 8, 16, 128, **bf16)
    tables, lengths, starts = (torch.zeros(shape, **i32) for shape in ((4, 40), 4, 5))
    attention_prefill_hopper.hopper_prefill(
        q, cache, cache.clone(), tables, lengths, starts, 0.1, skip_one=True, out=q.flatten(1)
    )
    attention_decode.decode_attention(q[:4], cache, cache.clone(), tables, lengths, 0.1)
    ints = torch.ones(4, dtype=torch.int64)
    sampling.sample(torch.zeros(4, 512), sampling.SamplingRows(torch.ones(5, 4), ints, ints, True))

wanted, threads = {}, set()
with compile_ahead.noting(wanted):
    launch()

def where(one, key):
    return one.function.device_caches[0][0].get(key)

def keys():
    return [json.loads(one.specialization)["key"] for one in wanted]

before = [where(one, key) is not None for one, key in zip(wanted, keys())]
fractions = []
broken = compile_ahead.Wanted(next(iter(wanted)).function, "{}")
compile_ahead.compile_all([broken, *wanted], 2, progress=fractions.append)
after = [where(one, key) for one, key in zip(wanted, keys())]
print(json.dumps({
    "names": sorted(one.function.__name__ for one in wanted), "before": before, "fractions": fractions,
    "binaries": [len(kernel.asm["cubin"]) for kernel in after],
    "hook": compile_ahead.knobs.runtime.jit_cache_hook is None,
}))
"""


CODES = """
from pagewire_kernels import compile_ahead, gemm_quantized, gemm_row, gemm_row_codes, gemm_row_int4
from pagewire_kernels.cuda_quantized import pack_matrix
from pagewire_kernels.quantized import quantize

weight, x = torch.randn(128, 1024), torch.zeros(1, 1024, dtype=torch.bfloat16)
kinds = ((8, 32), (8, 1024), (4, 64))
matrices = [pack_matrix([quantize(weight, bits, group)]) for bits, group in kinds]

def launch():
    for matrix in matrices:
        gemm_row.linear_add(x, matrix, None, None)
        gemm_quantized.quantized_linear(x, matrix)

wanted = {}
with compile_ahead.noting(wanted):
    launch()
compile_ahead.compile_all(list(wanted), 2)

def caches():
    return {one.function.__name__: one.function.device_caches[0][0] for one in wanted}

def assembly():
    return sorted(kernel.asm["ptx"] for cache in caches().values() for kernel in cache.values())

class Launched:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *given, **options: self.kernel.warmup(*given, grid=grid, **options)

ahead = assembly()
for cache in caches().values():
    cache.clear()
compile_ahead.knobs.cache.dir = sys.argv[1]
for module, name in ((gemm_row, "_row"), (gemm_row_codes, "_row_codes"), (gemm_row_int4, "_row_int4"),
                     (gemm_quantized, "_quantized")):
    setattr(module, name, Launched(getattr(module, name)))
launch()
print(json.dumps({"names": sorted(caches()), "count": len(ahead), "same": ahead == assembly()}))
"""


def run(folder: Path, program: str = PROGRAM) -> dict[str, Any]:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "ahead")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "launched")],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_noted_compiled_and_found(tmp_path: Path) -> None:
    told = run(tmp_path)
    assert told["names"] == ["_decode", "_norm", "_prefill", "_sample", "_thresholds"]
    assert not any(told["before"])
    assert all(size > 1000 for size in told["binaries"])
    assert told["fractions"][-1] == 1.0
    assert len(told["fractions"]) == 6  # what fails is counted, and left to its launch
    assert told["hook"]


def test_the_same_kernels_as_launches_compile(tmp_path: Path) -> None:
    """Of codes of 8 and 4 bits: constants that are texts among them."""
    told = run(tmp_path, PROGRAM[: PROGRAM.index("from pagewire_kernels")] + CODES)
    assert told == {
        "names": ["_quantized", "_row", "_row_codes", "_row_int4"],
        "count": 6,
        "same": True,
    }


def test_texts_that_are_names_of_types_are_left_to_launches() -> None:
    assert compile_ahead._named_like_a_type("int8")
    forms = (*quantized_decode.EIGHT_BITS, quantized_decode.INT4, *(form for form, _ in LOOKUPS))
    assert len(forms) > 4
    assert not any(map(compile_ahead._named_like_a_type, forms))
    assert not compile_ahead._named_like_a_type(8)
