"""The demo on this machine's CPU: one request, many at once, prefill, time to ready; beside transformers when asked.

    python bench/cpu.py [--peer] [--rounds 3] [--json FILE] [flags of pagewire serve]

Machines are noisy: the rows of one run are made in turns, and the median of the rounds is shown.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from typing import Any

from pagewire.bench.figures import summarize, table, write_json
from pagewire.bench.load import Target, send_all
from pagewire.bench.servers import ready_seconds, started

ROWS = {
    # name: (requests at once, tokens in, tokens out)
    "1 request 64/128": (1, 64, 128),
    "16 at once 128/64": (16, 128, 64),
    "8 at once 512/8": (8, 512, 8),
}
PEER_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def prompts(make: random.Random, count: int, length: int) -> list[list[int]]:
    return [[make.randrange(100, 16_000) for _ in range(length)] for _ in range(count)]


def ours(target: Target, make: random.Random, count: int, read: int, write: int) -> float:
    """Output tokens a second over the whole row, prefill included."""
    bodies = [{"prompt": ids, "max_tokens": write, "temperature": 0, "ignore_eos": True} for ids in prompts(make, count, read)]
    samples = asyncio.run(send_all(target, bodies, count))
    failed = [sample.error for sample in samples if sample.error]
    if failed:
        raise RuntimeError(failed[0])
    return summarize(samples)["out tok/s"]


class Peer:
    """transformers' `generate` in bfloat16 over the same files."""

    def __init__(self, path: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        named = {"gguf_file": path.rpartition("/")[2]} if path.endswith(".gguf") else {}
        folder = path.rpartition("/")[0] if named else path
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **named).eval()

    def row(self, make: random.Random, count: int, read: int, write: int) -> float:
        ids = self._torch.tensor(prompts(make, count, read))
        began = time.monotonic()
        self._model.generate(ids, attention_mask=self._torch.ones_like(ids), do_sample=False, min_new_tokens=write, max_new_tokens=write)
        return count * write / (time.monotonic() - began)


def peer_path(model: str) -> str:
    from pagewire import hub
    from pagewire.config import ModelConfig

    return str(hub.resolve(ModelConfig(model=model or PEER_MODEL)))


def measure(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {"ready s": statistics.median(ready_seconds(flags) for _ in range(options.rounds))}
    peer = Peer(peer_path(options.peer_model)) if options.peer else None
    make, rates = random.Random(0), dict[str, list[float]]()
    with started(flags) as url:
        target = Target.of(url)
        ours(target, make, 2, 16, 8)
        for _ in range(options.rounds):
            for name, row in ROWS.items():
                rates.setdefault(f"{name}, tok/s", []).append(ours(target, make, *row))
                if peer is not None:
                    rates.setdefault(f"{name}, transformers tok/s", []).append(peer.row(make, *row))
    return figures | {name: statistics.median(values) for name, values in rates.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also run transformers' generate")
    parser.add_argument("--peer-model", default="", help="what transformers loads (default: the demo)")
    parser.add_argument("--json", default="")
    options, flags = parser.parse_known_args()
    figures = measure(options, flags)
    print(table("the demo on this CPU", ("figure", "median"), list(figures.items())))
    if options.json:
        write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
