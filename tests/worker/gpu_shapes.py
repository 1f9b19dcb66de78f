"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_shapes.py [--device cuda|cpu] [--parts kernels,model,timing]

The launch shapes that cards with less shared memory get, forced on this one
(pagewire_kernels.shapes.pretend), and its own. Kernels: each one at head sizes 64, 128 and 256 in
bfloat16, float16 and float32, against float64. Model: a worker with Gemma 2's attention from start
to tokens, in bfloat16 and float32, against transformers in float32. Timing: on Hopper the shapes
must be the measured ones, and kernels that choose them as fast as with these given. A table and the
verdict come last; the exit status is 0 when all is well. With `--device cpu`, small inputs in
Triton's interpreter, the CPU's worker and no timing: does the check itself work?
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import ops.conftest  # noqa: F401  # mends the interpreter

import torch
from ops import hopper_shapes, shape_cases
from ops.shape_cases import BOUNDS, BY_HEAD_SIZE, KERNELS, PAGE, Place
from ops.triton_cases import error
from pagewire.worker.device.gpus import survey
from pagewire.worker.load.kv_sizing import Sizing
from pagewire.worker.load.memory_errors import GpuFailed, explained
from pagewire_kernels import shapes
from pagewire_kernels.attention_decode import decode_attention
from pagewire_kernels.decode_shapes import DecodeConfig
from pagewire_kernels.shapes import KIB_99, KIB_163, KIB_227, Candidate, Choice
from worker import gemma_start
from worker.gpu_oracle import begin, conclude

LIMITS = (KIB_99, KIB_163)
DIMS = (64, 128, 256)
ROUNDS = 15
LEAST_RATIO, TARGET_RATIO = 0.97, 0.99
"""Of the time with the measured shapes given, to that with the chosen ones: below the first is a
fault, below the second is marked."""
AT_ONCE = 14


@dataclass
class Row:
    """A line of the table."""

    part: str
    what: str
    figures: str
    faults: list[str]


# --- kernels and models, several at a time, since they wait for compilers ---


def kernels(device: str, dtype: torch.dtype, dim: int) -> list[Row]:
    """Every kernel at a head size, in each of the shapes that cards choose for it."""
    torch.manual_seed(dim)
    scale = shape_cases.LARGE if device == "cuda" else shape_cases.SMALL
    place = Place(
        torch.device(device, 0) if device == "cuda" else torch.device("cpu"), dtype, dim, scale
    )
    found: list[Row] = []
    for name in BY_HEAD_SIZE if dim > DIMS[0] else KERNELS:
        found.append(_one_kernel(name, place))
    return found


def _one_kernel(name: str, place: Place) -> Row:
    seen: dict[Any, float] = {}
    faults: list[str] = []
    for limit in (0, *LIMITS):
        with _card(limit):
            shape, wrong = KERNELS[name](place)
        seen[shape] = max(seen.get(shape, 0.0), wrong)
        if not wrong <= BOUNDS[place.dtype]:
            faults.append(
                f"{name}, head size {place.dim}, {place.dtype}, {limit:,} bytes, {shape}: error {wrong:.2g}"
            )
    figures = "; ".join(f"{_fields(shape)} {wrong:.1e}" for shape, wrong in seen.items())
    return Row("kernels", f"{name} {place.dim} {str(place.dtype)[6:]}", figures, faults)


def _card(limit: int) -> contextlib.AbstractContextManager[None]:
    """This card (0) or a smaller one."""
    return shapes.pretend(limit) if limit else contextlib.nullcontext()


def _fields(shape: Any) -> str:
    return (
        ",".join(str(value) for value in vars(shape).values())
        if hasattr(shape, "__dict__")
        else str(shape)
    )


def model(path: Path, device: str, dtype: str, limit: int) -> list[Row]:
    """A worker of this card (limit 0) or of a smaller one."""
    begin("gpu_shapes", device)
    began = time.monotonic()
    with _card(limit):
        runner = gemma_start.started(path, device, dtype)
        took = time.monotonic() - began
        told = gemma_start.run(runner, gemma_start.prompts(device), gemma_start.SIZES[device][2])
    figures, faults = gemma_start.judge(path, told, dtype, device)
    what = f"Gemma 2, {dtype}, {f'{limit:,} bytes' if limit else 'this card'}"
    return [
        Row(
            "model",
            what,
            f"started in {took:.0f} s; {figures}",
            [f"{what}: {fault}" for fault in faults],
        )
    ]


def net(device: str) -> list[Row]:
    """A shape that no card has room for gives way to the next one; one without a next is told in a
    line."""
    place = Place(torch.device(device, 0), torch.bfloat16, 256, shape_cases.LARGE)
    lengths = list(place.scale.lengths)
    q, k, v, batch = place.paged([1] * len(lengths), lengths)
    out, huge, small = (
        shape_cases.poisoned(q),
        DecodeConfig(128, 4, 4, 128, 32),
        DecodeConfig(32, 2, 2, 128, 32),
    )

    def launch(config: DecodeConfig) -> None:
        decode_attention(q, k, v, batch.block_tables, batch.seq_lens, 0.1, out=out, config=config)

    choice = Choice("decode attention", (Candidate(huge), Candidate(small)))
    choice.launch(place.device, launch)
    wrong = error(out, shape_cases.exact(q, k, v, batch, 0.1, None, None))
    faults = (
        []
        if choice.first(place.device) == small and wrong <= BOUNDS[place.dtype]
        else [f"the net: error {wrong:.2g}"]
    )
    line = "nothing was raised"
    try:
        with explained("capturing graphs", Sizing(1, 1, 1, PAGE, PAGE, gpu=survey(0))):
            Choice("decode attention", (Candidate(huge),)).launch(place.device, launch)
    except GpuFailed as told:
        line = str(told)
    faults += [] if line.startswith("decode attention does not fit GPU 0") else [f"the net: {line}"]
    return [
        Row(
            "kernels",
            "a shape that is too large",
            f"gave way, error {wrong:.1e}; without another: {line}",
            faults,
        )
    ]


def side_by_side(tasks: list[tuple[Callable[..., list[Row]], tuple[Any, ...]]]) -> list[Row]:
    """The rows of all; a task that breaks down is a row, too."""
    with ProcessPoolExecutor(
        min(AT_ONCE, len(tasks), os.cpu_count() or 1), get_context("spawn")
    ) as pool:
        running = [(pool.submit(work, *given), work.__name__, given) for work, given in tasks]
        return [row for future, name, given in running for row in _rows(future, name, given)]


def _rows(future: "Future[list[Row]]", name: str, given: tuple[Any, ...]) -> list[Row]:
    try:
        found = future.result()
    except Exception as error:
        fault = f"{name} {given[1:]} broke off: {type(error).__name__}: {str(error)[:500]}"
        found = [Row(name, str(given[1:]), "broke off", [fault])]
    print(*(f"{row.what}: {row.figures}" for row in found), sep="\n", flush=True)
    return found


# --- timing, alone on the GPU ---


def timing() -> list[Row]:
    place = torch.device("cuda", 0)
    if torch.cuda.get_device_capability() != (9, 0):
        return [Row("timing", "not a Hopper GPU", f"{shapes.limit(place):,} bytes a block", [])]
    wrong = [
        f"{what}: {chosen} instead of {measured}"
        for what, chosen, measured in hopper_shapes.choices(place)
        if chosen != measured
    ]
    if shapes.limit(place) != KIB_227:
        wrong.append(
            f"a block may have {shapes.limit(place):,} bytes of shared memory, not {KIB_227:,}"
        )
    found = [Row("timing", "chosen shapes", "the measured ones" if not wrong else "others", wrong)]
    return found + [_compared(name, make) for name, make in _cases().items()]


def _cases() -> dict[str, Callable[[], tuple[Callable[[int], Any], Callable[[int], Any], int]]]:
    """By name: (launch as chosen, launch with the measured shape given, how many inputs)."""
    from pagewire.bench.ops.attention import Decode, Prefill
    from pagewire.bench.ops.gemm import Gemm

    def attention(case: Any, config: Any) -> tuple[Callable[[int], Any], Callable[[int], Any], int]:
        case.hopper = False  # this checks the shapes of the general kernel
        return case.launch, lambda i: case.launch(i, config), case.sets

    def decode(rows: int) -> Any:
        return attention(Decode(rows, 1024, 32, 128, None), _decode_shape(rows * 8))

    def skinny(rows: int, n: int, k: int) -> Any:
        return attention(Gemm(n, k, rows), hopper_shapes.SKINNY[rows, n, k])

    return {
        "prefill 4x512 of 2048, 128": lambda: attention(
            Prefill(4, 512, 2048, 32, 128), hopper_shapes.PREFILL[128]
        ),
        "prefill 1x4096, 64": lambda: attention(
            Prefill(1, 4096, 4096, 32, 64), hopper_shapes.PREFILL[64]
        ),
        "prefill 1x2048, 256": lambda: attention(
            Prefill(1, 2048, 2048, 32, 256), hopper_shapes.PREFILL[256]
        ),
        "decode 1x1024": lambda: decode(1),
        "decode 8x1024": lambda: decode(8),
        "decode 64x1024": lambda: decode(64),
        "decode 256x1024": lambda: decode(256),
        "common blocks 64x(1024+512)": _common,
        "product 1 x 6144 x 4096": lambda: skinny(1, 6144, 4096),
        "product 8 x 6144 x 4096": lambda: skinny(8, 6144, 4096),
        "product 8 x 4096 x 4096": lambda: skinny(8, 4096, 4096),
    }


def _decode_shape(programs: int) -> Any:
    from pagewire_kernels.decode_shapes import DecodeConfig

    return DecodeConfig(
        *next(fields for limit, fields in hopper_shapes.DECODE.items() if programs <= limit)
    )


def _common() -> tuple[Callable[[int], Any], Callable[[int], Any], int]:
    from pagewire.bench.ops import inputs
    from pagewire_kernels.cascade import Groups, cascade_attention

    rows, shared, own = 64, 1024, 512
    k, v = inputs.pool(128)
    sets = inputs.tables(rows, shared + own)
    for table in sets:
        table[1:, : shared // inputs.PAGE] = table[0, : shared // inputs.PAGE]
    groups = Groups(
        inputs.int32(list(range(rows))),
        inputs.int32([0, rows]),
        inputs.int32([shared]),
        inputs.int32([shared] * rows),
    )
    q, lens = inputs.rand(rows, 32, 128), inputs.int32([shared + own] * rows)

    def launch(i: int, config: Any = None) -> Any:
        return cascade_attention(q, k, v, sets[i], lens, groups, 128**-0.5, config=config)

    return launch, lambda i: launch(i, hopper_shapes.PREFIX[128]), len(sets)


def _compared(
    name: str, make: Callable[[], tuple[Callable[[int], Any], Callable[[int], Any], int]]
) -> Row:
    from pagewire.bench.ops import inputs
    from pagewire.bench.ops.case import graph_us

    chosen, given, sets = make()
    times: dict[str, list[float]] = {"chosen": [], "given": []}
    for turn in range(2 * ROUNDS):
        # Each is the first of every other pair: the clock falls while a GPU works.
        is_chosen = bool((turn + turn // 2) % 2)
        taken = graph_us(chosen if is_chosen else given, sets, 2000.0)
        times["chosen" if is_chosen else "given"].append(taken)
    launched = [_launch_us(launch, sets) for launch in (given, chosen)]
    inputs.forget()
    before, after = statistics.median(times["given"]), statistics.median(times["chosen"])
    ratio = before / after
    mark = "" if ratio >= TARGET_RATIO else f" (below {TARGET_RATIO})"
    figures = (
        f"{before:.1f} us given, {after:.1f} chosen, ratio {ratio:.3f}{mark}; "
        f"launched from Python {launched[0]:.1f}, {launched[1]:.1f}"
    )
    return Row("timing", name, figures, [f"{name}: {figures}"] if ratio < LEAST_RATIO else [])


def _launch_us(launch: Callable[[int], Any], sets: int) -> float:
    """Microseconds of the CPU, the least of some rounds."""
    rounds: list[float] = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for i in range(20):
            launch(i % sets)
        rounds.append((time.perf_counter() - began) / 20 * 1e6)
    return min(rounds)


def exact_speed() -> list[Row]:
    """What attention in float32 does: its shapes are chosen to compile, and are not to crawl."""
    from pagewire.bench.ops.case import graph_us
    from pagewire_kernels.attention_prefill import prefill_attention

    found: list[Row] = []
    for dim in DIMS:
        place = Place(torch.device("cuda", 0), torch.float32, dim, shape_cases.LARGE)
        q, k, v, batch = place.paged([1024], [1024])
        args = q, k, v, batch.block_tables, batch.seq_lens, batch.query_start, dim**-0.5
        took = graph_us(lambda i, args=args: prefill_attention(*args), 1, 2000.0)
        flops = 4 * q.shape[1] * dim * 1024 * 512
        found.append(
            Row(
                "timing",
                f"prefill 1x1024, {dim}, float32",
                f"{took:.0f} us, {flops / took / 1e6:.1f} TFLOP/s",
                [],
            )
        )
    return found


# --- all of it ---


def check(device: str, parts: list[str]) -> list[str]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        tasks: list[tuple[Callable[..., list[Row]], tuple[Any, ...]]] = []
        if "model" in parts:
            gemma_start.save(Path(folder), device)
            own = [(model, (Path(folder), device, dtype, 0)) for dtype in ("bfloat16", "float32")]
            tasks += own + (
                [
                    (model, (Path(folder), device, dtype, KIB_99))
                    for dtype in ("bfloat16", "float32")
                ]
                if device == "cuda"
                else []
            )
        if "kernels" in parts:
            types = BOUNDS if device == "cuda" else (torch.float32, torch.float16)
            tasks += [(kernels, (device, dtype, dim)) for dim in reversed(DIMS) for dtype in types]
            tasks += [(net, (device,))] if device == "cuda" else []
        rows += side_by_side(tasks) if tasks else []
    if "timing" in parts and device == "cuda":
        rows += [*timing(), *exact_speed()]
    print(
        "",
        *(
            f"{row.part:8} {'FAILED' if row.faults else 'ok':6} {row.what}: {row.figures}"
            for row in rows
        ),
        sep="\n",
        flush=True,
    )
    return [fault for row in rows for fault in row.faults]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kernels and a model in the launch shapes of smaller cards."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default="kernels,model,timing", help="separated by commas")
    options = parser.parse_args()
    if not begin("gpu_shapes", options.device):
        return 2
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}",
        flush=True,
    )
    return conclude("gpu_shapes", lambda: check(options.device, options.parts.split(",")))


if __name__ == "__main__":
    sys.exit(main())
