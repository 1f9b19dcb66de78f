"""What a GGUF file's weights lose on this machine's CPU: log-probabilities of a text, against the
same weights in full and in float32.

    python bench/accuracy.py --model FILE.gguf --text FILE [--tokens 512]

Beside it what the same weights lose when they are rounded to bfloat16, as they would be without
machine code for quantized ones. Each way of computing gets the text in steps of up to 512 tokens (a
prompt), and of 16 (the machine code for few tokens).
"""

import argparse
from pathlib import Path

import torch
from pagewire.bench.stats import table
from pagewire.tokenizer.load import load as load_tokenizer
from pagewire.worker.load import cpu_crossings, loader, quantizing, weights
from pagewire.worker.load.gguf_file import Gguf
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import make_batch
from torch import Tensor

BLOCK = 16
WAYS = {
    # name: (type, whether weights stay quantized)
    "quantized, bfloat16": (torch.bfloat16, True),
    "quantized, float32": (torch.float32, True),
    "dense, bfloat16": (torch.bfloat16, False),
}
STEPS = (512, 16)


class Model:
    def __init__(self, file: Gguf, dtype: torch.dtype, quantized: bool) -> None:
        config = file.config()
        self.arch = describe(config)
        self.dtype = dtype
        chosen = quantizing.NONE
        if quantized:
            checkpoint = quantizing.Checkpoint(file)
            chosen = quantizing.choose(checkpoint, self.arch, "", quantizing.Target(dtype))
            if not chosen.kept:
                raise RuntimeError("there is no machine code for quantized weights here")
        ops = backend("cpu")
        method = loader.method_choice(ops, dtype, "cpu", chosen)
        self.decoder = Decoder(self.arch, Build(ops, dtype, "cpu", method))
        weights.load(self.decoder, file, config, 0, lambda stage, done: None, chosen.kept)
        if chosen.kept:
            cpu_crossings.choose(self.decoder.packed(), dtype)

    def log_probabilities(self, ids: list[int], step: int) -> Tensor:
        """[T, V] float32."""
        arch = self.arch
        blocks = -(-len(ids) // BLOCK)
        caches = [
            torch.zeros(2, blocks, arch.num_kv_heads, BLOCK, arch.head_dim, dtype=self.dtype)
            for _ in range(arch.num_layers)
        ]
        factors = [rotary.table(arch.rope, arch.head_dim, len(ids))] * arch.num_layers
        parts = []
        for first in range(0, len(ids), step):
            some = ids[first : first + step]
            batch = make_batch([len(some)], [first + len(some)], [list(range(blocks))], BLOCK)
            parts.append(
                self.decoder(torch.tensor(some), factors, caches, batch, None, lambda: None)
                .float()
                .log_softmax(-1)
            )
        return torch.cat(parts)


def compare(found: Tensor, exact: Tensor, ids: list[int]) -> list[str]:
    """How far off log-probabilities are, of the whole vocabulary and of the text's next token; how
    often the most likely is another."""
    off = (found - exact).abs()
    following = torch.tensor(ids[1:])[:, None]
    said = off[:-1].gather(1, following)
    divergence = (exact.exp() * (exact - found)).sum(-1).mean()
    other = (found.argmax(-1) != exact.argmax(-1)).sum()
    numbers = (
        *(f"{value:.5f}" for value in (off.mean(), off.max(), said.mean(), said.max())),
        f"{divergence:.2e}",
    )
    return [*numbers, f"{other} of {len(ids)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    ids = (
        load_tokenizer(options.model)
        .tokenizer.encode(options.text.read_text())
        .ids[: options.tokens]
    )
    file = Gguf(options.model)
    with torch.inference_mode():
        exact = Model(file, torch.float32, False).log_probabilities(ids, STEPS[0])
        rows = []
        for name, (dtype, quantized) in WAYS.items():
            model = Model(file, dtype, quantized)
            rows += [
                [
                    f"{name}, steps of {step}",
                    *compare(model.log_probabilities(ids, step), exact, ids),
                ]
                for step in STEPS
            ]
    mean = exact[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()
    title = f"{len(ids)} tokens of {options.text.name}, of which the next has {mean:.3f}"
    print(
        table(
            title,
            ["", "all: mean", "all: max", "next: mean", "next: max", "KL", "other first"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
