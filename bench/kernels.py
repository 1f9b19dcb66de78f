"""Checks every Triton kernel against a float32 oracle on the GPU, then times it: `python bench/kernels.py`.

Times are medians over replays of a CUDA graph of many launches that rotate through inputs larger than the L2 cache. `--sweep` tries launch
shapes and prints the best ones; `--only decode,gemm` picks kernels. Other processes compile first, so that compilation uses all cores.
The table comes last: microseconds, target, rate (KV or weight bytes, or causal operations), error as a relative norm.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "kernels"))

from pagewire_kernels import activation, attention_decode, attention_prefill, cascade, cuda, gemm, norm, rope, sampling, workspace
from pagewire_kernels.attention_decode import DecodeConfig
from pagewire_kernels.attention_prefill import PrefillConfig
from pagewire_kernels.gemm import SkinnyConfig

DEVICE, BF16 = "cuda", torch.bfloat16
PAGE, HKV = 16, 8


@dataclass
class Job:
    """A kernel at a shape. `make` gives launch(i, config) over input sets i, their number, and check(config) -> relative error."""

    name: str
    shape: str
    make: Callable[[], tuple[Callable[..., Any], int, Callable[..., float]]]
    work: float = 0.0
    unit: str = "TB/s"
    target: float | None = None
    configs: list[Any] = field(default_factory=list)
    peer: Callable[[int], Any] | None = None
    peer_name: str = "cuBLAS"


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out.float() - ref.float()).norm() / ref.float().norm()).item()


def graph_us(launch: Callable[[int], Any], sets: int, goal_us: float = 4000.0) -> float:
    """Median microseconds a launch, in a graph of enough launches to run about goal_us."""
    launch(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(3):
        launch(i % sets)
    torch.cuda.synchronize()
    rough = max((time.perf_counter() - start) / 3 * 1e6, 5.0)
    count = int(min(max(goal_us / rough, sets if sets <= 64 else 64, 4), 200))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i % sets)
    times = []
    for i in range(12):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(a.elapsed_time(b) * 1e3 / count)
    return statistics.median(times)


_pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def pool(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, 1.2 GB each at head size 128."""
    if dim not in _pools:
        _pools[dim] = (rand(36864, HKV, PAGE, dim), rand(36864, HKV, PAGE, dim))
    return _pools[dim]


def tables(rows: int, length: int) -> list[torch.Tensor]:
    need = rows * -(-length // PAGE)
    order = torch.randperm(36864, device=DEVICE).to(torch.int32)
    sets = max(1, min(64, 36864 // need))
    return [order[i * need : (i + 1) * need].view(rows, -1) for i in range(sets)]


def oracle(q: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, dim: int, window: int | None = None) -> torch.Tensor:
    """float32 attention of tokens q [n, Hq, D] at `positions` of one sequence -> [n, Hq * D]."""
    k, v = (c[table.long()].transpose(1, 2).flatten(0, 1).float().repeat_interleave(q.shape[1] // HKV, 1) for c in pool(dim))
    j = torch.arange(len(k), device=DEVICE)[None]
    seen = j <= positions[:, None]
    if window:
        seen &= j > positions[:, None] - window
    s = torch.einsum("nhd,shd->hns", q.float(), k) * dim**-0.5
    return torch.einsum("hns,shd->nhd", s.masked_fill(~seen, float("-inf")).softmax(-1), v).flatten(1)


def decode_job(rows: int, length: int, heads: int = 32, dim: int = 128, target: float | None = None, window: int | None = None) -> Job:
    def make() -> Any:
        k, v = pool(dim)
        sets = tables(rows, length)
        lens = torch.full((rows,), length, dtype=torch.int32, device=DEVICE)
        q = rand(rows, heads, dim)

        def launch(i: int, config: Any = None, lens: torch.Tensor = lens, out: Any = None) -> torch.Tensor:
            return attention_decode.decode_attention(q, k, v, sets[i], lens, dim**-0.5, window, config=config, out=out)

        def check(config: Any = None) -> float:
            ragged = torch.randint(1, length + 1, (rows,), device=DEVICE, dtype=torch.int32)
            ragged[0] = length
            out = launch(0, config, ragged, torch.full((rows, heads * dim), float("nan"), device=DEVICE, dtype=BF16))
            picked = sorted({0, rows - 1, rows // 2})
            ref = torch.cat([oracle(q[i : i + 1], sets[0][i], ragged[i : i + 1] - 1, dim, window) for i in picked])
            return max(error(out[picked], ref), 0.0 if out.isfinite().all() else float("nan"))

        return launch, len(sets), check

    configs = []
    many, some, few = [(512, 1), (2048, 2), (4096, 2)], [(512, 1), (512, 8), (1024, 8), (2048, 8)], [(n, 16) for n in (256, 512, 1024)]
    one = [(n, 64) for n in (64, 128, 256, 512, 1024, 2048) if n <= length // 4]
    shapes = (
        ((64, 2, 3), (32, 2, 4), (64, 4, 4))
        if dim == 128
        else ((32, 2, 4), (64, 2, 4), (64, 4, 3), (32, 4, 3), (64, 4, 4), (128, 4, 3), (32, 4, 4), (16, 2, 4), (64, 2, 3))
    )
    for shape in shapes:
        configs += [DecodeConfig(*shape, *s) for s in (many if rows >= 256 else some if rows >= 64 else few if rows >= 16 else one)]
    seen = length if window is None else min(window, length)
    return Job(
        "decode",
        f"{rows}x{length} {heads}q d{dim}" + (f" w{window}" if window else ""),
        make,
        rows * seen * HKV * dim * 4,
        "TB/s",
        target,
        configs,
    )


def prefill_job(rows: int, count: int, length: int, heads: int = 32, dim: int = 128, target: float | None = None) -> Job:
    def make() -> Any:
        k, v = pool(dim)
        sets = tables(rows, length)[:4]
        lens = torch.full((rows,), length, dtype=torch.int32, device=DEVICE)
        starts = torch.arange(0, rows * count + 1, count, dtype=torch.int32, device=DEVICE)
        q = rand(rows * count, heads, dim)

        def launch(i: int, config: Any = None, lens: torch.Tensor = lens, out: Any = None) -> torch.Tensor:
            return attention_prefill.prefill_attention(q, k, v, sets[i], lens, starts, dim**-0.5, config=config, out=out)

        def check(config: Any = None) -> float:
            lens = torch.randint(count, length + 1, (rows,), device=DEVICE, dtype=torch.int32)
            out = launch(0, config, lens, torch.full((rows * count, heads * dim), float("nan"), device=DEVICE, dtype=BF16))
            t = torch.randint(0, count, (48,), device=DEVICE)
            t[0], t[1] = 0, count - 1
            worst = max(error(out[i * count + t], oracle(q[i * count + t], sets[0][i], lens[i] - count + t, dim)) for i in {0, rows - 1})
            return max(worst, 0.0 if out.isfinite().all() else float("nan"))

        return launch, len(sets), check

    shapes = [(64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 3)]
    if dim != 128:
        shapes += [
            (64, 32, 4, 3),
            (64, 32, 4, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 3),
            (128, 64, 4, 3),
            (64, 128, 4, 3),
            (128, 128, 8, 3),
            (128, 64, 8, 2),
        ]
    flops = 4.0 * heads * dim * rows * count * (length - count / 2)
    return Job(
        "prefill", f"{rows}x{count} of {length} {heads}q d{dim}", make, flops, "TFLOP/s", target, [PrefillConfig(*s) for s in shapes]
    )


_weights: dict[tuple[int, int], list[torch.Tensor]] = {}


def gemm_job(label: str, n: int, k: int, rows: int) -> Job:
    def weights() -> list[torch.Tensor]:
        if (n, k) not in _weights:
            _weights[n, k] = [rand(n, k) * 0.02 for _ in range(max(2, int(3e8 / (n * k * 2))))]
        return _weights[n, k]

    def make() -> Any:
        w, x = weights(), rand(rows, k)

        def launch(i: int, config: Any = None) -> torch.Tensor:
            return gemm.skinny_linear(x, w[i], None, config) if config else gemm.linear(x, w[i])

        def check(config: Any = None) -> float:
            launch(0, config).fill_(float("nan"))
            return error(launch(0, config), x.float() @ w[0].float().T)

        return launch, len(w), check

    x = [None]

    def peer(i: int) -> torch.Tensor:
        if x[0] is None:
            x[0] = rand(rows, k)
        return torch.nn.functional.linear(x[0], weights()[i])

    one = (
        (4, 1024, 1, 4, 3),
        (8, 512, 1, 4, 4),
        (8, 1024, 1, 4, 3),
        (16, 512, 1, 4, 3),
        (4, 2048, 1, 4, 2),
        (2, 2048, 1, 4, 2),
        (8, 512, 2, 4, 4),
        (16, 256, 2, 4, 4),
        (4, 4096, 1, 4, 1),
        (4, 512, 1, 1, 4),
        (2, 1024, 1, 2, 3),
    )
    many = (
        (16, 256, 1, 4, 4),
        (16, 512, 1, 4, 3),
        (32, 128, 2, 4, 5),
        (32, 256, 2, 4, 4),
        (64, 128, 4, 4, 5),
        (64, 64, 4, 4, 6),
        (16, 256, 2, 4, 4),
        (64, 128, 1, 4, 5),
        (32, 256, 1, 4, 4),
        (16, 256, 2, 2, 4),
    )
    return Job(
        "gemm", f"{label} {n}x{k} M{rows}", make, n * k * 2.0, "TB/s", None, [SkinnyConfig(*c) for c in (one if rows == 1 else many)], peer
    )


def simple_job(
    name: str, shape: str, work: float, run: Callable[[], tuple[Callable[[int], Any], Callable[[], float]]], target: float | None = None
) -> Job:
    def make() -> Any:
        launch, check = run()
        return (lambda i, config=None: launch(i)), 1, (lambda config=None: check())

    return Job(name, shape, make, work, "TB/s", target)


def fused_jobs(t: int) -> Iterator[Job]:
    def add_norm() -> Any:
        x, r, w = rand(t, 4096), rand(t, 4096), rand(4096)

        def check() -> float:
            total = (x + r).float()
            ref = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float()
            return error(norm.add_rms_norm(x, r.clone(), w, 1e-5)[0], ref)

        return (lambda i: norm.add_rms_norm(x, r, w, 1e-5)), check

    def silu() -> Any:
        x = rand(t, 28672)
        return (lambda i: activation.silu_mul(x)), lambda: error(
            activation.silu_mul(x), torch.nn.functional.silu(x[:, :14336].float()) * x[:, 14336:].float()
        )

    def rope_kv() -> Any:
        qkv, cos_sin, w = rand(t, 48 * 128), torch.randn(4096, 128, device=DEVICE), rand(128)
        k, v = torch.full((t + 1, HKV, PAGE, 128), float("nan"), device=DEVICE, dtype=BF16), rand(t + 1, HKV, PAGE, 128)
        batch = types.SimpleNamespace(positions=torch.arange(t, device=DEVICE), slot_mapping=torch.randperm(t * PAGE, device=DEVICE)[:t])

        def check() -> float:
            q = rope.rope_and_cache(qkv, cos_sin, w, w, 1e-6, k, v, batch)
            x = qkv.view(t, 48, 128).float()
            y = x[:, :40] * torch.rsqrt(x[:, :40].pow(2).mean(-1, keepdim=True) + 1e-6) * w.float()
            cos, sin = cos_sin[batch.positions][:, None].split(64, -1)
            y = torch.cat((y[..., :64] * cos - y[..., 64:] * sin, y[..., 64:] * cos + y[..., :64] * sin), -1)
            at = (batch.slot_mapping // PAGE, slice(None), batch.slot_mapping % PAGE)
            return max(error(q, y[:, :32]), error(k[at], y[:, 32:]), error(v[at], x[:, 40:]))

        return (lambda i: rope.rope_and_cache(qkv, cos_sin, w, w, 1e-6, k, v, batch)), check

    yield simple_job("add+rmsnorm", f"{t}x4096", t * 4096 * 8.0, add_norm)
    yield simple_job("silu*mul", f"{t}x28672", t * 14336 * 6.0, silu)
    yield simple_job("qknorm+rope+kv", f"{t} tokens 48 heads", t * 48 * 128 * 4.0, rope_kv)


def sample_job(rows: int, kind: str, width: int = 128256) -> Job:
    def run() -> Any:
        logits = rand(rows, width) * 3
        full = lambda v, dtype=torch.float32: torch.full((rows,), v, device=DEVICE, dtype=dtype)  # noqa: E731
        heat = 0.0 if kind == "greedy" else 0.7
        k, p = (50, 0.9) if kind == "top-k+top-p" else (0, 0.9) if kind == "top-p" else (0, 1.0)
        args = sampling.SamplingRows(
            full(heat),
            full(k, torch.int32),
            full(p),
            full(0.0),
            full(3, torch.int64),
            torch.arange(rows, device=DEVICE),
            kind.startswith("top"),
        )

        def check() -> float:
            got = sampling.sample(logits, args)
            logp = torch.log_softmax(logits.float(), -1)
            worst = (got.logprobs - logp.gather(1, got.tokens[:, None])[:, 0]).abs().max().item()
            if kind == "greedy" and not torch.equal(logits.gather(1, got.tokens[:, None])[:, 0], logits.max(-1).values):
                return float("nan")
            if kind.startswith("top"):
                order = logits.float().sort(-1, descending=True).values
                if k:
                    order = order.masked_fill(order < order[:, k - 1 : k], float("-inf"))
                probs = (order / heat).softmax(-1)
                cut = ((probs.cumsum(-1) - probs) < p).sum(-1) - 1
                exact = order.gather(1, cut[:, None])
                found = sampling.thresholds(logits, args)[:, None]
                stray = (logits >= found) & (logits.float() < exact - 1e-3 * heat)
                return worst if bool((found <= exact).all()) and not bool(stray.any()) else float("nan")
            return worst

        return (lambda i: sampling.sample(logits, args)), check

    return simple_job("sample", f"{rows}x{width} {kind}", rows * width * 2.0, run)


def cascade_job(rows: int, common: int, own: int, parts: int = 1) -> Job:
    """`parts` groups of equal size over `rows` rows."""
    k, v = pool(128)
    table, size, length = tables(rows, common + own)[0].clone(), rows // parts, common + own
    for row in range(rows):
        table[row, : common // PAGE] = table[row // size * size, : common // PAGE]
    i32 = {"dtype": torch.int32, "device": DEVICE}
    lens, q = torch.full((rows,), length, **i32), rand(rows, 32, 128)
    starts = torch.arange(0, rows + 1, size, **i32)
    groups = cascade.Groups(torch.arange(rows, **i32), starts, torch.full((parts,), common, **i32), torch.full((rows,), common, **i32))

    def plain(i: int) -> torch.Tensor:
        return attention_decode.decode_attention(q, k, v, table, lens, 128**-0.5)

    def joined(i: int) -> torch.Tensor:
        return cascade.cascade_attention(q, k, v, table, lens, groups, 128**-0.5)

    job = simple_job(
        "cascade",
        f"{rows}x({common}+{own}) {parts} groups",
        (parts * common + rows * own) * HKV * 512.0,
        lambda: (joined, lambda: error(joined(0), plain(0))),
    )
    job.peer, job.peer_name = plain, "plain decode"
    return job


def layer_job(rows: int, context: int, hidden: int, inner: int, heads: int, label: str) -> Job:
    """All kernels of one decoder layer in a row; the peer is the same without overlapping launches."""

    @functools.cache
    def build() -> Any:
        sets = max(2, int(4e8 / (2 * hidden * (2 * heads * 128 + 3 * inner))))
        shapes = ((heads + 2 * HKV) * 128, hidden), (hidden, heads * 128), (2 * inner, hidden), (hidden, inner)
        weights = [[rand(*s) * 0.02 for s in shapes] for _ in range(sets)]
        table = tables(rows, context)[0]
        lens = torch.full((rows,), context, dtype=torch.int32, device=DEVICE)
        slots = table[:, -1].long() * PAGE + PAGE - 1
        batch = types.SimpleNamespace(positions=lens.long() - 1, slot_mapping=slots, seq_lens=lens, block_tables=table, max_query_len=1)
        x, residual, w, cos_sin = rand(rows, hidden), rand(rows, hidden), rand(hidden), torch.randn(context, 128, device=DEVICE)
        (k, v), linear = pool(128), cuda.linear

        def layer(i: int) -> torch.Tensor:
            qkv_w, o_w, gate_up_w, down_w = weights[i]
            normed, kept = cuda.add_rms_norm(x, residual, w, 1e-5)
            q = cuda.rope_and_cache(linear(normed, qkv_w), cos_sin, None, None, 1e-5, k, v, batch)
            mixed = linear(cuda.paged_attention(q, k, v, batch, 128**-0.5, None), o_w)
            normed, kept = cuda.add_rms_norm(mixed, kept, w, 1e-5)
            return linear(cuda.silu_mul(linear(normed, gate_up_w)), down_w)

        def serial(i: int) -> torch.Tensor:
            for module in (activation, attention_decode, gemm, norm, rope):
                module.overlap = lambda device: {"PDL": False}
            try:
                return layer(i)
            finally:
                for module in (activation, attention_decode, gemm, norm, rope):
                    module.overlap = workspace.overlap

        def check() -> float:
            kept = residual.clone()
            one = layer(0)
            residual.copy_(kept)
            two = serial(0)
            residual.copy_(kept)
            return error(one, two)

        return layer, serial, sets, check

    read = 2.0 * hidden * ((2 * heads + 2 * HKV) * 128 + 3 * inner) + rows * context * HKV * 512.0
    job = Job(
        "layer",
        f"{label} {rows}x{context}",
        lambda: ((lambda i, config=None: build()[0](i)), build()[2], lambda config=None: build()[3]()),
        read,
    )
    job.peer, job.peer_name = (lambda i: build()[1](i)), "without overlap"
    return job


def mixed_job(decodes: int, length: int, count: int, context: int) -> Job:
    """One chunk beside many decode rows: both kernels, against the prefill kernel for all."""
    k, v = pool(128)
    i32 = {"dtype": torch.int32, "device": DEVICE}
    table = torch.randint(0, 36864, (decodes + 1, max(length, context) // PAGE), **i32)
    lens = torch.tensor([length] * decodes + [context], **i32)
    starts = torch.tensor([*range(decodes + 1), decodes + count], **i32)
    q = rand(decodes + count, 32, 128)
    batch = types.SimpleNamespace(block_tables=table, seq_lens=lens, query_start=starts, max_query_len=count, max_seq_len=context)

    def split(i: int) -> torch.Tensor:
        return cuda.paged_attention(q, k, v, batch, 128**-0.5, None)

    def alone(i: int) -> torch.Tensor:
        return attention_prefill.prefill_attention(q, k, v, table, lens, starts, 128**-0.5)

    work = (decodes * length + context) * HKV * 512.0
    job = simple_job("mixed", f"{decodes}x{length} + {count} of {context}", work, lambda: (split, lambda: error(split(0), alone(0))))
    job.peer, job.peer_name = alone, "prefill kernel alone"
    return job


def jobs() -> list[Job]:
    found = [
        decode_job(256, 1024, target=290),
        decode_job(64, 1024, target=78),
        decode_job(8, 16384, target=137),
        decode_job(1, 1024, target=10),
    ]
    found += [
        decode_job(8, 1024),
        decode_job(16, 1024),
        decode_job(32, 1024),
        decode_job(1, 16384),
        decode_job(8, 32768),
        decode_job(256, 1024, 16),
        decode_job(64, 4096, window=1024),
    ]
    found += [decode_job(64, 1024, 32, dim) for dim in (64, 80, 96, 256)]
    found += [prefill_job(1, 8192, 8192, target=1200), prefill_job(4, 2048, 2048, target=370), prefill_job(4, 512, 8192, target=620)]
    found += [
        prefill_job(4, 512, 512),
        prefill_job(1, 8192, 8192, 16),
        prefill_job(4, 1000, 3000, 32, 64),
        prefill_job(2, 700, 1500, 16, 256),
    ]
    found += [cascade_job(256, 2048, 64), cascade_job(256, 2048, 64, 8), cascade_job(64, 1024, 512)]
    found += [mixed_job(64, 1024, 512, 2048), mixed_job(8, 16384, 512, 2048), mixed_job(200, 1024, 1024, 1024)]
    found += [layer_job(n, 1024, 4096, 14336, 32, "8B") for n in (1, 8, 64)] + [
        layer_job(n, 1024, 1024, 3072, 16, "0.6B") for n in (1, 8, 64)
    ]
    for rows in (1, 2, 4, 8):
        layers = [("o", 4096, 4096), ("qkv", 6144, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336), ("lm_head", 128256, 4096)]
        small = [("0.6B o", 1024, 2048), ("0.6B qkv", 4096, 1024), ("0.6B gate_up", 6144, 1024), ("0.6B down", 1024, 3072)]
        found += [gemm_job(label, n, k, rows) for label, n, k in (layers + small if rows in (1, 8) else layers[:4])]
    for t in (1, 256, 2048):
        found += fused_jobs(t)
    return found + [sample_job(rows, kind) for rows in (1, 64, 256) for kind in ("greedy", "random", "top-p", "top-k+top-p")]


def swept(job: Job) -> bool:
    """Launch shapes are searched where there is a target or a peer; other shapes take what those found."""
    return bool(job.configs) and (job.target is not None or job.name in ("gemm", "decode", "prefill"))


def warm(part: int, parts: int, work: list[tuple[Job, Any]]) -> None:
    for job, config in [w for w in work if w[0].name != "layer"][part::parts]:
        try:
            job.make()[0](0, config)
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"warm {job.name} {job.shape} {config}: {str(problem)[:200]}", flush=True)
        _pools.clear()
        _weights.clear()
        torch.cuda.empty_cache()


def measure(job: Job, sweep: bool, rows: list[dict[str, Any]]) -> str:
    """A line for people; the same figures go to `rows`."""
    launch, sets, check = job.make()
    wrong, us = check(), graph_us(launch, sets)
    rate = job.work / us / 1e6
    peer_us = graph_us(job.peer, sets) if job.peer else None
    peer = f"  {job.peer_name} {peer_us:7.1f}" if peer_us else ""
    rows.append({"name": job.name, "shape": job.shape, "us": us, "target": job.target, "rate": rate, "unit": job.unit, "error": wrong})
    rows[-1] |= {"peer": job.peer_name, "peer_us": peer_us} if peer_us else {}
    target = f"{job.target:6.0f}" if job.target else "     -"
    line = f"{job.name:15s} {job.shape:28s} {us:8.1f} us  target {target}  {rate:7.2f} {job.unit:8s} error {wrong:.1e}{peer}"
    if sweep and swept(job):
        tried = []
        for config in job.configs:
            try:
                bad = check(config)
                tried.append((graph_us(lambda i, c=config: launch(i, c), sets, 1500.0), bad, config))
            except Exception as problem:
                print(f"{job.name} {job.shape} {config}: {str(problem)[:100]}")
        tried.sort(key=lambda t: t[0])
        for us, bad, config in tried:
            print(f"  {job.name} {job.shape} {us:8.1f} us error {bad:.1e} {config}", flush=True)
        line += "".join(f"\n    {us:.1f} {tuple(vars(c).values())} {bad:.0e}" for us, bad, c in tried[:3])
    return line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    chosen = [j for j in jobs() if not args.only or j.name in args.only.split(",")]
    work = [(j, c) for j in chosen for c in [None, *(j.configs if args.sweep and swept(j) else [])]]
    if args.part:
        return warm(*map(int, args.part.split("/")), work)
    began = time.time()
    command = [sys.executable, __file__, *(["--sweep"] if args.sweep else []), *(["--only", args.only] if args.only else [])]
    running = [subprocess.Popen([*command, "--part", f"{i}/{args.processes}"]) for i in range(args.processes)]
    for process in running:
        process.wait()
    print(f"compiled in {time.time() - began:.0f} s", flush=True)
    torch.manual_seed(int(time.time()))
    lines, rows = [], []
    for job in chosen:
        try:
            lines.append(measure(job, args.sweep, rows))
        except Exception as problem:
            rows.append({"name": job.name, "shape": job.shape, "failed": str(problem)[:300]})
            lines.append(f"{job.name:15s} {job.shape:28s} FAILED {str(problem)[:300]}")
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))
        torch.cuda.empty_cache()
    print(f"measured after {time.time() - began:.0f} s on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
