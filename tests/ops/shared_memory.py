"""How much shared memory the launches of models need, on any card and without one.

    python tests/ops/shared_memory.py 80:float32 86:float32             # lines of JSON: the
    launch, bytes
    python tests/ops/shared_memory.py --whole 86:float32:101376:Gemma-2B    # down to machine code

The decoder runs on torch's meta device, where tensors have sizes and no memory, with the host code
of the real back end; what it would launch is noted. Each distinct launch is then compiled as far as
Triton's allocation of shared memory, which is before LLVM and ptxas.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ops.known_models import MODELS
from pagewire.worker.gpu.decode_graphs import buckets, cascade_buckets
from pagewire.worker.models import describe
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire_kernels import cuda, moe_shapes, penalties, shapes
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import Batch
from pagewire_kernels.cascade import Groups
from pagewire_kernels.sampling_map import PARAMETERS, SamplingRows
from pagewire_kernels.slot_state import DecodeRows, SlotState, commit, decode_inputs
from pagewire_protocol.agreed import MAX_PREFIX_GROUPS
from triton._C.libtriton import ir, nvidia, passes  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime import JITFunction, driver

META = torch.device("meta")
LIMITS = {
    80: shapes.KIB_163,
    86: shapes.KIB_99,
    89: shapes.KIB_99,
    90: shapes.KIB_227,
    100: shapes.KIB_227,
    120: shapes.KIB_99,
}
COUNTED_AS = {80: 86, 89: 86, 120: 86}
"""Triton's passes up to the allocation know 8.x as one (`capability // 10`), and 12.0 gets the tensor
core instructions of 8.x."""
TYPE_COUNTED_AS = {torch.float16: torch.bfloat16}
"""As large, and handled alike: launches that differ in both count as one. Each of the 57 of all models
on 12.0 and 8.6, and of the 122 in float16 and bfloat16 on 8.6, was compiled once and had the same
bytes; `--whole` compares a few whole kernels with what they are counted as."""
SIZES = (
    "HKV",
    "GROUP",
    "GP",
    "D",
    "SPLITS",
    "STRIDE",
    "CHUNK",
    "SPAN",
    "B_PAD",
    "G_PAD",
    "S_PAD",
    "K",
    "H",
    "N",
    "WIDE",
    "WIDTH",
    "eps",
)
FLAGS = ("ALIBI", "BIAS", "CAP", "MIXED", "NORM", "PREFIXES", "ROPE", "WINDOW")
"""Constants that change no tile that is kept in shared memory (D_PAD, M and BLOCK_M do): launches
that differ in them alone count as one. All 274 launches in float32 on 8.6 and 283 in bfloat16 on
9.0, each compiled, gave the same bytes with and without."""
TILED = (
    "_decode",
    "_prefill",
    "_prefix",
    "_skinny",
    "_row",
    "_thresholds",
    "_grouped",
    "_pair_up",
    "_token_down",
)
"""Kernels that keep more than a few KiB. The others are measured for SMALLEST alone."""
SMALLEST = 86
ROWS, PAGE, BLOCKS, LENGTH = 256, 16, 64, 2048
MIXED = ((16, 16), (64, 64), (512, 16), (512, 256), (2048, 64), (8192, 256))
"""Steps with prompts: tokens and rows."""


@dataclass
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    def key(self) -> tuple[Any, ...]:
        types = {
            str(TYPE_COUNTED_AS.get(arg.dtype, arg.dtype))
            for arg in self.args
            if isinstance(arg, torch.Tensor) and arg.is_floating_point()
        }
        name = self.kernel.__name__
        same = {*SIZES, *(FLAGS if name in TILED else ()), *(("M",) if name == "_skinny" else ())}
        return (
            name,
            *sorted(types),
            *sorted(
                (option, value) for option, value in self.options.items() if option not in same
            ),
        )

    def words(self) -> str:
        chosen = " ".join(
            f"{name}={value}"
            for name, value in self.options.items()
            if name not in ("grid", "warmup")
        )
        return f"{self.kernel.__name__} {chosen}"


Models = dict[str, dict[str, Any]]


class Recorder:
    """In place of JITFunction.run."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, ...], Launch] = {}

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = Launch(kernel, args, options)
        self.seen.setdefault(launch.key(), launch)


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def groups(rows: int) -> Groups:
    return Groups(empty(rows), empty(MAX_PREFIX_GROUPS + 1), empty(MAX_PREFIX_GROUPS), empty(rows))


def batch(tokens: int, rows: int, grouped: bool) -> Batch:
    long = torch.int64
    tables = empty(rows, LENGTH // PAGE)
    most = 1 if tokens == rows else tokens
    made = Batch(
        empty(tokens, dtype=long),
        empty(tokens, dtype=long),
        empty(rows + 1),
        empty(rows),
        tables,
        most,
        LENGTH,
    )
    made.groups = groups(rows) if grouped else None
    return made


def run_model(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Every kind of step that a worker would capture or launch."""
    arch = describe(config)
    decoder = Decoder(arch, Build(backend("cuda"), dtype, "meta"))
    for _ in decoder.pack():
        pass
    factors = [empty(LENGTH, arch.head_dim, dtype=torch.float32)] * arch.num_layers
    caches = [
        empty(2, BLOCKS, arch.num_kv_heads, PAGE, arch.head_dim, dtype=dtype)
    ] * arch.num_layers
    steps = [
        (size, size, grouped)
        for grouped, sizes in ((False, buckets(ROWS)), (True, cascade_buckets(ROWS)))
        for size in sizes
    ]
    for tokens, rows, grouped in [*steps, *((*step, step[1] >= 64) for step in MIXED)]:
        wanted = None if tokens == rows else empty(rows, dtype=torch.int64)
        ids = empty(tokens, dtype=torch.int64)
        decoder(ids, factors, caches, batch(tokens, rows, grouped), wanted, lambda: None)
    sample(arch.vocab_size, dtype)


def sample(vocab: int, dtype: torch.dtype) -> None:
    """In a step, and of rows that ask for more, whose logits are float32."""
    for kind, counts in ((dtype, (1, 256)), (torch.float32, (1, 512))):
        for count in counts:
            values = empty(len(PARAMETERS), count, dtype=torch.float32)
            wide = empty(count, dtype=torch.int64)
            for filtered in (True, False):
                given = SamplingRows(values, wide, wide, filtered)
                cuda.sample(empty(count, vocab, dtype=kind), given)


def run_state() -> None:
    state = SlotState.empty(ROWS, LENGTH // PAGE, "meta")
    decode_inputs(empty(8), state, PAGE, DecodeRows.empty(8, LENGTH // PAGE, "meta"))
    commit(empty(8), empty(8, dtype=torch.int64), empty(8, dtype=torch.bool), state, empty(8))
    few, row = empty(1, dtype=torch.float32), empty(1, 32_000, dtype=torch.float32)
    penalties.apply_penalties(
        row, row.int(), row.to(torch.uint8), empty(1, dtype=torch.int64), few, few, few
    )
    penalties.count_tokens(row.int(), empty(1), empty(1))


@contextlib.contextmanager
def pretended_class(capability: int) -> Iterator[None]:
    """Experts' launches are chosen by the compute capability."""
    chosen = moe_shapes.device_class
    moe_shapes.device_class = lambda device: capability // 10
    try:
        yield
    finally:
        moe_shapes.device_class = chosen


def launches(asked: "Asked") -> list[Launch]:
    """The distinct ones of the models on the card."""
    dtype, limit, models, capability = asked.dtype, asked.limit, asked.models, asked.capability
    recorder, run = Recorder(), JITFunction.run
    JITFunction.run = lambda self, *args, **options: recorder.run(self, *args, **options)
    try:
        with shapes.pretend(limit), pretended_class(capability):
            for config in models.values():
                run_model(config, dtype)
            run_state()
    finally:
        JITFunction.run = run
    return list(recorder.seen.values())


class Target:
    """A driver without a device: enough to compile."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class Allocated(Exception):
    """Ends a compilation."""


def _allocate(self: Any, module: Any, metadata: Any, options: Any, capability: int) -> None:
    """The passes of CUDABackend.make_llir as far as the allocation."""
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    version = compiler.get_ptx_version_from_options(options, self.target.arch)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, version)
    manager.run(module, "make_llir")
    raise Allocated(module.get_int_attr("ttg.shared"))


def compiled(launch: Launch, capability: int) -> Any:
    """The whole kernel, down to ptxas."""
    driver.set_active(Target(capability))
    return launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options)


def shared_bytes(launch: Launch, capability: int) -> int:
    whole = compiler.CUDABackend.make_llir
    compiler.CUDABackend.make_llir = _allocate
    try:
        compiled(launch, capability)
    except Allocated as told:
        return int(told.args[0])
    finally:
        compiler.CUDABackend.make_llir = whole
    raise ValueError(
        f"{launch.words()} was found in Triton's cache; set TRITON_CACHE_DIR to an empty folder"
    )


@dataclass(frozen=True)
class Asked:
    """On the command line capability:type[:limit[:model]], the limit being what the host code
    chooses shapes for."""

    capability: int
    dtype: torch.dtype
    limit: int
    models: Models

    @classmethod
    def parse(cls, text: str) -> "Asked":
        capability, dtype, *more = text.split(":")
        limit = int(more[0]) if more else LIMITS[int(capability)]
        models = {name: MODELS[name] for name in more[1:]} or MODELS
        return cls(int(capability), getattr(torch, dtype), limit, models)


def measure(asked: Asked, known: dict[tuple[Any, ...], int]) -> Iterator[dict[str, Any]]:
    """known: bytes by what was compiled, for cards that come later."""
    for launch in launches(asked):
        name = launch.kernel.__name__
        if name in TILED or asked.capability == SMALLEST:
            counted_as = COUNTED_AS.get(asked.capability, asked.capability)
            key = counted_as, *launch.key()
            if key not in known:
                known[key] = shared_bytes(launch, counted_as)
            yield {"kernel": name, "launch": launch.words(), "shared": known[key]}


def compile_whole(asked: Asked) -> Iterator[dict[str, Any]]:
    """The first launch of each kernel that keeps tiles, as it is and as it is counted."""
    counted_type = TYPE_COUNTED_AS.get(asked.dtype, asked.dtype)
    counted = first_launches(replace(asked, dtype=counted_type))
    for name, launch in first_launches(asked).items():
        counted_as = COUNTED_AS.get(asked.capability, asked.capability)
        shared = shared_bytes(counted[name], counted_as)
        whole = compiled(launch, asked.capability)
        yield {
            "kernel": name,
            "launch": launch.words(),
            "shared": shared,
            "whole": whole.metadata.shared,
        }


def first_launches(asked: Asked) -> dict[str, Launch]:
    first: dict[str, Launch] = {}
    for launch in launches(asked):
        first.setdefault(launch.kernel.__name__, launch)
    return {name: first[name] for name in ("_prefill", "_decode")}


def main(arguments: list[str]) -> None:
    whole, known = "--whole" in arguments, dict[tuple[Any, ...], int]()
    for given in arguments:
        if given != "--whole":
            asked = Asked.parse(given)
            for found in compile_whole(asked) if whole else measure(asked, known):
                print(json.dumps({"asked": given, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
