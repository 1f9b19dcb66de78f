"""One stream's decoder layers on a GPU: microseconds a layer, by the length of the context.

    python bench/single_layer.py [--models llama-3.1-8b,llama-3.1-8b-awq] [--contexts 300,2000]
        [--without attention,down] [--attention 32,64,2,2,32]
    python bench/single_layer.py --dry-run     each model once, in small, in Triton's interpreter

The kernels of `worker/models/single.py` in chains of layers with weights of their own, random, in
captured graphs: what a kernel costs among its neighbours, which it is overlapped with, and not
alone. `--without` leaves kernels out one at a time; what is missing then is what they cost.
`--attention` is the launch shape of decode attention: the fields of a FewConfig. Models are
configurations in bench/models. A table comes last.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
MODELS: Final = ROOT / "bench" / "models"
DEFAULT: Final = "qwen3-0.6b,llama-3.1-8b,llama-3.1-8b-awq,qwen3-30b-a3b,qwen3-30b-a3b-awq"
KERNELS: Final = ("qkv", "attention", "output", "up", "down")
PAGE: Final = 16
LAYER_BYTES: Final = 1 << 30
"""Of weights, more than caches hold: so many layers are made, within limits."""
LAYERS: Final = range(4, 29)
REPLAYS: Final = 10
ROUNDS: Final = 5
EPS: Final = 1e-6


@dataclass(frozen=True)
class Sizes:
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    normed: bool
    experts: int
    top_k: int
    bits: int

    @classmethod
    def of(cls, name: str, small: bool) -> "Sizes":
        config = json.loads((MODELS / name / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads, dim = config["num_key_value_heads"], config.get("head_dim", hidden // heads)
        experts, top_k = config.get("num_experts", 0), config.get("num_experts_per_tok", 0)
        inner = config["moe_intermediate_size" if experts else "intermediate_size"]
        if small:
            hidden, heads, kv_heads, dim, inner = 256, 4, 2, 64, 128
            experts, top_k = min(experts, 16), min(top_k, 4)
        normed = config["model_type"].startswith("qwen3")
        bits = config.get("quantization_config", {}).get("bits", 16)
        return cls(hidden, heads, kv_heads, dim, inner, normed, experts, top_k, bits)

    def weights(self) -> int:
        """Of a layer."""
        attention = self.hidden * self.dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.inner * max(1, self.experts)


class Chain:
    """Layers, and one token's way through them."""

    def __init__(self, sizes: Sizes, context: int, device: str, few: Any) -> None:
        import torch
        from pagewire_kernels.attention_decode import Rope
        from pagewire_kernels.routing import Routing

        self.sizes = s = sizes
        self._device = device
        self._few = few
        self._dtype = torch.bfloat16
        count = LAYER_BYTES * 8 // (s.weights() * s.bits)
        self.count = 1 if device == "cpu" else max(LAYERS[0], min(LAYERS[-1], count))
        blocks = context // PAGE + 1
        width = (s.heads + 2 * s.kv_heads) * s.dim
        self._layers = [self._layer(blocks, width) for _ in range(self.count)]
        self._ones = torch.ones(s.hidden, device=device, dtype=self._dtype)
        weight = torch.ones(s.dim, device=device, dtype=self._dtype) if s.normed else None
        self._rope = Rope(torch.randn(context + PAGE, s.dim, device=device), weight, weight, EPS)
        self._table = torch.randperm(blocks, device=device)[None].to(torch.int32).contiguous()
        self.lengths = torch.ones(1, device=device, dtype=torch.int32)
        self._slot = torch.zeros(1, device=device, dtype=torch.int64)
        self._routing = Routing(s.experts, s.top_k, renormalize=True) if s.experts else None
        self._qkv = self._values(1, width)
        self._inner = self._values(max(1, s.top_k), s.inner)
        self._x = self._values(1, s.hidden) * 50

    def _values(self, *shape: int) -> Any:
        import torch

        return (torch.randn(*shape, device=self._device) * 0.02).to(self._dtype)

    def _matrix(self, n: int, k: int) -> Any:
        import torch
        from pagewire_kernels.cuda_quantized import pack_matrix
        from pagewire_kernels.quantized import quantize

        if self.sizes.bits != 4:
            return self._values(n, k)
        values = torch.randn(n, k, device=self._device) * 0.02
        return pack_matrix([quantize(values, 4, 128, whole_zeros=True)])

    def _experts(self, n: int, k: int, halves: int) -> Any:
        import torch
        from pagewire_kernels.cuda_quantized import CudaQuantized
        from pagewire_kernels.kernel_choices import KernelChoices
        from pagewire_kernels.quantized import quantize

        if self.sizes.bits != 4:
            return self._values(self.sizes.experts, halves * n, k)
        ops = CudaQuantized(KernelChoices())

        def matrix() -> Any:
            values = torch.randn(n, k, device=self._device) * 0.02
            return quantize(values, 4, 128, whole_zeros=True)

        return ops.pack_experts(
            [[matrix() for _ in range(halves)] for _ in range(self.sizes.experts)]
        )

    def _layer(self, blocks: int, width: int) -> dict[str, Any]:
        s = self.sizes
        cache = (blocks, s.kv_heads, PAGE, s.dim)
        layer = {"keys": self._values(*cache), "values": self._values(*cache)}
        layer |= {"qkv": self._matrix(width, s.hidden)}
        layer |= {"output": self._matrix(s.hidden, s.heads * s.dim)}
        if s.experts:
            layer["router"] = self._values(s.experts, s.hidden)
            layer["up"] = self._experts(s.inner, s.hidden, 2)
            layer["down"] = self._experts(s.hidden, s.inner, 1)
        else:
            layer["up"] = self._matrix(2 * s.inner, s.hidden)
            layer["down"] = self._matrix(s.hidden, s.inner)
        return layer

    def run(self, without: str = "") -> Any:
        """x [1, H] after all layers."""
        x = self._x
        for layer in self._layers:
            x = self._feed_forward(layer, self._attention(layer, x, without), without)
        return x

    def _attention(self, layer: dict[str, Any], x: Any, without: str) -> Any:
        from pagewire_kernels import gemm_row
        from pagewire_kernels.attention_decode import decode_attention
        from pagewire_kernels.attention_decode_few import decode_few

        s = self.sizes
        qkv = self._qkv
        if without != "qkv":
            qkv = gemm_row.norm_linear(x, self._ones, EPS, layer["qkv"])
        caches = layer["keys"], layer["values"], self._table, self.lengths, s.dim**-0.5
        if without == "attention":
            attended = qkv[:, : s.heads * s.dim]
        elif self._few is None:
            ahead = s.normed or s.bits < 16
            attended = decode_attention(qkv, *caches, rope=self._rope, reads_ahead=ahead)
        else:
            attended = qkv.new_empty(1, s.heads * s.dim)
            decode_few(qkv, *caches, None, None, self._rope, attended, self._few)
        if without == "output":
            return x
        return gemm_row.linear_add(attended, layer["output"], None, x)

    def _feed_forward(self, layer: dict[str, Any], x: Any, without: str) -> Any:
        from pagewire_kernels import gemm_row, moe_row_int4, moe_row_router, moe_rows

        inner = self._inner
        if self._routing is None:
            if without != "up":
                inner = gemm_row.norm_gated(x, self._ones, EPS, layer["up"])
            return x if without == "down" else gemm_row.linear_add(inner, layer["down"], None, x)
        normed, ids, shares = moe_row_router.norm_route(
            x, self._ones, EPS, layer["router"], self._routing, None, self._slot
        )
        if self.sizes.bits == 4 and without not in ("up", "down"):
            return moe_row_int4.experts_of_row(normed, layer["up"], layer["down"], ids, shares, x)
        if without == "up" or self.sizes.bits == 4:
            # down reads ids before its wait, which then must not be the router's
            return x
        inner = moe_rows.pair_up(normed, layer["up"], ids)
        if without == "down":
            return x
        return moe_rows.token_down(inner, layer["down"], ids, shares, x)


def microseconds(chain: Chain, contexts: list[int], without: str) -> list[float]:
    """A layer's, the median of some rounds of replays, by context."""
    import torch

    chain.run(without)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = chain.run(without)
    found: list[float] = []
    for context in contexts:
        chain.lengths.fill_(context)
        graph.replay()
        found.append(statistics.median(_round(graph.replay) for _ in range(ROUNDS)) / chain.count)
    del kept
    return found


def _round(replay: Callable[[], None]) -> float:
    """Microseconds of a replay."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(REPLAYS):
        replay()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) * 1e3 / REPLAYS


def main() -> int:
    parser = argparse.ArgumentParser(description="One stream's layers: microseconds a layer.")
    parser.add_argument("--models", default=DEFAULT)
    parser.add_argument("--contexts", default="300,1000,2000,8000,32000")
    parser.add_argument("--without", default="", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--attention", help="first_n,block_n,warps,stages,splits")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    left_out = [name for name in options.without.split(",") if name]
    unknown = set(left_out) - set(KERNELS)
    if unknown:
        parser.error(f"--without: {', '.join(sorted(unknown))} is none of {', '.join(KERNELS)}")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(ROOT / "tests"))
        import ops.conftest  # noqa: F401  # mends the interpreter
    import torch
    from pagewire_kernels.decode_shapes import FewConfig

    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU here; --dry-run runs without one")
        return 2
    few = FewConfig(*map(int, options.attention.split(","))) if options.attention else None
    contexts = [40] if options.dry_run else [int(one) for one in options.contexts.split(",")]
    table: list[str] = []
    for name in options.models.split(","):
        sizes = Sizes.of(name, options.dry_run)
        chain = Chain(sizes, max(contexts), "cpu" if options.dry_run else "cuda", few)
        for without in ["", *left_out]:
            title = f"{name} without {without}" if without else name
            if options.dry_run:
                chain.lengths.fill_(contexts[0])
                norm = float(chain.run(without).float().norm())
                table.append(f"{title}: ok, |x| {norm:.4f}")
            else:
                times = microseconds(chain, contexts, without)
                table.append(f"{title:40s}" + "".join(f"{time:9.2f}" for time in times))
        del chain
    if not options.dry_run:
        print(f"{torch.cuda.get_device_name()}: us a layer of one row, by context")
        print(" " * 40 + "".join(f"{context:9,}" for context in contexts))
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
