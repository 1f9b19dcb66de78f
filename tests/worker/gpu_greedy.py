"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_greedy.py [--model FILE.gguf or directory] [--device cuda|cpu]

The demo model, or another, in bf16, served by the whole stack: 64 prompts, then many behind a
common prefix, each twice (the second time over cached prefixes), in several set-ups that are to
change nothing. Tokens and log-probabilities are held against transformers in float32, and may be
off by what its own bf16 is (gpu_oracle.py); texts that equal those of the float32 CPU worker are
counted. One line for each set-up, one for the verdict; the exit status is 0 when all is well. With
`--device cpu`, fewer and shorter prompts: does the check itself work?
"""

import argparse
import functools
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from e2e.greedy_prompts import Tokens, greedy_prompts, long_text
from pagewire import LLM, SamplingParams
from pagewire.hub.huggingface import demo_gguf
from pagewire.offline.local_tokenizer import as_transformers
from worker.gpu_oracle import TOP, Oracle, Said, begin, conclude, in_turn, judge


@dataclass(frozen=True)
class Scale:
    """Every `each`-th prompt, cut to `longest`; `rows` prompts behind `common` tokens; `few` KV
    blocks are too few for all of them."""

    each: int
    longest: int
    steps: int
    common: int
    rows: int
    few: int


SCALES = {"cuda": Scale(1, 2000, 64, 640, 96, 180), "cpu": Scale(7, 200, 16, 320, 6, 17)}
BLOCKS = {"cuda": 8192, "cpu": 512}


def setups(scale: Scale) -> dict[str, tuple[dict[str, Any], bool, bool]]:
    """Settings, and whether they are given the prompts and those behind a common prefix."""
    return {
        "graphs": ({}, True, True),
        "eager": ({"enforce_eager": True}, True, True),
        "no prefix cache": ({"enable_prefix_caching": False}, True, True),
        "no cascade": ({"enable_cascade": False}, False, True),
        "chunks of 64": ({"max_num_batched_tokens": 64, "max_num_seqs": 64}, True, False),
        f"{scale.few} KV blocks": (
            {"num_kv_blocks": scale.few, "max_model_len": scale.longest + 2 * scale.steps},
            True,
            False,
        ),
    }


class Asked:
    def __init__(self, path: Path, scale: Scale) -> None:
        make, tokenizer = random.Random(3), as_transformers(path)
        long, every = long_text(tokenizer), greedy_prompts(tokenizer)
        self.prompts = [ids[: scale.longest] for ids in [*every[: -2 : scale.each], *every[-2:]]]
        tails = [
            every[i % 62][: 20 + make.randrange(20)]
            + [make.randrange(100, len(tokenizer)) for _ in range(3)]
            for i in range(scale.rows)
        ]
        self.behind = [long[: scale.common] + tail for tail in tails]
        self.common = long[: scale.common]


@dataclass
class Run:
    """Outputs of the first and the second time, by kind of prompt; the second time without
    log-probabilities."""

    prompts: list[list[Any]] = field(default_factory=list[list[Any]])
    behind: list[list[Any]] = field(default_factory=list[list[Any]])
    preemptions: int = 0


def generate(llm: LLM, prompts: list[Tokens], steps: int, logprobs: int | None = None) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=logprobs)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def run(path: Path, scale: Scale, device: str, asked: Asked, name: str) -> Run:
    settings, prompts, behind = setups(scale)[name]
    found = Run()
    base: dict[str, Any] = {
        "device": device,
        "dtype": "bfloat16",
        "max_num_seqs": 128,
        "max_model_len": 4096,
        "num_kv_blocks": BLOCKS[device],
    }
    with LLM(str(path), **{**base, **settings}) as llm:
        if prompts:
            found.prompts = [
                generate(llm, asked.prompts, scale.steps, logprobs) for logprobs in (TOP, None)
            ]
        if behind:
            generate(llm, [asked.common], scale.steps)
            found.behind = [
                generate(llm, asked.behind, scale.steps, logprobs) for logprobs in (TOP, None)
            ]
        found.preemptions = int(llm.stats()["num_preemptions"])
    return found


def exact_texts(path: Path, scale: Scale, asked: Asked) -> list[str]:
    """The float32 CPU worker's."""
    with LLM(str(path), device="cpu", dtype="float32", max_num_seqs=64, max_model_len=4096) as llm:
        return texts(generate(llm, asked.prompts, scale.steps))


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def equal(a: list[Any], b: list[Any]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)}"


def report(name: str, found: Run, first: Run, exact: list[str], line: str) -> list[str]:
    """Prints the set-up's line; what is wrong beside the tokens."""
    if found.prompts:
        once, again = found.prompts
        line += f"; texts of prompts: {equal(texts(once), texts(first.prompts[0]))} as in the first set-up"
        line += f", {equal(texts(again), texts(once))} the same again, {equal(texts(once), exact)} as in float32"
    if found.behind:
        once, again = found.behind
        line += f"; of those behind a prefix: {equal(texts(once), texts(first.behind[0]))}, {equal(texts(again), texts(once))}"
    if "KV blocks" in name:
        line += f"; {found.preemptions} preemptions"
    print(f"{name}: {line}", flush=True)
    return (
        [f"{name}: nothing was preempted"] if "KV blocks" in name and not found.preemptions else []
    )


def check(path: Path, device: str) -> list[str]:
    scale = SCALES[device]
    asked = Asked(path, scale)
    one = functools.partial(run, path, scale, device, asked)
    with ThreadPoolExecutor(1) as beside:
        exact = beside.submit(exact_texts, path, scale, asked)
        runs = in_turn(one, list(setups(scale)), 3 if device == "cuda" else 1)
        wanted = exact.result()
    said = [
        Said.output(name, part, output)
        for name, found in runs.items()
        for part, times in {"prompts": found.prompts, "behind a prefix": found.behind}.items()
        for outputs in times
        for output in outputs
    ]
    faults: list[str] = []
    for name, (line, wrong) in judge(Oracle(path, device), said).items():
        faults += wrong + report(name, runs[name], runs["graphs"], wanted, line)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Greedy tokens in bf16 against float32, in several set-ups."
    )
    parser.add_argument("--model", type=Path, help="GGUF file or directory (default: the demo)")
    parser.add_argument("--device", choices=tuple(SCALES), default="cuda")
    options = parser.parse_args()
    if not begin("gpu_greedy", options.device):
        return 2
    return conclude("gpu_greedy", lambda: check(options.model or demo_gguf(), options.device))


if __name__ == "__main__":
    sys.exit(main())
