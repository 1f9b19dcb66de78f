"""How a GPU's memory is divided: what a step needs beside weights and KV blocks, what is left for
the blocks, and what to change when nothing is. Works on numbers alone and allocates nothing;
`kv_sizing.py` has the blocks themselves.
"""

import math
from dataclasses import dataclass
from typing import Final

from ..device.gpus import Gpu
from ..models.architecture import Architecture
from ..models.cache_spec import CacheSpec
from ..models.ranks import WHOLE_MODEL, PipelineStage
from .kv_sizing import GIB, MIB, DoesNotFit, Sizing, context

CAPTURED_TOKENS: Final = 4096
CAPTURED_TOKENS_SMALL: Final = 8192
SMALL_MODEL: Final = 2_000_000_000
"""Parameters."""
UNFUSED: Final = 2.5
"""Activations of a model that is computed operation by operation, norms in float32, beside our own
decoder's."""
SLACK: Final = 1.25
"""Of activations: steps differ in size, and freed blocks do not always fit the next one."""
STEPS_SENT: Final = 2
"""Whose hidden states may be on their way to the next pipeline stage."""
LIBRARIES: Final = 320 * MIB
"""Machine code that is loaded at its first use, cuBLAS's workspaces, counters of our kernels."""
GRAPH: Final = 2 * MIB
"""What the driver keeps of one captured graph."""
PROMPT_LOGITS: Final = 1 << 24
"""Logits that exist at a time for log-probabilities of prompts."""
MOST_UTILIZATION: Final = 0.98
"""What is worth suggesting."""
LEAST_CONTEXT: Final = 2048
"""A longer context is not cut to less than that without being asked to: few requests would fit."""


@dataclass(frozen=True)
class Load:
    """The most that runs at a time: tokens of a step, rows (requests) of a step, positions of a
    request. fused: by our own decoder, which keeps fewer intermediate results than a model computed
    operation by operation. attention: bytes that attention works in where torch computes it; 0
    where kernels do. stage: which layers there are."""

    tokens: int
    rows: int
    positions: int
    graphs: bool = True
    fused: bool = True
    attention: int = 0
    stage: PipelineStage = WHOLE_MODEL


@dataclass(frozen=True)
class Workspace:
    """Bytes beside weights and KV blocks."""

    activations: int
    graphs: int
    sampling: int
    tables: int
    libraries: int = LIBRARIES

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.activations + self.graphs + self.sampling + self.tables + self.libraries

    def line(self) -> str:
        """The division, human-readable."""
        return (
            f"workspace {gib(self.total)}: activations {gib(self.activations)}, graphs {gib(self.graphs)}, sampling {gib(self.sampling)}, "
            f"tables {gib(self.tables)}, libraries {gib(self.libraries)}"
        )


@dataclass(frozen=True)
class MemoryRequest:
    """What the flags ask for. kv_bytes, blocks, max_model_len 0: from the memory there is; the
    first two replace utilization."""

    utilization: float
    block_size: int
    kv_bytes: int = 0
    blocks: int = 0
    max_model_len: int = 0
    fit: bool = False


def gib(amount: float) -> str:
    """`amount` bytes, human-readable."""
    return f"{amount / GIB:.2f} GiB"


def step_bytes(arch: Architecture, itemsize: int, tokens: int) -> int:
    """Activations of a step at their largest: in the MLP, or around attention, whichever is more.
    Hidden states: the residual, the layer's input and its normed form, one more for blocks that add
    two results."""
    heads = arch.num_heads * arch.head_dim
    kv = arch.num_kv_heads * arch.head_dim
    width = max(2 * heads + 2 * kv, _mlp_width(arch))
    return tokens * itemsize * (4 * arch.hidden_size + heads + width)


def captured_tokens(arch: Architecture) -> int:
    """Tokens of the largest step with prompts that is captured in a graph. Larger ones keep the GPU
    busy for longer than the CPU takes to launch their kernels, which is soon so for large models;
    and graphs have activations of their own."""
    return CAPTURED_TOKENS_SMALL if arch.parameters < SMALL_MODEL else CAPTURED_TOKENS


def _mlp_width(arch: Architecture) -> int:
    """Elements a token between the MLP's input and its output: both products and what lies
    between."""
    dense = (3 if arch.gated else 2) * (arch.intermediate_size or 4 * arch.hidden_size)
    if arch.moe is None:
        return dense
    inner = arch.moe.intermediate_size
    routed = (
        arch.moe.top_k * max(3 * inner, inner + 5 * arch.hidden_size) + 4 * arch.moe.num_experts
    )
    return max(dense if arch.moe.dense_layers else 0, routed + 3 * arch.moe.shared_size)


def handed_on_bytes(arch: Architecture, itemsize: int, load: Load) -> int:
    """Hidden states, and what they are added to, between pipeline stages: those of one step that is
    received, with a copy, and of as many as are sent ahead with one that is made ready."""
    stage = load.stage
    steps = 2 * (not stage.is_first) + (not stage.is_last) * (STEPS_SENT + 1)
    return steps * 2 * load.tokens * arch.hidden_size * itemsize


def partial_bytes(arch: Architecture, rows: int) -> int:
    """Partial results of attention, in float32: of contexts that are split among programs, and of
    groups with common blocks."""
    group = arch.num_heads // arch.num_kv_heads
    slots = max(8192 * group, rows * arch.num_heads) + 32768
    return slots * (arch.head_dim + 1) * 4


def workspace(arch: Architecture, itemsize: int, load: Load) -> Workspace:
    """What steps of at most `load` need. Logits are scored and restricted in float32, after the
    layers have given their memory back; what penalties (a count and a flag) and biases (a float,
    kept twice while they grow) remember of each slot, and masks (a bit), are there all the
    time."""
    logits = load.rows * arch.vocab_size
    scored = (
        logits * (itemsize + 4 + 4 + 1)
        + PROMPT_LOGITS * (itemsize + 4 + 1)
        + logits * 4 * (arch.final_logit_softcapping is not None)
    )
    step = step_bytes(arch, itemsize, load.tokens) * (1.0 if load.fused else UNFUSED)
    activations = max(step, scored) + (load.attention or partial_bytes(arch, load.rows))
    graphs = 0
    if load.graphs:
        largest = min(captured_tokens(arch), load.tokens)
        captured = step_bytes(arch, itemsize, largest) + step_bytes(arch, itemsize, load.rows)
        graphs = (
            captured
            + partial_bytes(arch, load.rows)
            + 2 * logits * itemsize
            + GRAPH * (64 + load.rows // 4)
        )
    tables = 2 * load.positions * arch.head_dim * 4 + 4 * load.rows * (load.positions // 16 + 1) * 4
    activations = int(activations * SLACK) + handed_on_bytes(arch, itemsize, load)
    return Workspace(activations, graphs, logits * (5 + 6) + logits // 8, tables)


def size(
    arch: Architecture,
    itemsize: int,
    cache: CacheSpec,
    weights: int,
    gpu: Gpu,
    request: MemoryRequest,
    load: Load,
) -> Sizing:
    """Divide the memory of `gpu`, of which `weights` bytes go to weights. itemsize: of weights and
    activations; cache: what the layers keep. Raises DoesNotFit."""
    block_bytes = cache.block_bytes(request.block_size)
    space = workspace(arch, itemsize, load)
    fixed = weights + space.total
    exact = request.blocks or request.kv_bytes // block_bytes
    budget = _budget(gpu, request)
    num_blocks = exact or max(0, budget - fixed) // block_bytes
    if not num_blocks or fixed + num_blocks * block_bytes > budget:
        least = exact or max(1, -(-_least(arch, request) // request.block_size))
        line = _no_room(gpu, request, weights, space.total, least, block_bytes, budget, itemsize)
        raise DoesNotFit(line)
    length, note = context(
        arch, num_blocks * request.block_size, request.max_model_len, request.fit
    )
    if length > num_blocks * request.block_size:
        raise DoesNotFit(_too_long(gpu, request, fixed, length, num_blocks, block_bytes))
    if note and not exact and length < _least(arch, request):
        longest = request.max_model_len or arch.max_position
        parts = (weights, space.total, num_blocks * block_bytes)
        raise DoesNotFit(_too_short(gpu, request, parts, length, longest))
    divided = _divided(gpu, request, weights, space, num_blocks * block_bytes, budget)
    return Sizing(
        weights,
        block_bytes,
        num_blocks,
        request.block_size,
        length,
        space.total,
        gpu,
        (_seen(gpu), divided, space.line()),
        note,
        cache.kv_type,
    )


def _budget(gpu: Gpu, request: MemoryRequest) -> int:
    """Bytes that weights, workspace and KV cache may take together: all that is free where the
    size of the cache is asked for."""
    if request.blocks or request.kv_bytes:
        return gpu.free
    return gpu.free - int(gpu.total * (1 - request.utilization))


def _seen(gpu: Gpu) -> str:
    users = gpu.users()
    return f"{gpu.title()}: {gib(gpu.free)} free" + (f"; {users}" if users else "")


def _divided(
    gpu: Gpu, request: MemoryRequest, weights: int, space: Workspace, cache: int, budget: int
) -> str:
    share = f"{request.utilization:.0%} of the GPU less {gib(gpu.total - gpu.free)} in use"
    usable = f"{gib(budget)} ({'free' if request.blocks or request.kv_bytes else share})"
    left = gpu.free - weights - space.total - cache
    return f"of {usable}: weights {gib(weights)}, workspace {gib(space.total)}, KV cache {gib(cache)}; {gib(left)} stay free"


def _no_room(
    gpu: Gpu,
    request: MemoryRequest,
    weights: int,
    space: int,
    num_blocks: int,
    block_bytes: int,
    budget: int,
    itemsize: int,
) -> str:
    """Weights and workspace leave less than the KV blocks that were asked for, or none where at
    least `num_blocks` are needed."""
    fixed = weights + space
    least = num_blocks * block_bytes
    exact = bool(request.blocks or request.kv_bytes)
    parts = f"weights {gib(weights)}, workspace {gib(space)}, KV cache {'' if exact else 'at least '}{gib(least)}"
    limit = (
        "is free"
        if exact
        else f"may be used ({request.utilization:.0%} of it less {gib(gpu.total - gpu.free)} in use)"
    )
    help_: list[str] = []
    fitting = max(0, budget - fixed) // block_bytes
    if exact and fitting:
        flag = (
            f"--num-kv-blocks to {fitting}"
            if request.blocks
            else f"--kv-cache-memory-bytes to {fitting * block_bytes}"
        )
        help_.append(f"lower {flag}")
    if not exact:
        help_ += _more_memory(gpu, request, fixed + least)
    if itemsize == 4:
        help_.append("--dtype half or bfloat16 halves the weights")
    if weights > budget:
        room = max(0, budget - space)
        help_.append(f"a smaller model ({gib(room)} are there for weights)")
    help_.append("lower --max-num-batched-tokens or --max-num-seqs for a smaller workspace")
    return (
        f"the model needs {gib(fixed + least)} ({parts}) but of {gpu.title()} {gib(max(0, budget))} {limit}. "
        + _with_remedies(gpu, help_)
    )


def _too_long(
    gpu: Gpu, request: MemoryRequest, fixed: int, length: int, num_blocks: int, block_bytes: int
) -> str:
    needed = -(-length // request.block_size)
    fitting = num_blocks * request.block_size
    help_ = [f"lower --max-model-len to {fitting} (--fit does so by itself)"]
    if request.blocks:
        help_.append(f"raise --num-kv-blocks to {needed}")
    elif request.kv_bytes:
        help_.append(f"raise --kv-cache-memory-bytes to {needed * block_bytes}")
    else:
        help_ += _more_memory(gpu, request, fixed + needed * block_bytes)
    help_.append("a smaller model leaves more for it")
    return (
        f"a context of {length:,} tokens needs {needed:,} KV blocks ({gib(needed * block_bytes)}), there is room for {num_blocks:,} "
        f"({gib(num_blocks * block_bytes)}, {fitting:,} tokens). " + _with_remedies(gpu, help_)
    )


def _least(arch: Architecture, request: MemoryRequest) -> int:
    """Tokens below which a context that is cut is no use. Who asks for a shorter one may have it,
    and with --fit even less."""
    if request.max_model_len:
        return LEAST_CONTEXT if request.max_model_len >= LEAST_CONTEXT else 0
    return min(LEAST_CONTEXT, arch.max_position)


def _too_short(
    gpu: Gpu, request: MemoryRequest, parts: tuple[int, int, int], fitting: int, longest: int
) -> str:
    """parts: weights, workspace and what is left for KV blocks, in bytes."""
    weights, space, cache = parts
    least = min(LEAST_CONTEXT, longest)
    help_ = _more_memory(
        gpu,
        request,
        weights + space + cache * least // fitting + cache // fitting * request.block_size,
    )
    help_.append(f"--max-model-len {fitting} serves so short a context")
    help_.append("lower --max-num-batched-tokens or --max-num-seqs for a smaller workspace")
    help_.append("a smaller model leaves more for it")
    return (
        f"a context of {fitting:,} tokens is all that fits, of {longest:,}, and less than {least:,} is served only when asked for: of "
        f"{gpu.title()} {gib(weights + space + cache)} may be used, weights take {gib(weights)} and the workspace {gib(space)}, which "
        f"leaves {gib(cache)} for the KV cache. " + _with_remedies(gpu, help_)
    )


def _more_memory(gpu: Gpu, request: MemoryRequest, needed: int) -> list[str]:
    """Ways to `needed` bytes, beside what is in use."""
    share = math.ceil((gpu.total - gpu.free + needed) / gpu.total * 100) / 100
    if request.utilization < share <= MOST_UTILIZATION:
        return [f"raise --gpu-memory-utilization from {request.utilization:g} to {share:g}"]
    return []


def _with_remedies(gpu: Gpu, help_: list[str]) -> str:
    users = gpu.users()
    if users:
        help_ = ["end the other processes", *help_]
    return (f"{users}. " if users else "") + "What helps: " + "; ".join(help_)


def outcome(sizing: Sizing, reserved: int, peak: int, free: int) -> str:
    """Planned against measured, once everything is allocated: torch's reserved bytes, now and at
    their peak, and what the GPU has free."""
    before = sizing.gpu.free if sizing.gpu is not None else free
    used = before - free
    space = used - sizing.weight_bytes - sizing.kv_bytes
    planned = sizing.weight_bytes + sizing.kv_bytes + sizing.workspace
    return (
        f"GPU memory: {gib(used)} taken of {gib(planned)} planned, {gib(free)} free; workspace {gib(space)} so far of "
        f"{gib(sizing.workspace)}; torch reserved {gib(reserved)}, {gib(peak)} at most"
    )
