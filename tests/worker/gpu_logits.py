"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_logits.py [--device cuda|cpu] [--models llama-3.1-8b,qwen3-0.6b,…]
        [--quantization int4|int8|fp8|bitsandbytes_8bit] [--kv-cache-dtype fp8]
        [--tensor-parallel-size 2] [--pipeline-parallel-size 2] [--one-gpu]

Models with real head sizes, few layers, a small vocabulary and random weights in bf16, served by
the whole stack: prompts of very different lengths in one batch, cut in chunks, with decodes beside
them; requests behind cached prefixes; many rows behind one common prefix. Their log-probabilities,
at each position of the prompts and of the output, are held against transformers in float32 with the
same weights; the errors may be as large as those of transformers' own bf16 (gpu_oracle.py). One
line for each set-up, one for the verdict; the exit status is 0 when all is well. With
`--quantization` the stack rounds the weights while it loads them, and transformers has the rounded
values in full; with fp8, whose products round the inputs of many rows too, transformers in bf16
rounds all inputs. With `--kv-cache-dtype fp8` transformers rounds keys and values. With
`--tensor-parallel-size` and `--pipeline-parallel-size`, by several ranks on as many GPUs, or, with
`--one-gpu`, on a single one; two runs must then give the same bits. With `--device cpu`, small
sizes: does the check itself work?
"""

import argparse
import functools
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from pagewire import LLM, SamplingParams
from pagewire.worker.models.rounding import ROUNDINGS
from worker.gpu_oracle import TOP, Oracle, Said, begin, conclude, in_turn, judge
from worker.rounded_model import round_matrices

MODELS = Path(__file__).parents[2] / "bench" / "models"
STEPS = 16
PROMPTS, ROWS = "prompts", "behind a common prefix"
CHANGED = {"hopper attention off": PROMPTS, "no cascade": ROWS}
"""Where a set-up without a kernel must show that the first one has it."""
QUANTIZED = ("default", "chunks of 512")
"""Set-ups that make a difference to matrices."""
RANKED = ("default", "eager", "no cascade", "chunks of 512")
"""Those that make one to ranks."""
SHARED_STEP = 2048
"""Tokens of a step of ranks on one GPU: what these add up then fits symmetric memory."""


@dataclass(frozen=True)
class Stack:
    """What all set-ups have in common."""

    device: str
    quantization: str
    kv_cache_dtype: str
    size: int
    stages: int
    one_gpu: bool

    @property
    def ranks(self) -> int:
        """Of all stages."""
        return self.size * self.stages

    @property
    def float8_cache(self) -> bool:
        """Keys and values are kept in 8 bits."""
        return self.kv_cache_dtype == "fp8"

    def settings(self) -> dict[str, Any]:
        """Of LLM."""
        step = {"max_num_batched_tokens": SHARED_STEP} if self.one_gpu else {}
        return {
            "device": self.device,
            "quantization": self.quantization or None,
            "kv_cache_dtype": self.kv_cache_dtype,
            "tensor_parallel_size": self.size,
            "pipeline_parallel_size": self.stages,
            **step,
        }


@dataclass(frozen=True)
class Scale:
    """`rows` requests behind `common` tokens; `setups` by name: settings, and whether they are
    given those requests."""

    layers: dict[str, int]
    vocab: int
    lengths: tuple[int, ...]
    common: int
    rows: int
    blocks: int
    setups: dict[str, tuple[dict[str, Any], bool]]


SCALES = {
    "cuda": Scale(
        {"llama-3.1-8b": 4, "qwen3-0.6b": 6, "qwen3-30b-a3b": 2}, 8192, (1, 17, 500, 700, 3000, 8000, 6000), 2048, 72, 6144,
        {
            "default": ({}, True),
            "hopper attention off": ({"hopper_attention": False}, False),
            "eager": ({"enforce_eager": True}, True),
            "no cascade": ({"enable_cascade": False}, True),
            "chunks of 512": ({"max_num_batched_tokens": 512}, False),
        },
    ),
    "cpu": Scale(
        {"llama-3.1-8b": 2, "qwen3-0.6b": 2, "qwen3-30b-a3b": 2}, 512, (1, 17, 50, 150, 100), 64, 5, 128,
        {"default": ({}, True), "chunks of 64": ({"max_num_batched_tokens": 64}, False)},
    ),
}  # fmt: skip


class Asked:
    """The prompts: alone, behind one and two thirds of the longest ones, behind `common`: as many
    for each of the pipeline `stages`, whose steps have a share of the rows."""

    def __init__(self, scale: Scale, stages: int) -> None:
        make = random.Random(3)

        def words(count: int) -> list[int]:
            return [make.randrange(3, scale.vocab) for _ in range(count)]

        self.alone = [words(count) for count in scale.lengths]
        longest = sorted(self.alone, key=len)[-3:]
        self.behind = [
            prompt[: len(prompt) * part // 3] + words(len(prompt) // 5)
            for prompt in longest
            for part in (1, 2)
        ]
        self.common = words(scale.common)
        self.rows = [self.common + words(1 + i % 40) for i in range(scale.rows * stages)]


def save_model(name: str, scale: Scale, path: Path, device: str, quantization: str) -> None:
    """In `path`, what is served and what the oracle reads. Weights N(0, 0.02), in bf16; norms are not
    quite 1, which would hide mistakes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cut = {
        "num_hidden_layers": scale.layers[name],
        "vocab_size": scale.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(
        **{**json.loads((MODELS / name / "config.json").read_text()), **cut}
    )
    torch.manual_seed(5)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path / "served")
    if quantization:
        round_matrices(model.float(), ROUNDINGS[quantization], device)
    model.save_pretrained(path / "oracle")


def base_settings(scale: Scale, stack: Stack, asked: Asked) -> dict[str, Any]:
    """Of LLM, in all set-ups."""
    return {
        **stack.settings(),
        "dtype": "bfloat16",
        "num_kv_blocks": scale.blocks,
        "skip_tokenizer_init": True,
        "max_num_seqs": 128 * stack.stages,
        "max_model_len": max(map(len, asked.alone + asked.behind + asked.rows)) + STEPS,
    }


def run(path: Path, scale: Scale, stack: Stack, asked: Asked, name: str) -> list[Said]:
    """What the stack says in one set-up."""
    settings, grouped = scale.setups[name]
    settings = {**base_settings(scale, stack, asked), **settings}
    with LLM(str(path / "served"), **settings) as llm:
        alone = generate(llm, asked.alone, TOP)
        behind = generate(llm, asked.behind)
        if grouped:
            generate(llm, [asked.common])
        rows = generate(llm, asked.rows) if grouped else []
    for output in behind + rows:
        if not output.num_cached_tokens:
            raise ValueError(
                f"{name}: nothing of a prompt of {len(output.prompt_token_ids)} tokens was found in the cache"
            )
    said = [Said.prompt(name, PROMPTS, output) for output in alone]
    for part, outputs in {"outputs": alone, "behind cached prefixes": behind, ROWS: rows}.items():
        said += [Said.output(name, part, output) for output in outputs]
    return said


def generate(llm: LLM, prompts: list[list[int]], prompt_logprobs: int | None = None) -> list[Any]:
    params = SamplingParams(
        temperature=0,
        max_tokens=STEPS,
        ignore_eos=True,
        logprobs=TOP,
        prompt_logprobs=prompt_logprobs,
    )
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def repeated(path: Path, scale: Scale, stack: Stack, asked: Asked, name: str) -> list[str]:
    """What two starts of several ranks say differently. Each prompt is alone, since what is beside
    it, which no two runs have alike, changes how sums are rounded."""
    told: list[list[Any]] = []
    for _ in range(2):
        settings = {
            **base_settings(scale, stack, asked),
            "enable_prefix_caching": False,
        }
        with LLM(str(path / "served"), **settings) as llm:
            told.append([generate(llm, [prompt], TOP)[0] for prompt in asked.alone])
    return [
        f"{name}: two runs differ for a prompt of {len(first.prompt_token_ids)} tokens"
        for first, second in zip(*told, strict=True)
        if exactly(first) != exactly(second)
    ]


def exactly(output: Any) -> object:
    """All tokens and log-probabilities of a request, to the last bit."""
    return (
        output.outputs[0].token_ids,
        [
            {token: one.logprob for token, one in place.items()}
            for place in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        ],
    )


def setups_of(scale: Scale, stack: Stack) -> list[str]:
    """Those that make a difference on this GPU."""
    if stack.device == "cuda" and (stack.quantization or stack.float8_cache or stack.ranks > 1):
        return list(QUANTIZED if stack.quantization else RANKED)
    if stack.device == "cuda":
        from pagewire_kernels.attention_prefill import hopper_has

        if hopper_has(torch.cuda.get_device_capability(), torch.bfloat16, 128, 4, 16):
            return list(scale.setups)
        print(
            "no attention kernel for Hopper on this GPU, or for this release of Triton", flush=True
        )
    return [
        name for name, (settings, _) in scale.setups.items() if "hopper_attention" not in settings
    ]


def same(said: dict[str, list[Said]]) -> list[str]:
    """What was meant to differ in a set-up and does not: kernels that were left out must have been
    used in the first one."""
    faults: list[str] = []
    for name, part in CHANGED.items():
        if name in said:
            ours, others = (
                [one.scores for one in several if one.part == part]
                for several in (said[name], next(iter(said.values())))
            )
            faults += (
                [f"{name}: {part} are told the very same as in the first set-up"]
                if ours == others
                else []
            )
    return faults


def check(name: str, scale: Scale, stack: Stack) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_model(name, scale, path, stack.device, stack.quantization)
        asked = Asked(scale, stack.stages)
        one = functools.partial(run, path, scale, stack, asked)
        at_once = 4 if stack.device == "cuda" and stack.ranks == 1 else 1
        said = in_turn(one, setups_of(scale, stack), at_once)
        verdicts = judge(
            Oracle(path / "oracle", stack.device, stack.quantization == "fp8", stack.float8_cache),
            [told for several in said.values() for told in several],
        )
        unlike = repeated(path, scale, stack, asked, name) if stack.ranks > 1 else []
    if stack.ranks > 1 and not unlike:
        print(f"{name}: two runs give the same bits", flush=True)
    for setup, (line, _) in verdicts.items():
        print(f"{name}, {setup}: {line}", flush=True)
    faults = [*same(said), *(fault for _, faults in verdicts.values() for fault in faults)]
    return [*(f"{name}, {fault}" for fault in faults), *unlike]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Log-probabilities in bf16 against float32, real head sizes."
    )
    parser.add_argument("--device", choices=tuple(SCALES), default="cuda")
    parser.add_argument(
        "--models",
        default="llama-3.1-8b,qwen3-0.6b",
        help="of bench/models, separated by commas",
    )
    parser.add_argument("--quantization", default="", choices=("", *ROUNDINGS))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the first GPU")
    options = parser.parse_args()
    if not begin("gpu_logits", options.device):
        return 2
    if options.one_gpu:
        os.environ["PAGEWIRE_RANKS_SHARE_A_GPU"] = "1"
    models, scale = options.models.split(","), SCALES[options.device]
    stack = Stack(
        options.device,
        options.quantization,
        options.kv_cache_dtype,
        options.tensor_parallel_size,
        options.pipeline_parallel_size,
        options.one_gpu,
    )
    return conclude(
        "gpu_logits", lambda: [fault for name in models for fault in check(name, scale, stack)]
    )


if __name__ == "__main__":
    sys.exit(main())
