"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_moe.py [--device cuda|cpu] [--parts check,time,row] [--rows 1,32] [--processes 12]

Mixtures of experts of Qwen3-30B-A3B's and Mixtral 8x7B's sizes. Check: every path at several row
counts in bfloat16, float16 and float32 against float64 (or float32 where that takes too long), on
fresh random inputs, with memory that was never written being NaN, with padding, and bitwise on the
replay of a CUDA graph whose inputs change. Time: each product in the launch shapes of the tables
below, the layer from logits to sums as the tables of moe_shapes.py choose, with the best shapes
found here, and as it was before (rows sorted by torch, its grouped products), beside the time that
the bytes or the operations need at rates measured in the same run. Row: what follows attention in a
layer of one row, by the kernels for any number of rows and by those for one (models/single.py),
checked and timed. The tables come last; the exit status is 0 when every check passed. With
`--device cpu`, tiny sizes in Triton's interpreter: does the check itself work?
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import ops.conftest  # noqa: F401  # mends the interpreter

import torch
import torch.nn.functional as F
from ops.moe_cases import MoeCase, moe_case
from ops.triton_cases import error
from pagewire_kernels import (
    gemm,
    moe,
    moe_grouped,
    moe_router,
    moe_row_router,
    moe_rows,
    moe_shapes,
    norm,
    reference,
)
from pagewire_kernels.activation import silu_mul
from pagewire_kernels.gemm_cublaslt import GemmAlgorithms
from pagewire_kernels.moe_row_router import Routed
from pagewire_kernels.moe_shapes import GroupedConfig, GroupedPair, PairConfig
from pagewire_kernels.routing import NO_EXPERT, Routing
from pagewire_kernels.workspace import counters
from torch import Tensor

# --- what is tried: edit here ---

UP_PAIRS: Final = [
    PairConfig(*shape)
    for shape in (
        (2, 512, 1, 3, True),
        (2, 512, 1, 3, False),
        (4, 512, 1, 3, True),
        (4, 512, 2, 3, True),
        (4, 1024, 4, 3, True),
        (8, 512, 4, 3, True),
        (8, 256, 2, 4, True),
        (2, 1024, 2, 3, True),
        (4, 256, 1, 4, True),
        (16, 256, 4, 3, True),
    )
]
DOWN_PAIRS: Final = [
    PairConfig(*shape)
    for shape in (
        (2, 256, 1, 4, False),
        (2, 256, 1, 4, True),
        (4, 256, 1, 4, False),
        (4, 256, 2, 4, False),
        (8, 256, 2, 4, False),
        (2, 1024, 1, 3, False),
        (2, 1024, 2, 3, False),
        (4, 1024, 4, 3, False),
        (8, 256, 4, 5, False),
        (2, 768, 1, 3, False),
    )
    if shape[1] & (shape[1] - 1) == 0
]
SWAPPED: Final = [
    GroupedConfig(block_m, 64, block_k, 4, stages, swap=True)
    for block_m, block_k, stages in (
        (16, 128, 4),
        (16, 128, 3),
        (16, 64, 5),
        (16, 64, 4),
        (16, 256, 3),
        (32, 128, 4),
        (32, 128, 3),
        (32, 64, 5),
        (32, 64, 4),
        (64, 128, 3),
        (64, 64, 4),
        (64, 64, 3),
        (128, 64, 4),
    )
] + [
    GroupedConfig(16, 128, 128, 4, 3, swap=True),
    GroupedConfig(16, 128, 64, 4, 4, swap=True),
    GroupedConfig(32, 128, 64, 4, 4, swap=True),
    GroupedConfig(64, 128, 64, 8, 3, swap=True),
]
PLAIN: Final = [
    GroupedConfig(64, 64, 64, 4, 4, swap=False),
    GroupedConfig(64, 128, 64, 4, 3, swap=False),
    GroupedConfig(64, 128, 64, 8, 4, swap=False),
    GroupedConfig(128, 64, 64, 4, 4, swap=False),
    GroupedConfig(128, 128, 64, 8, 3, swap=False),
    GroupedConfig(128, 128, 64, 8, 4, swap=False),
    GroupedConfig(128, 128, 64, 4, 3, swap=False),
    GroupedConfig(128, 256, 64, 8, 3, swap=False),
    GroupedConfig(256, 128, 64, 8, 3, swap=False),
    GroupedConfig(256, 64, 64, 8, 3, swap=False),
]


def tried_blocks(rows_per_expert: float) -> tuple[int, ...]:
    """Sizes of tiles that are worth trying at so many rows an expert."""
    if rows_per_expert <= 6:
        return (16,)
    if rows_per_expert <= 14:
        return (16, 32)
    if rows_per_expert <= 40:
        return (16, 32, 64)
    return (32, 64, 128) if rows_per_expert <= 100 else (128, 256)


@dataclass(frozen=True)
class Sizes:
    """Of a layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def expert_bytes(self) -> float:
        return 2.0 * 3 * self.hidden * self.inner

    @property
    def routing(self) -> Routing:
        return Routing(self.experts, self.top_k, renormalize=True)


QWEN, MIXTRAL = (
    Sizes("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Sizes("Mixtral-8x7B", 8, 2, 4096, 14336),
)
TINY: Final = Sizes("tiny", 5, 2, 32, 16)
CHECKED: Final = {
    QWEN: (1, 2, 7, 8, 9, 32, 100, 256, 1000, 8192),
    MIXTRAL: (1, 8, 9, 64, 256),
    TINY: (2, 12),
}
TIMED: Final = {
    QWEN: (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 8192),
    MIXTRAL: (1, 2, 4, 8, 32, 256),
    TINY: (12,),
}
TYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
BOUNDS: Final = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
"""Relative norm of the difference: a few times what rounding inner results and results makes."""
ROW_PATH: Final = 16
"""Rows up to which the path of single rows is checked and timed."""
WEIGHT_SETS, INPUT_SETS = 2, 4
GOAL_US: Final = 1500.0
UNWRITTEN: Final = -7
TORCH_GROUPED = (9, 10)
"""Major compute capabilities on which torch's grouped product waits for nothing."""


# --- the layer as it was ---


def old_route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax, choice and division by torch."""
    scores = torch.softmax(logits, -1, dtype=torch.float32)
    weights, ids = torch.topk(scores, k, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True)


def old_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Rows sorted by torch, its grouped products and a sum."""
    tokens, k = ids.shape
    expert, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(len(gate_up), device=x.device), right=True).int()
    inner = silu_mul(F.grouped_mm(x[order // k], gate_up.mT, offs=ends))
    sorted_rows = F.grouped_mm(inner, down.mT, offs=ends)
    rows = torch.empty_like(sorted_rows)
    rows[order] = sorted_rows
    return torch.einsum("tkh,tk->th", rows.view(tokens, k, -1).float(), weights).to(x.dtype)


# --- compiling, in processes of their own ---


Shape = PairConfig | GroupedConfig | None


@dataclass(frozen=True)
class Compilation:
    """One kernel: `stage` is up, down or other."""

    sizes: Sizes
    dtype: torch.dtype
    stage: str
    config: Shape


def compilations(parts: list[str]) -> list[Compilation]:
    """Everything that is launched later, without doubles."""
    wanted: dict[Compilation, None] = {}

    def want(sizes: Sizes, dtype: torch.dtype, up: Shape, down: Shape) -> None:
        wanted[Compilation(sizes, dtype, "up", up)] = None
        wanted[Compilation(sizes, dtype, "down", down)] = None

    for sizes in (QWEN, MIXTRAL):
        for dtype in TYPES if sizes == QWEN else TYPES[:1]:
            wanted[Compilation(sizes, dtype, "other", None)] = None
            want(
                sizes,
                dtype,
                moe_shapes.pick_up(sizes.hidden),
                moe_shapes.pick_down(sizes.inner, sizes.top_k),
            )
            for rows in {*CHECKED[sizes], *TIMED[sizes]}:
                pair = grouped_default(sizes, rows, dtype)
                want(sizes, dtype, pair.up, pair.down)
        if "time" not in parts:
            continue
        for config in UP_PAIRS:
            wanted[Compilation(sizes, torch.bfloat16, "up", config)] = None
        for config in DOWN_PAIRS:
            wanted[Compilation(sizes, torch.bfloat16, "down", config)] = None
        for rows in TIMED[sizes]:
            for config in grouped_tried(sizes, rows):
                want(sizes, torch.bfloat16, config, config)
    return list(wanted)


def grouped_default(sizes: Sizes, rows: int, dtype: torch.dtype) -> GroupedPair:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
    per_expert = rows * sizes.top_k / sizes.experts
    return moe_shapes.pick_grouped(per_expert, dtype, device)


def grouped_tried(sizes: Sizes, rows: int) -> list[GroupedConfig]:
    if rows <= 8:
        return []
    blocks = tried_blocks(rows * sizes.top_k / sizes.experts)
    return [config for config in (*SWAPPED, *PLAIN) if config.block_m in blocks]


def compile_one(task: Compilation) -> str:
    """What was in the way, or nothing. Two experts and few tokens launch the same kernels."""
    sizes, dtype = task.sizes, task.dtype
    try:
        if task.stage == "other":
            case = moe_case(24, sizes.experts, sizes.top_k, 64, 32, dtype, device="cuda")
            logits = torch.randn(24, sizes.experts, device="cuda").to(dtype)
            mapping = torch.zeros(24, dtype=torch.int64, device="cuda")
            moe.route(logits, sizes.routing, None, mapping)
            for pairs in (128, 256, 512, 1024, 2048, 4096):
                ids = torch.zeros(pairs // sizes.top_k, sizes.top_k, dtype=torch.int32)
                moe_router.align(ids.cuda(), sizes.experts, 16)
            rows = torch.zeros(case.top_k_ids.numel(), sizes.hidden, dtype=dtype, device="cuda")
            aligned = moe_router.align(case.top_k_ids, sizes.experts, 16)
            moe_grouped.combine(rows, aligned, case.top_k_ids, case.top_k_weights)
        else:
            launch_small(task)
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{task.sizes.name} {task.dtype} {task.stage} {task.config}: {str(problem)[:160]}"
    return ""


def launch_small(task: Compilation) -> None:
    sizes, dtype, config = task.sizes, task.dtype, task.config
    tokens, k = 4, sizes.top_k
    first = task.stage == "up"
    shape = (2, 2 * sizes.inner, sizes.hidden) if first else (2, sizes.hidden, sizes.inner)
    weight = torch.zeros(shape, dtype=dtype, device="cuda")
    ids = torch.zeros(tokens, k, dtype=torch.int32, device="cuda")
    shares = torch.zeros(tokens, k, device="cuda")
    x = torch.zeros(tokens, sizes.hidden, dtype=dtype, device="cuda")
    inner = torch.zeros(tokens * k, sizes.inner, dtype=dtype, device="cuda")
    if isinstance(config, GroupedConfig):
        aligned = moe_router.align(ids, 2, config.block_m)
        if first:
            moe_grouped.grouped_up(x, weight, aligned, k, config)
        else:
            moe_grouped.grouped_down(inner, weight, aligned, config)
    elif first:
        moe_rows.pair_up(x, weight, ids, config=config)
    else:
        moe_rows.token_down(inner, weight, ids, shares, config=config)


def compile_all(parts: list[str], processes: int) -> None:
    began, tasks = time.monotonic(), compilations(parts)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        problems = [line for line in pool.map(compile_one, tasks, chunksize=2) if line]
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{len(tasks)} kernels compiled in {time.monotonic() - began:.0f} s", flush=True)


# --- checks ---


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What torch.empty gives is NaN, or a number that is no expert and no row."""
    empty = torch.empty

    def poisoned(*sizes: Any, **options: Any) -> Tensor:
        value = empty(*sizes, **options)
        return value.fill_(float("nan") if value.is_floating_point() else UNWRITTEN)

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty


@dataclass
class Checks:
    """Counts what was checked; keeps what was wrong and the worst error by type and path."""

    count: int = 0
    faults: list[str] = field(default_factory=list[str])
    worst: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])

    def error(self, path: str, what: str, out: Tensor, exact: Tensor) -> None:
        wrong = error(out, exact)
        key = (path, str(out.dtype)[6:])
        self.worst[key] = max(self.worst.get(key, 0.0), wrong)
        self.that(wrong <= BOUNDS[out.dtype], f"{path}, {what}, {key[1]}: error {wrong:.2g}")

    def that(self, right: bool, what: str) -> None:
        self.count += 1
        if not right:
            self.faults.append(what)
            print("WRONG:", what, flush=True)


def paths(rows: int) -> dict[str, Callable[..., Tensor]]:
    """All ways through the layer at so many rows."""
    ways: dict[str, Callable[..., Tensor]] = {"chosen": moe.experts}
    if rows <= ROW_PATH:
        ways["rows"] = moe_rows.experts_of_rows
    ways["grouped"] = moe.grouped_experts
    return ways


def check_sizes(sizes: Sizes, device: str, rows_wanted: set[int], checks: Checks) -> None:
    for dtype in TYPES if sizes != MIXTRAL else TYPES[:1]:
        for rows in CHECKED[sizes]:
            if rows_wanted and rows not in rows_wanted:
                continue
            padding = rows // 5
            case = moe_case(
                rows, sizes.experts, sizes.top_k, sizes.hidden, sizes.inner, dtype, padding, device
            )
            check_case(f"{sizes.name} {rows} rows", case, device, checks)
            del case


def check_case(what: str, case: MoeCase, device: str, checks: Checks) -> None:
    exact, padding = case.exact(), case.top_k_ids.lt(0).all(1)
    for path, way in paths(len(case.x)).items():
        x, gate_up, down, ids, weights = case.inputs
        with poisoned_memory():
            out = way(x, gate_up, down, ids, weights)
            again = way(x, gate_up, down, ids, weights)
        checks.error(path, what, out[~padding], exact[~padding])
        checks.that(bool(out[padding].eq(0).all()), f"{path}, {what}: padding is not zero")
        checks.that(out.equal(again), f"{path}, {what}: not the same when repeated")


def check_router(sizes: Sizes, device: str, checks: Checks) -> None:
    """Against the oracle, with ties and padding."""
    for rows in (1, 5, 40) if sizes != TINY else (5,):
        for logits in (
            torch.randn(rows, sizes.experts),
            torch.randint(-2, 3, (rows, sizes.experts)).float(),
        ):
            mapping = torch.arange(rows) - (rows > 4) * 2
            for dtype in TYPES:
                given = logits.to(dtype)
                with poisoned_memory():
                    ids, weights = moe.route(
                        given.to(device), sizes.routing, None, mapping.to(device)
                    )
                wanted_ids, wanted_weights = reference.route(given, sizes.routing, None, mapping)
                # exponentials differ by a rounding, so that the last of near equals may
                close = (weights.cpu() - wanted_weights).abs().max().item() < 1e-5
                same = (ids.cpu() == wanted_ids).double().mean().item()
                what = f"router, {sizes.name} {rows} rows, {dtype}"
                checks.that(close and same > 0.97, f"{what}: {same:.3f} of ids, weights {close}")
                checks.that(
                    bool(ids.cpu()[mapping < 0].eq(NO_EXPERT).all()), f"{what}: padding has experts"
                )


def check_residual(sizes: Sizes, device: str, checks: Checks) -> None:
    """Added to the sums of one row."""
    case = moe_case(
        1, sizes.experts, sizes.top_k, sizes.hidden, sizes.inner, torch.bfloat16, 0, device
    )
    residual = torch.randn(1, sizes.hidden, device=device).bfloat16()
    with poisoned_memory():
        out = moe_rows.experts_of_rows(*case.inputs, residual=residual)
    checks.error("rows", f"{sizes.name} with residual", out, case.exact() + residual.double())


def check_replays(sizes: Sizes, checks: Checks) -> None:
    """A captured graph of router and experts, replayed over other inputs and other padding."""
    for rows in (1, 8, 16, 64, 256, 1024):
        case = moe_case(
            rows, sizes.experts, sizes.top_k, sizes.hidden, sizes.inner, torch.bfloat16, 0, "cuda"
        )
        # other experts are chosen later: those that were poisoned for being unused get weights too
        gate_up, down = (
            torch.where(weight.isnan(), torch.randn_like(weight) * 0.02, weight)
            for weight in (case.gate_up, case.down)
        )
        x, logits = case.x.clone(), torch.randn(rows, sizes.experts, device="cuda").bfloat16()
        mapping = torch.zeros(rows, dtype=torch.int64, device="cuda")

        def layer(
            x: Tensor = x,
            logits: Tensor = logits,
            mapping: Tensor = mapping,
            gate_up: Tensor = gate_up,
            down: Tensor = down,
        ) -> tuple[Tensor, Tensor, Tensor]:
            ids, weights = moe.route(logits, sizes.routing, None, mapping)
            return moe.experts(x, gate_up, down, ids, weights), ids, weights

        layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, ids, weights = layer()
        for real in (rows, max(1, rows - 3), max(1, rows // 7), 1):
            x.normal_()
            logits.normal_()
            mapping.fill_(-1)
            mapping[:real] = 7
            graph.replay()
            first = out.clone()
            graph.replay()
            what = f"replay of {rows} rows, {real} of them real"
            checks.that(out.equal(first), f"{what}: not the same when replayed")
            exact = MoeCase(x, gate_up, down, ids, weights).exact()
            checks.error("replay", what, out[:real], exact[:real])
            checks.that(bool(out[real:].eq(0).all()), f"{what}: padding is not zero")


# --- timing ---


@dataclass(frozen=True)
class Rates:
    """Of this machine, measured now: bytes and operations a microsecond."""

    copied: float
    multiplied: float


def rates() -> Rates:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    copied = 2 * len(source) / graph_us(lambda i: target.copy_(source), 1)
    return Rates(copied, 2 * 8192**3 / graph_us(lambda i: F.linear(a, b), 1))


def graph_us(launch: Callable[[int], Any], sets: int) -> float:
    """Median microseconds of a launch in replays of a graph of some; without a GPU, of none."""
    if not torch.cuda.is_available():
        launch(0)
        return 1.0
    for i in range(2):
        launch(i % sets)
    torch.cuda.synchronize()
    began = time.perf_counter()
    launch(0)
    torch.cuda.synchronize()
    rough = max((time.perf_counter() - began) * 1e6, 5.0)
    count = int(min(max(GOAL_US / rough, sets), 64))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i % sets)
    times: list[float] = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[2:])


@dataclass
class Inputs:
    """Weights and activations to rotate through, so that caches are not measured. Tokens of few
    rows choose experts that the launches before did not."""

    weights: list[tuple[Tensor, Tensor]]
    x: list[Tensor]
    logits: list[Tensor]
    ids: list[Tensor]
    shares: list[Tensor]

    @property
    def sets(self) -> int:
        return len(self.x)

    def weight(self, i: int) -> tuple[Tensor, Tensor]:
        return self.weights[i % len(self.weights)]

    def arguments(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x[i], *self.weight(i), self.ids[i], self.shares[i]

    @property
    def touched(self) -> float:
        """Experts that a step reads, on average."""
        return statistics.mean(len(ids.unique()) for ids in self.ids)


def make_weights(sizes: Sizes, device: str) -> list[tuple[Tensor, Tensor]]:
    def matrices(n: int, k: int) -> Tensor:
        values = torch.empty(sizes.experts, n, k, dtype=torch.bfloat16, device=device)
        return values.normal_(std=k**-0.5)

    count = WEIGHT_SETS if sizes != TINY else 1
    return [
        (matrices(2 * sizes.inner, sizes.hidden), matrices(sizes.hidden, sizes.inner))
        for _ in range(count)
    ]


def make_inputs(
    sizes: Sizes, rows: int, weights: list[tuple[Tensor, Tensor]], device: str
) -> Inputs:
    sets = 16 if rows * sizes.top_k <= 32 and sizes == QWEN else INPUT_SETS
    x = [torch.randn(rows, sizes.hidden, device=device).bfloat16() for _ in range(sets)]
    logits = [torch.randn(rows, sizes.experts, device=device).bfloat16() for _ in range(sets)]
    if rows == 1 and sizes == QWEN:
        # No two of sixteen launches in a row have an expert in common.
        order = torch.randperm(sizes.experts, device=device).view(sets, -1)
        for i, chosen in enumerate(order):
            logits[i][0, chosen] += 20
    routed = [moe.route(part, sizes.routing) for part in logits]
    return Inputs(weights, x, logits, [ids for ids, _ in routed], [shares for _, shares in routed])


@dataclass
class Timing:
    """Microseconds at a row count. best_up and best_down: of all paths' shapes that were tried,
    those of the fastest sum of both; `shapes`: all of them."""

    sizes: Sizes
    rows: int
    layer: float
    old: float
    bound: float
    best: float
    best_shapes: str
    parts: dict[str, float]
    tried: list[str]


def measure(
    sizes: Sizes, rows: int, weights: list[tuple[Tensor, Tensor]], rate: Rates, device: str
) -> Timing:
    inputs = make_inputs(sizes, rows, weights, device)
    k, sets = sizes.top_k, inputs.sets
    parts: dict[str, float] = {}
    parts["router"] = graph_us(lambda i: moe.route(inputs.logits[i], sizes.routing), sets)

    def layer(i: int, way: Callable[..., Tensor] = moe.experts) -> Tensor:
        ids, shares = moe.route(inputs.logits[i], sizes.routing)
        return way(inputs.x[i], *inputs.weight(i), ids, shares)

    def old(i: int) -> Tensor:
        ids, shares = old_route(inputs.logits[i], k)
        return old_experts(inputs.x[i], *inputs.weight(i), ids, shares)

    now, before = graph_us(layer, sets), float("nan")
    if device == "cuda" and torch.cuda.get_device_capability()[0] in TORCH_GROUPED:
        before = graph_us(old, sets)
    sums: list[tuple[float, str]] = []
    tried: list[str] = []
    if rows <= ROW_PATH:
        sums.append(measure_rows(inputs, parts, tried))
    if rows > 4 or sizes == MIXTRAL:
        sums.append(measure_grouped(sizes, rows, inputs, parts, tried))
    total, shapes = min(sums)
    operations = rows * k * sizes.expert_bytes
    bound = max(inputs.touched * sizes.expert_bytes / rate.copied, operations / rate.multiplied)
    return Timing(
        sizes, rows, now, before, bound, parts["router"] + total, shapes, parts, sorted(tried)
    )


def try_shapes(
    stage: str, shapes: list[Any], tried: list[str], launch: Callable[[int, Any], Any], sets: int
) -> tuple[float, Any]:
    """The fastest of them; those that the GPU refuses are left out."""
    found: list[tuple[float, int]] = []
    if not torch.cuda.is_available():
        shapes = shapes[:: max(1, len(shapes) - 1)]
    for number, shape in enumerate(shapes):
        try:
            us = graph_us(lambda i, shape=shape: launch(i, shape), sets)
        except Exception as problem:
            tried.append(f"{stage} {short(shape)}: {str(problem)[:80]}")
            continue
        found.append((us, number))
        tried.append(f"{stage} {us:8.1f} us {short(shape)}")
    us, number = min(found)
    return us, shapes[number]


def short(shape: Any) -> str:
    values = [int(value) if isinstance(value, bool) else value for value in vars(shape).values()]
    return f"{'pair' if isinstance(shape, PairConfig) else 'group'}{tuple(values)}"


def measure_rows(inputs: Inputs, parts: dict[str, float], tried: list[str]) -> tuple[float, str]:
    """Of the path of single rows: the sum of the fastest launches and their shapes."""
    x, ids, sets = inputs.x, inputs.ids, inputs.sets
    inner = [moe_rows.pair_up(x[i], inputs.weight(i)[0], ids[i]) for i in range(sets)]

    def up(i: int, shape: PairConfig) -> Tensor:
        return moe_rows.pair_up(x[i], inputs.weight(i)[0], ids[i], config=shape)

    def down(i: int, shape: PairConfig) -> Tensor:
        weight = inputs.weight(i)[1]
        return moe_rows.token_down(inner[i], weight, ids[i], inputs.shares[i], config=shape)

    up_us, best_up = try_shapes("rows up", UP_PAIRS, tried, up, sets)
    down_us, best_down = try_shapes("rows down", DOWN_PAIRS, tried, down, sets)
    parts["rows up"], parts["rows down"] = up_us, down_us
    return up_us + down_us, f"up {short(best_up)} down {short(best_down)}"


def measure_grouped(
    sizes: Sizes, rows: int, inputs: Inputs, parts: dict[str, float], tried: list[str]
) -> tuple[float, str]:
    """Of the grouped path, over the sizes of tiles: lists, both products, and the sum."""
    k, ids, sets = sizes.top_k, inputs.ids, inputs.sets
    sums: list[tuple[float, str, dict[str, float]]] = []
    for block_m in tried_blocks(rows * k / sizes.experts):
        shapes = [config for config in (*SWAPPED, *PLAIN) if config.block_m == block_m]
        listed = [moe_router.align(ids[i], sizes.experts, block_m) for i in range(sets)]
        default = shapes[0]
        inner = [
            moe_grouped.grouped_up(inputs.x[i], inputs.weight(i)[0], listed[i], k, default)
            for i in range(sets)
        ]
        wide = [
            moe_grouped.grouped_down(inner[i], inputs.weight(i)[1], listed[i], default)
            for i in range(sets)
        ]

        def aligned(i: int, block_m: int = block_m) -> Any:
            return moe_router.align(ids[i], sizes.experts, block_m)

        def up(i: int, shape: GroupedConfig, listed: list[Any] = listed) -> Tensor:
            x, weight = inputs.x[i], inputs.weight(i)[0]
            return moe_grouped.grouped_up(x, weight, listed[i], k, shape, exact=True)

        def down(
            i: int, shape: GroupedConfig, listed: list[Any] = listed, inner: list[Tensor] = inner
        ) -> Tensor:
            weight = inputs.weight(i)[1]
            return moe_grouped.grouped_down(inner[i], weight, listed[i], shape, exact=True)

        def summed(i: int, listed: list[Any] = listed, wide: list[Tensor] = wide) -> Tensor:
            return moe_grouped.combine(wide[i], listed[i], ids[i], inputs.shares[i])

        up_us, best_up = try_shapes("grouped up", shapes, tried, up, sets)
        down_us, best_down = try_shapes("grouped down", shapes, tried, down, sets)
        each = {
            "align": graph_us(aligned, sets),
            "up": up_us,
            "down": down_us,
            "combine": graph_us(summed, sets),
        }
        sums.append((sum(each.values()), f"up {short(best_up)} down {short(best_down)}", each))
    total, shapes_, each = min(sums, key=lambda entry: entry[0])
    parts |= each
    return total, shapes_


# --- one row, from the sum behind attention to the layer's result ---


ROW_TRIES: Final = 30
"""Random rows of each type."""
ROW_WARPS: Final = (1, 2, 4, 8)
ROW_SETS: Final = 16
EPS: Final = 1e-6


@dataclass
class RowInputs:
    """Of one row: x and residual [1, H], the norm's weight [H], the router's [E, H], a slot [1]."""

    x: Tensor
    residual: Tensor
    norm: Tensor
    router: Tensor
    slot: Tensor


def row_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> RowInputs:
    x, residual = (torch.randn(1, sizes.hidden, device=device).to(dtype) for _ in range(2))
    router = torch.randn(sizes.experts, sizes.hidden, device=device) * sizes.hidden**-0.5
    weight = torch.rand(sizes.hidden, device=device) + 0.5
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    return RowInputs(x, residual, weight.to(dtype), router.to(dtype), slot)


def row_now(sizes: Sizes, inputs: RowInputs, warps: int | None = None) -> Routed:
    """Norm, product and choice in one kernel."""
    i = inputs
    return moe_row_router.norm_route(i.x, i.norm, EPS, i.router, sizes.routing, None, i.slot, warps)


def row_before(sizes: Sizes, inputs: RowInputs, algorithms: GemmAlgorithms) -> Routed:
    """By three kernels; adds x to the residual."""
    i = inputs
    normed, _ = norm.add_rms_norm(i.x, i.residual, i.norm, EPS)
    logits = gemm.linear(normed, i.router, None, algorithms)
    return Routed(normed, *moe.route(logits, sizes.routing, None, i.slot))


def check_row(sizes: Sizes, device: str, checks: Checks) -> None:
    """One kernel against float64 and against three, which rarely choose otherwise."""
    algorithms = GemmAlgorithms()
    for dtype in TYPES:
        same: list[float] = []
        for _ in range(ROW_TRIES if device == "cuda" else 2):
            inputs = row_inputs(sizes, dtype, device)
            with poisoned_memory():
                out = row_now(sizes, inputs)
                again = row_now(sizes, inputs)
            what = f"{sizes.name} one row's router"
            normed = reference.rms_norm(inputs.x.double(), inputs.norm.double(), EPS)
            checks.error("row", f"{what}, norm", out.normed, normed)
            checks.that(choice_is_right(sizes, inputs, out), f"{what}, {dtype}: wrong experts")
            equal = all(a.equal(b) for a, b in zip(out, again, strict=True))
            checks.that(equal, f"{what}, {dtype}: not the same when repeated")
            inputs.residual.zero_()
            before = row_before(sizes, inputs, algorithms)
            same.append(before.top_k_ids.eq(out.top_k_ids).double().mean().item())
        share = statistics.mean(same)
        checks.that(share > 0.97, f"{sizes.name} {dtype}: {share:.3f} of ids as by three kernels")
    arrived = counters(torch.empty(0, device=device).device, "router of one row", 1)
    checks.that(arrived[0].item() == 0, f"{sizes.name}: the router's counter is not at zero")


def choice_is_right(sizes: Sizes, inputs: RowInputs, out: Routed) -> bool:
    """Whether the experts are the best by logits in float64, within the logits' rounding, and their
    weights what follows from those logits."""
    logits = (out.normed.double() @ inputs.router.double().T)[0]
    ids = out.top_k_ids[0].long()
    if not bool(((ids >= 0) & (ids < sizes.experts)).all()) or len(ids.unique()) < len(ids):
        return False
    rounding = 2 * max(torch.finfo(inputs.x.dtype).eps, 1e-6) * logits.abs().max()
    least = logits.topk(sizes.top_k).values[-1]
    weights = torch.softmax(logits[ids], -1)
    close = (out.top_k_weights[0].double() - weights).abs().max() <= 2 * rounding
    return bool((logits[ids] >= least - rounding).all()) and bool(close)


def check_row_replays(sizes: Sizes, checks: Checks) -> None:
    """A captured graph of the kernels of one row, replayed over other rows."""
    inputs = row_inputs(sizes, torch.bfloat16, "cuda")
    weights = make_weights(sizes, "cuda")[0]

    def layer() -> Tensor:
        routed = row_now(sizes, inputs)
        return moe_rows.experts_of_rows(
            routed.normed, *weights, routed.top_k_ids, routed.top_k_weights, residual=inputs.x
        )

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for number in range(ROW_TRIES):
        inputs.x.normal_()
        graph.replay()
        checks.that(out.equal(layer()), f"{sizes.name} one row: replay {number} differs")


def time_row(sizes: Sizes, device: str) -> str:
    """A line of the table: microseconds of three kernels and of one, by warps, and of all from the
    sum behind attention to the layer's result."""
    algorithms = GemmAlgorithms()
    weights = make_weights(sizes, device)
    sets = [row_inputs(sizes, torch.bfloat16, device) for _ in range(ROW_SETS)]
    for inputs in sets:
        # additions in place would grow without end
        inputs.residual.zero_()
        inputs.x.mul_(1e-3)

    def before(i: int) -> Tensor:
        routed = row_before(sizes, sets[i], algorithms)
        gate_up, down = weights[i % len(weights)]
        return moe.experts(routed.normed, gate_up, down, *routed[1:])

    def now(i: int) -> Tensor:
        routed = row_now(sizes, sets[i])
        gate_up, down = weights[i % len(weights)]
        choice = (routed.top_k_ids, routed.top_k_weights)
        return moe_rows.experts_of_rows(routed.normed, gate_up, down, *choice, residual=sets[i].x)

    three = graph_us(lambda i: row_before(sizes, sets[i], algorithms), ROW_SETS)
    one = graph_us(lambda i: row_now(sizes, sets[i]), ROW_SETS)
    tried = [
        graph_us(lambda i, warps=warps: row_now(sizes, sets[i], warps), ROW_SETS)
        for warps in ROW_WARPS
    ]
    by_warps = " ".join(f"{us:.1f}" for us in tried)
    halves = graph_us(before, ROW_SETS), graph_us(now, ROW_SETS)
    return f"{sizes.name:14} {three:8.1f} {one:8.1f} {halves[0]:9.1f} {halves[1]:9.1f}  {by_warps}"


def row_table(lines: list[str]) -> str:
    warps = ", ".join(map(str, ROW_WARPS))
    return "\n".join(
        [
            "one row, us: norm, product and choice by three kernels and by one; with the experts, "
            "five and three; one by warps",
            f"{'model':14} {'three':>8} {'one':>8} {'five':>9} {'three':>9}  one with {warps} warps",
            *lines,
        ]
    )


def tables(timings: list[Timing], rate: Rates, name: str) -> str:
    lines = [
        f"{name}: copy {rate.copied / 1e6:.2f} TB/s, bf16 product {rate.multiplied / 1e6:.0f} TFLOP/s; us of a layer from logits to sums",
        f"{'model':14} {'rows':>5} {'layer':>8} {'best':>8} {'bound':>8} {'bound/layer':>11} {'old':>8} {'layer/old':>9} {'best/old':>8}  "
        "parts; best shapes",
    ]
    for t in timings:
        parts = " ".join(f"{part} {us:.1f}" for part, us in t.parts.items())
        lines.append(
            f"{t.sizes.name:14} {t.rows:5} {t.layer:8.1f} {t.best:8.1f} {t.bound:8.1f} {t.bound / t.layer:11.2f} {t.old:8.1f} "
            f"{t.layer / t.old:9.2f} {t.best / t.old:8.2f}  {parts}; {t.best_shapes}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default="check,time,row")
    parser.add_argument("--rows", default="", help="row counts, like 1,32 (default: all)")
    parser.add_argument("--models", default="Qwen3-30B-A3B,Mixtral-8x7B")
    parser.add_argument("--processes", type=int, default=12, help="that compile at once")
    options = parser.parse_args()
    began = time.monotonic()
    parts, cpu = options.parts.split(","), options.device == "cpu"
    wanted = {int(rows) for rows in options.rows.split(",") if rows}
    names = options.models.split(",")
    models = [TINY] if cpu else [sizes for sizes in (QWEN, MIXTRAL) if sizes.name in names]
    seed = int(time.time())
    torch.manual_seed(seed)
    if not cpu:
        compile_all(parts, options.processes)
    checks, timings, rate = Checks(), list[Timing](), Rates(1.0, 1.0)
    row_lines: list[str] = []
    with torch.inference_mode():
        if "check" in parts:
            for sizes in models:
                check_router(sizes, options.device, checks)
                check_sizes(sizes, options.device, wanted, checks)
                check_residual(sizes, options.device, checks)
            if not cpu:
                check_replays(models[0], checks)
            print(f"checked after {time.monotonic() - began:.0f} s", flush=True)
        if "row" in parts:
            for sizes in models:
                check_row(sizes, options.device, checks)
                if not cpu:
                    check_row_replays(sizes, checks)
                row_lines.append(time_row(sizes, options.device))
            print(f"one row after {time.monotonic() - began:.0f} s", flush=True)
        if "time" in parts:
            rate = rates() if not cpu else rate
            for sizes in models:
                weights = make_weights(sizes, options.device)
                for rows in TIMED[sizes]:
                    if not wanted or rows in wanted:
                        timings.append(measure(sizes, rows, weights, rate, options.device))
                del weights
    for timing in timings:
        print(f"-- {timing.sizes.name}, {timing.rows} rows", *timing.tried, sep="\n")
    print(
        *(
            f"{path} {dtype}: worst error {wrong:.1e}"
            for (path, dtype), wrong in checks.worst.items()
        ),
        sep="\n",
    )
    name = "the interpreter" if cpu else torch.cuda.get_device_name()
    if timings:
        print(tables(timings, rate, name))
    if row_lines:
        print(f"{name}:", row_table(row_lines))
    print(*checks.faults, sep="\n", end="\n" if checks.faults else "")
    print(
        f"gpu_moe: {checks.count} checks, {len(checks.faults)} wrong, seed {seed}, {time.monotonic() - began:.0f} s: "
        f"{'FAILED' if checks.faults else 'ok'}"
    )
    return 1 if checks.faults else 0


if __name__ == "__main__":
    sys.exit(main())
