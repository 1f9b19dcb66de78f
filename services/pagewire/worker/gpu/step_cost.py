"""How long a GPU's steps take: a few of them timed at start, and a line fitted through the times.
Writes no KV block that a request could read before filling it.
"""

import statistics
from collections.abc import Callable
from typing import Final

import torch
from pagewire_kernels import cuda as ops
from pagewire_kernels.batch import Batch
from pagewire_protocol.messages import StepCost
from torch import Tensor

from ..load.loader import Loaded
from .mixed_steps import MixedSteps

SMALL: Final = 128
LARGE: Final = 2048
"""Tokens of the two steps between which a token's time is measured; the second is shorter where
steps are."""
CHUNK: Final = 1024
DEPTH: Final = 8192
"""New tokens, and tokens they attend to at most, of the chunk whose attention is measured."""
READERS: Final = 64
READ: Final = 1024
"""Rows of one new token, and the tokens each attends to."""
REPEATS: Final = 5
LAUNCHES: Final = 4
"""Of a run that takes no LONG_MS, in each measurement."""
LONG_MS: Final = 10.0


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one of `run`'s launches on the GPU, the median of some measurements after one
    that does not count."""
    times: list[float] = []
    launches = 1
    for _ in range(REPEATS + 1):
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(launches):
            run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / launches)
        launches = LAUNCHES if times[0] < LONG_MS else 1
    return statistics.median(times[1:])


def measure(steps: MixedSteps, loaded: Loaded, step_tokens: int) -> StepCost:
    """Steps without attention give the time of a step and of a token in it; attention is measured
    in one layer and taken for all that are here."""
    most = max(2 * SMALL, min(LARGE, step_tokens))
    small, large = (timed(lambda size=size: steps.replay(size, 1)) for size in (SMALL, most))
    token = max(0.0, (large - small) / (most - SMALL))
    layers = len(loaded.caches)
    depth = _depth(loaded)
    chunk = min(CHUNK, depth)
    read = min(READ, depth)
    pairs = chunk * (depth - chunk) + chunk * (chunk + 1) / 2
    rows = steps.padded(READERS)
    chunked, reading = (timed(run) * layers for run in attentions(steps, loaded))
    return StepCost(
        fixed_ms=max(0.0, small - SMALL * token),
        token_ms=token,
        ms_per_m_prefill_pairs=chunked / pairs * 1e6,
        ms_per_m_kv_tokens=reading / (rows * read) * 1e6,
    )


def attentions(steps: MixedSteps, loaded: Loaded) -> tuple[Callable[[], Tensor], ...]:
    """One layer's, of a chunk behind a long context, and of READERS rows of one new token."""
    depth = _depth(loaded)
    rows = steps.padded(READERS)
    rest = [0] * (rows - 1)
    return (
        _attention(loaded, [min(CHUNK, depth), *rest], [depth, *rest]),
        _attention(loaded, [1] * rows, [min(READ, depth)] * rows),
    )


def _depth(loaded: Loaded) -> int:
    sizing = loaded.sizing
    return min(DEPTH, sizing.max_model_len, sizing.num_blocks * sizing.block_size)


def _attention(loaded: Loaded, counts: list[int], lengths: list[int]) -> Callable[[], Tensor]:
    """The first layer's attention of rows with `counts` new tokens, spread over the blocks there
    are."""
    arch = loaded.decoder.arch
    sizing = loaded.sizing
    cache = loaded.caches[0]
    rows = len(counts)
    width = -(-max(lengths) // sizing.block_size)
    ids = torch.zeros(sum(counts), dtype=torch.int64, device="cuda")
    starts = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    tables = (torch.arange(rows * width, device="cuda") % sizing.num_blocks).int().view(rows, width)
    batch = Batch(
        ids,
        ids - 1,
        starts,
        torch.tensor(lengths, device="cuda").int(),
        tables,
        max(counts),
        max(lengths),
    )
    heads = loaded.decoder.rank_arch.num_heads
    q = torch.randn(len(ids), heads, arch.head_dim, dtype=loaded.dtype, device="cuda")
    return lambda: ops.paged_attention(q, cache[0], cache[1], batch, arch.head_dim**-0.5, None)
