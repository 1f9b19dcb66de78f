"""Throughput of the whole stack on a GPU, token ids in and out: the offline workloads that peers are measured with.

    python bench/gpu.py --model bench/models/qwen3-0.6b --workloads single,mixed,wide,long,shared --json out.json

Weights are random, N(0, 0.02), so only the configuration is needed. Every run draws new prompts from its own seed: the prefix cache helps
where the workload says so and nowhere else. Prints the median of the runs and each of them.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from pagewire import LLM, SamplingParams

VOCAB = 30_000
Work = tuple[list[list[int]], list[int]]


def ids(make: random.Random, count: int) -> list[int]:
    return [make.randrange(100, VOCAB) for _ in range(count)]


def mixed(make: random.Random) -> Work:
    sizes = [(make.randint(100, 1024), make.randint(100, 1024)) for _ in range(256)]
    return [ids(make, length) for length, _ in sizes], [out for _, out in sizes]


def single(make: random.Random) -> Work:
    return [ids(make, 128)], [512]


def wide(make: random.Random) -> Work:
    return [ids(make, 128) for _ in range(1024)], [128] * 1024


def long(make: random.Random) -> Work:
    return [ids(make, 8192) for _ in range(32)], [64] * 32


def shared(make: random.Random) -> Work:
    prefix = ids(make, 2048)
    return [prefix + ids(make, 64) for _ in range(256)], [64] * 256


WORKLOADS: dict[str, Callable[[random.Random], Work]] = {"single": single, "mixed": mixed, "wide": wide, "long": long, "shared": shared}


def measure(llm: LLM, name: str, seed: int) -> float:
    """Output tokens a second; prompt tokens a second for `long`."""
    prompts, lengths = WORKLOADS[name](random.Random(f"{name} {seed}"))
    params = [SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    produced = [len(output.outputs[0].token_ids) for output in outputs]
    if produced != lengths:
        raise SystemExit(f"{name}: asked for {sum(lengths)} tokens, got {sum(produced)}")
    return (sum(map(len, prompts)) if name == "long" else sum(produced)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=16_384)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    names = options.workloads.split(",")
    figures: dict[str, object] = {"model": Path(options.model).name}
    began = time.perf_counter()
    with LLM(
        options.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        device=options.device,
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enforce_eager=options.enforce_eager,
        log_level="info",
    ) as llm:
        figures["ready_s"] = round(time.perf_counter() - began, 1)
        print(f"ready after {figures['ready_s']} s", flush=True)
        measure(llm, "single", -1)
        for name in names:
            runs = [measure(llm, name, seed) for seed in range(options.runs)]
            figures[name] = {"median": statistics.median(runs), "runs": runs}
            print(f"{figures['model']:14} {name:8} {statistics.median(runs):>10,.0f} tok/s   runs {[round(r) for r in runs]}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
