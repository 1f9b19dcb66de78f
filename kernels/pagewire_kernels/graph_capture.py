"""Captures of CUDA graphs in a process that goes on working meanwhile."""

from typing import Any

import torch


def capture(graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
    """`with` it: what this thread launches goes into `graph`, whose memory comes from `pool`.

    Only this thread's own calls may spoil the capture (mode `thread_local`). In CUDA's usual mode a
    wait for an event in any other thread ends it with an error, and graphs are captured while a
    thread waits for the steps before (`worker/gpu/staging.Waiter`).
    """
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
