"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_greedy.py [--model FILE.gguf or directory] [--device cuda|cpu]
        [--quantization int4|int8|fp8|bitsandbytes_8bit] [--kv-cache-dtype fp8]

The demo model, or another, in bf16, served by the whole stack: 64 prompts, then many behind a
common prefix, each twice (the second time over cached prefixes), in several set-ups that are to
change nothing. Tokens and log-probabilities are held against transformers in float32, and may be
off by what its own bf16 is (gpu_oracle.py); texts that equal those of the float32 CPU worker are
counted. One line for each set-up, one for the verdict; the exit status is 0 when all is well. With
`--quantization` the stack rounds the model's weights, dequantized before if they must be, while it
loads them, and transformers has the rounded values in full; with `--kv-cache-dtype fp8` it rounds
keys and values. With `--device cpu`, fewer and shorter prompts: does the check itself work?
"""

import argparse
import functools
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from e2e.greedy_prompts import Tokens, greedy_prompts, long_text
from pagewire import LLM, SamplingParams
from pagewire.hub.huggingface import demo_gguf
from pagewire.offline.local_tokenizer import as_transformers
from pagewire.worker.models.rounding import ROUNDINGS
from worker.gpu_oracle import TOP, Oracle, Said, begin, conclude, in_turn, judge
from worker.rounded_model import round_matrices


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


@dataclass(frozen=True)
class Model:
    """What is served on `device`, and by which settings; what the oracle reads, which the CPU's
    worker serves in float32; and how it rounds."""

    device: str
    served: Path
    oracle: Path
    quantization: str = ""
    kv_cache_dtype: str = "auto"

    def settings(self) -> dict[str, Any]:
        """Of LLM."""
        return {
            "device": self.device,
            "quantization": self.quantization or None,
            "kv_cache_dtype": self.kv_cache_dtype,
        }

    def read(self) -> Oracle:
        """Its oracle."""
        float8_cache = self.kv_cache_dtype == "fp8"
        return Oracle(self.oracle, self.device, self.quantization == "fp8", float8_cache)


def rounded(path: Path, folder: Path, quantization: str, device: str) -> tuple[Path, Path]:
    """The model at `path` in bf16, and what `quantization` makes of that, both in `folder`."""
    from transformers import AutoModelForCausalLM

    place: Any = {"gguf_file": path.name} if path.is_file() else {}
    source = path.parent if path.is_file() else path
    read: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **place)
    # What transformers has read from a GGUF file counts as quantized, and is not to be saved.
    read.config.__dict__.pop("quantization_config", None)
    model: Any = type(read)(read.config).bfloat16()
    model.load_state_dict(read.state_dict())
    paths = folder / "served", folder / "oracle"
    model.save_pretrained(paths[0])
    round_matrices(model.float(), ROUNDINGS[quantization], device)
    model.save_pretrained(paths[1])
    for one in paths:
        as_transformers(path).save_pretrained(one)
    return paths


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


def run(model: Model, scale: Scale, asked: Asked, name: str) -> Run:
    settings, prompts, behind = setups(scale)[name]
    found = Run()
    base: dict[str, Any] = {
        **model.settings(),
        "dtype": "bfloat16",
        "max_num_seqs": 128,
        "max_model_len": 4096,
        "num_kv_blocks": BLOCKS[model.device],
    }
    with LLM(str(model.served), **{**base, **settings}) as llm:
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


def exact_texts(model: Model, scale: Scale, asked: Asked) -> list[str]:
    """The float32 CPU worker's."""
    settings: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 64, "max_model_len": 4096}
    kv_cache_dtype = model.kv_cache_dtype
    with LLM(str(model.oracle), device="cpu", kv_cache_dtype=kv_cache_dtype, **settings) as llm:
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


def check(model: Model) -> list[str]:
    scale = SCALES[model.device]
    asked = Asked(model.oracle, scale)
    one = functools.partial(run, model, scale, asked)
    with ThreadPoolExecutor(1) as beside:
        exact = beside.submit(exact_texts, model, scale, asked)
        runs = in_turn(one, list(setups(scale)), 3 if model.device == "cuda" else 1)
        wanted = exact.result()
    said = [
        Said.output(name, part, output)
        for name, found in runs.items()
        for part, times in {"prompts": found.prompts, "behind a prefix": found.behind}.items()
        for outputs in times
        for output in outputs
    ]
    faults: list[str] = []
    for name, (line, wrong) in judge(model.read(), said).items():
        faults += wrong + report(name, runs[name], runs["graphs"], wanted, line)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Greedy tokens in bf16 against float32, in several set-ups."
    )
    parser.add_argument("--model", type=Path, help="GGUF file or directory (default: the demo)")
    parser.add_argument("--device", choices=tuple(SCALES), default="cuda")
    parser.add_argument("--quantization", default="", choices=("", *ROUNDINGS))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    options = parser.parse_args()
    if not begin("gpu_greedy", options.device):
        return 2
    path, quantization = options.model or demo_gguf(), options.quantization
    with tempfile.TemporaryDirectory() as folder:
        served = oracle = path
        if quantization:
            served, oracle = rounded(path, Path(folder), quantization, options.device)
        model = Model(options.device, served, oracle, quantization, options.kv_cache_dtype)
        return conclude("gpu_greedy", lambda: check(model))


if __name__ == "__main__":
    sys.exit(main())
