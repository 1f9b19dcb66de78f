"""Matrix multiplications (GEMM), the operations between them, and a whole decoder layer."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pagewire_kernels import (
    activation,
    attention_decode,
    cuda,
    gemm,
    gemm_row,
    norm,
    rope,
    workspace,
)
from pagewire_kernels.batch import Batch
from pagewire_kernels.gemm import SkinnyConfig
from torch import Tensor
from torch.nn import functional

from ...worker.gpu.gemm_autotune import fastest
from . import inputs
from .case import Case, Job
from .inputs import HKV, PAGE, error, int32, nan, pool, rand, tables, weights

ONE_ROW = (
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
SOME_ROWS = (
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


class Gemm(Case):
    def __init__(self, n: int, k: int, rows: int) -> None:
        self._weights = weights(n, k)
        self._x = rand(rows, k)
        self.sets = len(self._weights)

    def launch(self, i: int, config: Any = None) -> Tensor:
        weight = self._weights[i]
        return (
            gemm.skinny_linear(self._x, weight, None, config)
            if config
            else gemm.linear(self._x, weight, None, cuda.OPS.choices.gemm)
        )

    def check(self, config: Any = None) -> float:
        self.launch(0, config).fill_(float("nan"))
        return error(self.launch(0, config), self._x.float() @ self._weights[0].float().T)

    def other(self, i: int) -> Tensor:
        return functional.linear(self._x, self._weights[i])


def gemm_job(label: str, n: int, k: int, rows: int) -> Job:
    shapes = [SkinnyConfig(*shape) for shape in (ONE_ROW if rows == 1 else SOME_ROWS)]
    return Job(
        "gemm",
        f"{label} {n}x{k} M{rows}",
        lambda: Gemm(n, k, rows),
        n * k * 2.0,
        configs=shapes,
        peer="cuBLAS",
    )


class TunedGemm(Gemm):
    """Many rows, with the algorithm that a worker would choose at its start."""

    def __init__(self, n: int, k: int, rows: int) -> None:
        super().__init__(n, k, rows)
        shape = (n, k, inputs.DTYPE)
        cuda.OPS.choices.gemm.choose(shape, {rows: fastest(rows, shape, self._weights)})


def tuned_gemm_job(label: str, n: int, k: int, rows: int) -> Job:
    return Job(
        "product",
        f"{label} {n}x{k} M{rows}",
        lambda: TunedGemm(n, k, rows),
        2.0 * n * k * rows,
        unit="TFLOP/s",
        peer="cuBLAS",
    )


class AddNorm(Case):
    def __init__(self, rows: int, width: int) -> None:
        self._x = rand(rows, width)
        self._residual = rand(rows, width)
        self._weight = rand(width)

    def launch(self, i: int, config: Any = None) -> Any:
        return norm.add_rms_norm(self._x, self._residual, self._weight, 1e-5)

    def check(self, config: Any = None) -> float:
        total = (self._x + self._residual).float()
        ref = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * self._weight.float()
        return error(norm.add_rms_norm(self._x, self._residual.clone(), self._weight, 1e-5)[0], ref)


class SiluMul(Case):
    def __init__(self, rows: int, width: int) -> None:
        self._x = rand(rows, 2 * width)

    def launch(self, i: int, config: Any = None) -> Tensor:
        return activation.silu_mul(self._x)

    def check(self, config: Any = None) -> float:
        gate, up = self._x.float().chunk(2, -1)
        return error(self.launch(0), functional.silu(gate) * up)


class RopeAndCache(Case):
    """Norm of queries and keys, rotation, and the write of keys and values to their pages: 32 query
    heads, 8 KV heads, size 128."""

    def __init__(self, rows: int) -> None:
        self._qkv = rand(rows, 48 * 128)
        self._cos_sin = torch.randn(4096, 128, device=inputs.DEVICE)
        self._weight = rand(128)
        self._k = nan(rows + 1, HKV, PAGE, 128)
        self._v = rand(rows + 1, HKV, PAGE, 128)
        places = torch.randperm(rows * PAGE, device=inputs.DEVICE)[:rows]
        starts = int32([0, rows])
        lens = int32([rows])
        self._batch = Batch(
            torch.arange(rows, device=inputs.DEVICE),
            places,
            starts,
            lens,
            int32([0])[None],
            rows,
            rows,
        )

    def launch(self, i: int, config: Any = None) -> Tensor:
        w = self._weight
        return rope.rope_and_cache(
            self._qkv, self._cos_sin, w, w, 1e-6, self._k, self._v, self._batch
        )

    def check(self, config: Any = None) -> float:
        q = self.launch(0)
        places = self._batch.slot_mapping
        x = self._qkv.view(-1, 48, 128).float()
        y = (
            x[:, :40]
            * torch.rsqrt(x[:, :40].pow(2).mean(-1, keepdim=True) + 1e-6)
            * self._weight.float()
        )
        cos, sin = self._cos_sin[self._batch.positions][:, None].split(64, -1)
        y = torch.cat(
            (y[..., :64] * cos - y[..., 64:] * sin, y[..., 64:] * cos + y[..., :64] * sin), -1
        )
        at = (places // PAGE, slice(None), places % PAGE)
        return max(
            error(q, y[:, :32]), error(self._k[at], y[:, 32:]), error(self._v[at], x[:, 40:])
        )


def fused(rows: int) -> Iterator[Job]:
    yield Job("add+rmsnorm", f"{rows}x4096", lambda: AddNorm(rows, 4096), rows * 4096 * 8.0)
    yield Job("silu*mul", f"{rows}x28672", lambda: SiluMul(rows, 14336), rows * 14336 * 6.0)
    yield Job(
        "qknorm+rope+kv",
        f"{rows} tokens 48 heads",
        lambda: RopeAndCache(rows),
        rows * 48 * 128 * 4.0,
    )


OVERLAPPING: tuple[Any, ...] = (activation, attention_decode, gemm, gemm_row, norm, rope)


@contextlib.contextmanager
def without_overlap() -> Iterator[None]:
    """Each launch waits for the one before."""
    for module in OVERLAPPING:
        module.overlap = lambda device: {"PDL": False}
    try:
        yield
    finally:
        for module in OVERLAPPING:
            module.overlap = workspace.overlap


class Layer(Case):
    """All kernels of one decoder layer in a row; beside it the same without overlapping
    launches."""

    def __init__(self, rows: int, context: int, hidden: int, inner: int, heads: int) -> None:
        self.sets = max(2, int(inputs.WEIGHT_BYTES / (2 * hidden * (2 * heads * 128 + 3 * inner))))
        shapes = (
            ((heads + 2 * HKV) * 128, hidden),
            (hidden, heads * 128),
            (2 * inner, hidden),
            (hidden, inner),
        )
        self._weights = [[rand(*shape) * 0.02 for shape in shapes] for _ in range(self.sets)]
        table = tables(rows, context)[0]
        lens = int32([context] * rows)
        slots = table[:, -1].long() * PAGE + PAGE - 1
        starts = int32(list(range(rows + 1)))
        self._batch = Batch(lens.long() - 1, slots, starts, lens, table, 1, context)
        self._x = rand(rows, hidden)
        self._residual = rand(rows, hidden)
        self._norm = rand(hidden)
        self._cos_sin = torch.randn(context, 128, device=inputs.DEVICE)

    def launch(self, i: int, config: Any = None) -> Tensor:
        qkv_w, o_w, gate_up_w, down_w = self._weights[i]
        (k, v), batch, weight = pool(128), self._batch, self._norm
        linear: Callable[[Tensor, Tensor], Tensor] = cuda.linear
        normed, kept = norm.add_rms_norm(self._x, self._residual, weight, 1e-5)
        q = cuda.rope_and_cache(linear(normed, qkv_w), self._cos_sin, None, None, 1e-5, k, v, batch)
        mixed = linear(cuda.paged_attention(q, k, v, batch, 128**-0.5, None), o_w)
        normed, kept = norm.add_rms_norm(mixed, kept, weight, 1e-5)
        return linear(activation.silu_mul(linear(normed, gate_up_w)), down_w)

    def check(self, config: Any = None) -> float:
        kept = self._residual.clone()
        one = self.launch(0)
        self._residual.copy_(kept)
        two = self.other(0)
        self._residual.copy_(kept)
        return error(one, two)

    def other(self, i: int) -> Tensor:
        with without_overlap():
            return self.launch(i)


class RowLayer(Layer):
    """The five kernels that a layer of one row takes; beside them the nine of any other number of
    rows."""

    def launch(self, i: int, config: Any = None) -> Tensor:
        qkv_w, o_w, gate_up_w, down_w = self._weights[i]
        (k, v), weight = pool(128), self._norm
        qkv = gemm_row.norm_linear(self._x, weight, 1e-5, qkv_w)
        mixed = cuda.rope_attention(
            qkv, self._cos_sin, None, None, 1e-5, k, v, self._batch, 128**-0.5, None
        )
        whole = gemm_row.linear_add(mixed, o_w, None, self._x)
        return gemm_row.linear_add(
            gemm_row.norm_gated(whole, weight, 1e-5, gate_up_w), down_w, None, whole
        )

    def check(self, config: Any = None) -> float:
        """What the nine give is still to be added to the residual, which begins as zero."""
        self._residual.zero_()
        return error(self.launch(0), self.other(0).float() + self._residual.float())

    def other(self, i: int) -> Tensor:
        return super().launch(i)


def layer(rows: int, context: int, hidden: int, inner: int, heads: int, label: str) -> Job:
    read = 2.0 * hidden * ((2 * heads + 2 * HKV) * 128 + 3 * inner) + rows * context * HKV * 512.0
    make = lambda: Layer(rows, context, hidden, inner, heads)  # noqa: E731
    return Job("layer", f"{label} {rows}x{context}", make, read, peer="without overlap")


def row_layer(context: int, hidden: int, inner: int, heads: int, label: str) -> Job:
    read = 2.0 * hidden * ((2 * heads + 2 * HKV) * 128 + 3 * inner) + context * HKV * 512.0
    make = lambda: RowLayer(1, context, hidden, inner, heads)  # noqa: E731
    return Job("layer", f"{label} 1x{context} in five", make, read, peer="in nine")
