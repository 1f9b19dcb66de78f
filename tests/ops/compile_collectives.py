"""Collective kernels compiled down to machine code without a GPU; a line of JSON for each launch.

    python tests/ops/compile_collectives.py 90 80

The host code runs on torch's meta device, and its launches are compiled as they are.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ops.shared_memory import Launch, compiled, empty
from pagewire_kernels import all_gather, all_reduce
from pagewire_kernels.all_reduce import AddNorm
from pagewire_kernels.symmetric_memory import GENERATIONS, Layout, SymmetricMemory
from triton.runtime import JITFunction

INSTRUCTION = re.compile(r"\b((?:ld|st|atom|griddepcontrol|membar|fence)\.[\w.:]+)")
SHAPES = {
    80: (2, 2880, torch.float16),
    90: (4, 8192, torch.bfloat16),
    120: (3, 12288, torch.float32),
}
"""Ranks, width and type, by capability; on the GPU that is meant in the first place, all launches
are compiled, on others one of each kernel."""
WHOLE = 90


def memory_of(size: int) -> SymmetricMemory:
    """Without memory; as a GPU has it."""
    long = torch.int64
    layout = Layout(size)
    control = empty(GENERATIONS + layout.programs, dtype=long)
    peers = empty(size, dtype=long)
    return SymmetricMemory(1, layout, peers, control, empty(1, dtype=long))


def run(size: int, width: int, dtype: torch.dtype, whole: bool) -> None:
    """Every collective operation, `whole`: with each norm."""
    memory = memory_of(size)
    x = empty(4, width, dtype=dtype)
    wide = AddNorm(x, empty(width, dtype=dtype), 1e-5)
    layer = AddNorm(x.float(), empty(width, dtype=dtype), 1e-5, empty(width, dtype=dtype), True)
    for kernel in (all_reduce.low_latency, all_reduce.one_shot, all_reduce.two_shot):
        for norm in (None, wide, layer) if whole else (wide,):
            kernel(memory, x, norm)
    all_reduce.scattered(memory, x, wide)
    all_reduce.reduce_scatter(memory, x)
    all_gather.low_latency(memory, x, 1)
    all_gather.one_shot(memory, x, 1)


def launches(capability: int) -> Iterator[Launch]:
    """Those of `run`."""
    recorded: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorded.append(Launch(kernel, args, options))

    original = JITFunction.run
    JITFunction.run = record
    try:
        run(*SHAPES[capability], whole=capability == WHOLE)
    finally:
        JITFunction.run = original
    yield from recorded


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for launch in launches(capability):
            result = compiled(launch, capability)
            line = {
                "capability": capability,
                "module": launch.kernel.__module__,
                "launch": launch.words(),
                "shared": result.metadata.shared,
                "instructions": sorted(set(INSTRUCTION.findall(result.asm["ptx"]))),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
