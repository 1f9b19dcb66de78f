"""Attention over caches of 8-bit codes on one GPU: right, then how fast beside 16-bit caches.

    PYTHONPATH=protocol:kernels:services python tests/worker/gpu_kv_fp8.py
    TRITON_INTERPRET=1 ... tests/worker/gpu_kv_fp8.py --device cpu      # tiny sizes, no times

Within 100 s on an H100. First every kernel against float64 over what the codes stand for; then
decode attention of Llama-3.1-8B's heads in several launch shapes, beside the 16-bit cache's usual
one in the same run, and prompts. The table comes last; at 256x1024 the aim is 0.60 or less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

if "cpu" in sys.argv:
    import ops.conftest  # noqa: F401 - Triton's interpreter as the tests have it
import torch
from ops.triton_cases import error, grouped, paged
from pagewire_kernels import reference
from pagewire_kernels.attention_decode import Rope, decode_attention
from pagewire_kernels.attention_prefill import PrefillConfig, prefill_attention
from pagewire_kernels.batch import Batch
from pagewire_kernels.cascade import cascade_attention
from pagewire_kernels.decode_shapes import DecodeConfig, choose
from pagewire_kernels.kv_cache import FP8, KVScales, dequantize, quantize, raw
from pagewire_kernels.rope import rope_and_cache
from torch import Tensor

SCALES = KVScales(0.37, 1.9)
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
HQ, HKV, DIM, PAGE = 32, 8, 128, 16
AIM = 0.60
BUDGET_S = 85.0
STARTED = time.monotonic()


def spent() -> float:
    return time.monotonic() - STARTED


# --- right ---


@dataclass
class Case:
    q: Tensor
    keys: Tensor
    values: Tensor
    batch: Batch

    def exact(self, scale: float, window: int | None = None, cap: float | None = None) -> Tensor:
        keys = dequantize(self.keys, SCALES.k).double()
        values = dequantize(self.values, SCALES.v).double()
        return reference.paged_attention(
            self.q.double(), keys, values, self.batch, scale, window, cap
        )


def make(
    counts: list[int], lengths: list[int], group: int, dim: int, dtype: torch.dtype, device: str
) -> Case:
    q, k, v, batch = paged(counts, lengths, 2, group, dim, PAGE)
    names = ("positions", "slot_mapping", "query_start", "seq_lens", "block_tables")
    moved = replace(batch, **{name: getattr(batch, name).to(device) for name in names})
    codes = [quantize(k, SCALES.k).to(device), quantize(v, SCALES.v).to(device)]
    return Case(q.to(dtype).to(device), *codes, moved)


def checks(device: str, tiny: bool) -> Iterator[tuple[str, float, float]]:
    """(what, relative error, bound)"""
    shapes = [(64, 4), (128, 4), (256, 2), (128, 8), (80, 1)]
    lengths = [1, 37, 70] if tiny else [1, 37, 700, 64, 900, 1500, 4100, 129]
    counts = [1, 19, 5] if tiny else [1, 37, 5, 64, 17, 300, 1, 129]
    for dtype in (torch.float16,) if tiny else (torch.bfloat16, torch.float16):
        for dim, group in shapes if dtype == torch.bfloat16 else shapes[:2]:
            words = f"{str(dtype)[6:]} d{dim} group {group}"
            plain = (None, None)
            for window, cap in (plain, (33, 20.0)) if dim == 64 else (plain,):
                more = "" if window is None else f" window {window} cap {cap:g}"
                one = make([1] * len(lengths), lengths, group, dim, dtype, device)
                b, scale = one.batch, dim**-0.5
                args = (one.q, one.keys, one.values, b.block_tables, b.seq_lens)
                out = torch.full_like(one.q.flatten(1), float("nan"))
                decode_attention(*args, scale, window, cap, out=out, kv_scales=SCALES)
                yield (
                    f"decode {words}{more}",
                    error(out, one.exact(scale, window, cap)),
                    BOUNDS[dtype],
                )
                many = make(counts, lengths, group, dim, dtype, device)
                b = many.batch
                args = (many.q, many.keys, many.values, b.block_tables, b.seq_lens, b.query_start)
                out = torch.full_like(many.q.flatten(1), float("nan"))
                prefill_attention(*args, scale, window, cap, out=out, kv_scales=SCALES)
                yield (
                    f"prefill {words}{more}",
                    error(out, many.exact(scale, window, cap)),
                    BOUNDS[dtype],
                )
        yield from check_common(dtype, device, tiny)
        yield from check_written(dtype, device)


def check_common(dtype: torch.dtype, device: str, tiny: bool) -> Iterator[tuple[str, float, float]]:
    rows, shared = (4, 32) if tiny else (24, 512)
    case = make([1] * rows, [shared + 1 + 7 * i for i in range(rows)], 4, 128, dtype, device)
    tables = case.batch.block_tables
    tables[1:-1, : shared // PAGE] = tables[0, : shared // PAGE]
    groups = grouped([list(range(rows - 1))], [shared], rows, 1)
    for name in ("order", "starts", "lengths", "shared"):
        setattr(groups, name, getattr(groups, name).to(device))
    args = (case.q, case.keys, case.values, tables, case.batch.seq_lens, groups)
    out = cascade_attention(*args, 128**-0.5, None, kv_scales=SCALES)
    yield f"common blocks {str(dtype)[6:]}", error(out, case.exact(128**-0.5)), BOUNDS[dtype]


def check_written(dtype: torch.dtype, device: str) -> Iterator[tuple[str, float, float]]:
    """The share of codes that differ from torch's: numbers near the middle of two may, since sums
    have another order. And the fused kernel, which reads what it wrote."""
    case = make([1, 1, 1], [20, 70, 33], 4, 128, dtype, device)
    qkv = torch.randn(3, (8 + 4) * 128).to(dtype).to(device)
    qkv[0, -1] = 6e4
    cos_sin = torch.randn(80, 128).to(device)
    apart = Case(case.q, case.keys.clone(), case.values.clone(), case.batch)
    fused = Case(case.q, case.keys.clone(), case.values.clone(), case.batch)
    known = [case.keys.cpu(), case.values.cpu()]
    on_host = {
        name: getattr(case.batch, name).cpu()
        for name in ("positions", "slot_mapping", "query_start")
    }
    reference.rope_and_cache(
        qkv.cpu().float(),
        cos_sin.cpu(),
        None,
        None,
        0.0,
        *known,
        replace(case.batch, **on_host),
        SCALES,
    )
    apart.q = rope_and_cache(
        qkv, cos_sin, None, None, 0.0, apart.keys, apart.values, case.batch, SCALES
    )
    pairs = zip((apart.keys, apart.values), known, strict=True)
    wrong = max((raw(a).cpu() != raw(b)).float().mean().item() for a, b in pairs)
    yield f"codes written {str(dtype)[6:]}", wrong, 2e-3
    # NaN is what `paged` leaves where nobody wrote; it must be what it was
    b = case.batch
    args = (qkv, fused.keys, fused.values, b.block_tables, b.seq_lens)
    rope = Rope(cos_sin, None, None, 0.0)
    out = decode_attention(*args, 128**-0.5, rope=rope, kv_scales=SCALES)
    yield f"fused decode {str(dtype)[6:]}", error(out, apart.exact(128**-0.5)), BOUNDS[dtype]
    same = torch.equal(raw(fused.keys), raw(apart.keys))
    yield f"fused writes the same {str(dtype)[6:]}", 0.0 if same else 1.0, 1e-9


# --- fast ---


def times(launches: list[Callable[[int], Any]], sets: int) -> list[float]:
    """Microseconds of each, medians over rounds in turns: a GPU's clock changes while it runs.
    Each launch is captured over `sets` inputs, so that no cache has them."""
    graphs: list[torch.cuda.CUDAGraph] = []
    for launch in launches:
        launch(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(sets):
                launch(i)
        graphs.append(graph)
    found: list[list[float]] = [[] for _ in launches]
    for _ in range(7):
        for graph, values in zip(graphs, found, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            values.append(begin.elapsed_time(end) * 1000 / sets)
    return [statistics.median(values) for values in found]


def pools(tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Keys and values of random numbers, and the same as codes."""
    full = torch.randn(2, -(-tokens // PAGE), HKV, PAGE, DIM, dtype=dtype, device=device)
    codes = torch.empty(full.shape, dtype=FP8, device=device)
    for kind in range(2):  # whole, the float32 between would take too much memory
        for part, out in zip(full[kind].split(4096), codes[kind].split(4096), strict=True):
            raw(out).copy_(raw(quantize(part, 1.0)))
    return full, codes


def shapes_for(rows: int, length: int) -> list[DecodeConfig]:
    """The chosen one first."""
    best = choose(DIM, HQ // HKV, rows * HKV, 2, 1).candidates[0].shape
    full = choose(DIM, HQ // HKV, rows * HKV, 2, 2).candidates[0].shape
    tiles = [(32, 1, 4), (32, 2, 4), (64, 2, 3), (64, 2, 4), (64, 4, 4), (128, 4, 3)]
    if rows >= 256:
        tiles += [(32, 1, 2), (64, 1, 3), (128, 2, 3), (128, 4, 4)]
    found = [replace(full, block_n=n, warps=warps, stages=stages) for n, warps, stages in tiles]
    if rows == 1:
        found += [
            replace(best, chunk=chunk, splits=splits) for chunk, splits in ((32, 32), (64, 64))
        ]
    if 8 <= rows < 256:
        found += [replace(best, splits=best.splits * 2, chunk=best.chunk // 2)]
    if rows >= 256:
        found += [replace(best, splits=splits, chunk=512) for splits in (1, 2, 4)]
    if length > 4096:
        found += [replace(best, splits=16), replace(best, splits=32)]
    return list(dict.fromkeys([best, full, *found]))


CASES = [(256, 1024), (1, 1024), (8, 1024), (64, 1024), (32, 8192)]
PARTS = max(1, min(12, (os.cpu_count() or 1) - 2))


def compile_part(part: int) -> None:
    """One of PARTS processes, which leave what the measurements launch in Triton's cache."""
    wanted = [
        (rows, length, config) for rows, length in CASES for config in shapes_for(rows, length)
    ]
    codes = torch.zeros(2, 64, HKV, PAGE, DIM, dtype=torch.uint8, device="cuda").view(FP8)
    for rows, length, config in wanted[part::PARTS]:
        q = torch.zeros(rows, HQ, DIM, dtype=torch.bfloat16, device="cuda")
        tables = torch.zeros(rows, length // PAGE, dtype=torch.int32, device="cuda")
        lens = torch.ones(rows, dtype=torch.int32, device="cuda")
        try:
            decode_attention(q, codes[0], codes[1], tables, lens, DIM**-0.5, config=config)
        except Exception as problem:  # the measurement says so again
            print(f"{config}: {str(problem)[:80]}", flush=True)
    torch.cuda.synchronize()


def measure_decode(rows: int, length: int, dtype: torch.dtype, device: str, tiny: bool) -> str:
    sets = 1 if tiny or rows * length >= 65536 else 4
    full, codes = pools(rows * length * sets, dtype, device)
    q = torch.randn(rows, HQ, DIM, dtype=dtype, device=device)
    order = torch.randperm(full.shape[1], device=device).int()
    tables = order.view(sets, rows, length // PAGE)
    lens = torch.full((rows,), length, dtype=torch.int32, device=device)

    def launcher(cache: Tensor, config: DecodeConfig | None) -> Callable[[int], Tensor]:
        return lambda i: decode_attention(
            q, cache[0], cache[1], tables[i], lens, DIM**-0.5, config=config
        )

    whole = launcher(full, None)(0)
    launches: list[Callable[[int], Any]] = [launcher(full, None)]
    kept: list[DecodeConfig | None] = []
    for config in [None, *shapes_for(rows, length)]:
        if spent() > BUDGET_S:
            break
        launch = launcher(codes, config)
        try:
            off = error(launch(0), whole)
        except Exception as problem:  # a shape that does not fit
            print(f"    {config}: {str(problem)[:80]}", flush=True)
            continue
        # codes have 3 bits after the point: attention to random keys averages what they lose
        assert off < 0.1, f"{config}: {off}"
        kept.append(config)
        launches.append(launch)
    if tiny:
        return f"{rows:4} x {length:5}: {len(kept)} shapes run"
    base, *others = times(launches, sets)
    ranked = sorted(zip(others[1:], kept[1:], strict=True), key=lambda pair: pair[0])
    for microseconds, config in ranked[:5]:
        print(f"    {microseconds:8.1f} us  {microseconds / base:.2f}  {config}", flush=True)
    read = rows * length * HKV * DIM * 2
    return (
        f"{rows:4} x {length:5}: 16 bit {base:8.1f} us ({2 * read / base / 1e6:.2f} TB/s), fp8 as chosen "
        f"{others[0]:8.1f} us ({read / others[0] / 1e6:.2f} TB/s) = {others[0] / base:.2f}, "
        f"best {ranked[0][0]:8.1f} us = {ranked[0][0] / base:.2f} with {ranked[0][1]}"
    )


def measure_prefill(count: int, length: int, dtype: torch.dtype, device: str) -> str:
    """One prompt of `count` new tokens, the last of `length`."""
    full, codes = pools(length, dtype, device)
    q = torch.randn(count, HQ, DIM, dtype=dtype, device=device)
    tables = torch.randperm(full.shape[1], device=device).int()[None]
    lens, starts = torch.tensor([length]), torch.tensor([0, count])
    lens, starts = lens.int().to(device), starts.int().to(device)

    def launcher(
        cache: Tensor, config: PrefillConfig | None = None, hopper: bool = False
    ) -> Callable[[int], Tensor]:
        return lambda i: prefill_attention(
            q, cache[0], cache[1], tables, lens, starts, DIM**-0.5, config=config, hopper=hopper
        )

    shapes = [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3)]
    launches = [launcher(full, hopper=True), launcher(full), launcher(codes)]
    launches += [launcher(codes, PrefillConfig(*shape)) for shape in shapes]
    hopper, general, chosen, *others = times(launches, 1)
    best = min(range(len(shapes)), key=lambda i: others[i])
    return (
        f"prompt {count} of {length}: 16 bit {hopper:.0f} us (general kernel {general:.0f}), fp8 {chosen:.0f} us = "
        f"{chosen / hopper:.2f}; best {others[best]:.0f} us with {shapes[best]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--compile", type=int, default=-1, help="for the processes that it starts")
    options = parser.parse_args()
    device = options.device
    tiny = device == "cpu"
    if options.compile >= 0:
        compile_part(options.compile)
        return 0
    helpers = [
        subprocess.Popen([sys.executable, __file__, "--compile", str(part)])
        for part in range(0 if tiny else PARTS)
    ]
    torch.manual_seed(0)
    wrong = 0
    for what, off, bound in checks(device, tiny):
        good = off <= bound  # NaN is not
        wrong += not good
        print(f"{'ok   ' if good else 'WRONG'} {what}: {off:.2e} of {bound:.0e}", flush=True)
    print(f"checks took {spent():.0f} s", flush=True)
    for helper in helpers:
        helper.wait()
    print(f"all is compiled after {spent():.0f} s", flush=True)
    dtype = torch.float16 if tiny else torch.bfloat16
    lines: list[str] = []
    for rows, length in [(2, 64)] if tiny else CASES:
        if spent() > BUDGET_S:
            lines.append(f"{rows:4} x {length:5}: no time left")
            continue
        print(f"{rows} x {length}:", flush=True)
        lines.append(measure_decode(rows, length, dtype, device, tiny))
    if not tiny:
        for count, length in ((4096, 4096), (512, 8192)):
            if spent() < BUDGET_S:
                lines.append(measure_prefill(count, length, dtype, device))
    name = torch.cuda.get_device_name() if device == "cuda" else "the interpreter"
    print(f"--- {name}, {spent():.0f} s; aim at 256 x 1024: {AIM:.2f}")
    print("\n".join(lines))
    print(f"{wrong} checks failed" if wrong else "all checks passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
