"""The product with matrices of 4 bits for Hopper compiled without a GPU, as `hopper_linear` would
launch it; a line of JSON for each case [rows, N, K, group, rest, dtype].

    python tests/ops/compile_hopper_quantized.py '[[256, 4096, 4096, 128, false, "bfloat16"]]'
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ops.assembler import assembled, spilled_bytes
from pagewire_kernels import gemm_quantized_hopper
from pagewire_kernels.packed_matrix import PackedMatrix
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MULTIPROCESSORS = 132


class Driver:
    """Of an H100, as far as compiling needs one."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiled:
    """In place of the kernel: compiles what is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.last: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.last = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def main() -> None:
    driver.set_active(Driver())  # type: ignore[arg-type]
    compiled = Compiled(gemm_quantized_hopper._product)
    gemm_quantized_hopper._product = compiled  # type: ignore[assignment]
    gemm_quantized_hopper._multiprocessors = lambda device: MULTIPROCESSORS  # type: ignore[assignment]
    for rows, n, k, group, rest, name in json.loads(sys.argv[1]):
        x = torch.zeros(rows, k, dtype=getattr(torch, name))
        words = torch.zeros(n // 64, k // 64, 128, 4, dtype=torch.int32)
        scales = torch.zeros(k // group, n, dtype=torch.int32)
        matrix = PackedMatrix(words, scales, None, torch.Size((n, k)), "int4", group, rest, 1.0)
        out = torch.zeros(rows, n, dtype=x.dtype)
        gemm_quantized_hopper.hopper_linear(x, matrix, None, out)
        ptx = compiled.last.asm["ptx"]
        messages = assembled(ptx)
        waits = {int(count) for count in re.findall(r"wgmma.wait_group.sync.aligned (\d+)", ptx)}
        print(
            json.dumps(
                {
                    "shared": compiled.last.metadata.shared,
                    "waits": sorted(waits),
                    "assembler": messages,
                    "spilled": spilled_bytes(messages),
                }
            )
        )


if __name__ == "__main__":
    main()
