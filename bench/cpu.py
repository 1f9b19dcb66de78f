"""The demo on this machine's CPU: one request, many at once, prefill, time to ready; beside
transformers or llama.cpp when asked.

    python bench/cpu.py [--peer] [--llama-server PROGRAM] [--rounds 3] [--json FILE] [flags of
    pagewire serve]

llama.cpp's newest sources come with the source distribution of llama-cpp-python (`pip download
--no-deps --no-binary :all:
llama-cpp-python`, folder vendor/llama.cpp). Built with -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON
-DGGML_CPU_ALL_VARIANTS=ON it has a library
for each kind of processor; leave only libggml-cpu-haswell.so beside llama-server for what it
does with AVX2. For the same of Pagewire set
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma,
+f16c,+bmi2,+sse4.2,+popcnt and --dtype float32.

Machines are noisy: the rows of one run are made in turns, and the median of the rounds is shown.
Both servers get the same token ids.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pagewire.bench.load import Target, send_all
from pagewire.bench.servers import ready_seconds, started
from pagewire.bench.stats import summarize, table, write_json

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
    bodies = [
        {"prompt": ids, "max_tokens": write, "temperature": 0, "ignore_eos": True}
        for ids in prompts(make, count, read)
    ]
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
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, **named
        ).eval()

    def row(self, make: random.Random, count: int, read: int, write: int) -> float:
        ids = self._torch.tensor(prompts(make, count, read))
        began = time.monotonic()
        self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=write,
            max_new_tokens=write,
        )
        return count * write / (time.monotonic() - began)


class LlamaServer:
    """llama.cpp's server over HTTP, on a file of its own format; 16 slots of 1,024 tokens, as many
    threads as cores."""

    def __init__(self, program: str, file: str) -> None:
        self.url = "http://127.0.0.1:8099"
        threads = str(len(os.sched_getaffinity(0)))
        command = [
            program,
            "-m",
            file,
            "-t",
            threads,
            "-np",
            "16",
            "-c",
            "16384",
            "--host",
            "127.0.0.1",
            "--port",
            "8099",
        ]
        began = time.monotonic()
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() - began > 60:
                raise OSError(f"{program} did not start")
            time.sleep(0.02)
        self.ready_s = time.monotonic() - began

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def row(self, make: random.Random, count: int, read: int, write: int) -> float:
        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            told = list(
                pool.map(lambda ids: self._complete(ids, write), prompts(make, count, read))
            )
        return sum(told) / (time.monotonic() - began)

    def _complete(self, ids: list[int], write: int) -> int:
        body = {
            "prompt": ids,
            "n_predict": write,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"{self.url}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return int(json.load(answer)["tokens_predicted"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def peer_path(model: str) -> str:
    from pagewire.config import ModelConfig
    from pagewire.hub import huggingface

    return str(huggingface.resolve(ModelConfig(model=model or PEER_MODEL)))


def measure(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "ready s": statistics.median(ready_seconds(flags) for _ in range(options.rounds))
    }
    peers: dict[str, Any] = (
        {"transformers": Peer(peer_path(options.peer_model))} if options.peer else {}
    )
    if options.llama_server:
        peers["llama.cpp"] = LlamaServer(options.llama_server, peer_path(options.peer_model))
        figures["ready s, llama.cpp"] = peers["llama.cpp"].ready_s
    try:
        return figures | rows(options, flags, peers)
    finally:
        for peer in peers.values():
            if isinstance(peer, LlamaServer):
                peer.close()


def rows(options: argparse.Namespace, flags: list[str], peers: dict[str, Any]) -> dict[str, float]:
    """Medians, and how many times a peer's rate ours is."""
    make = random.Random(0)
    rates = dict[str, list[float]]()
    with started(flags) as url:
        target = Target.of(url)
        ours(target, make, 2, 16, 8)
        for _ in range(options.rounds):
            for name, row in ROWS.items():
                rates.setdefault(f"{name}, tok/s", []).append(ours(target, make, *row))
                for kind, peer in peers.items():
                    rates.setdefault(f"{name}, {kind} tok/s", []).append(peer.row(make, *row))
    found = {name: statistics.median(values) for name, values in rates.items()}
    for name in ROWS:
        for kind in peers:
            found[f"{name}, times {kind}"] = (
                found[f"{name}, tok/s"] / found[f"{name}, {kind} tok/s"]
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also run transformers' generate")
    parser.add_argument("--llama-server", default="", help="also run this program of llama.cpp")
    parser.add_argument(
        "--peer-model", default="", help="what transformers loads (default: the demo)"
    )
    parser.add_argument("--json", default="")
    options, flags = parser.parse_known_args()
    figures = measure(options, flags)
    print(table("the demo on this CPU", ("figure", "median"), list(figures.items())))
    if options.json:
        write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
