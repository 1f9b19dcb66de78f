"""A model with Gemma 2's attention (head size 256, grouped heads, soft caps, a window in every
other layer), few layers and random weights: a worker's start, a few tokens of some requests, and
how far its log-probabilities are from transformers in float32. For gpu_shapes.py.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire_protocol.messages import Admission, Step, StepResult, pack, unpack
from pagewire_protocol.sampling import Sampling

VOCAB, STEPS, TOP, SEED = 4096, 8, 5, 7
SIZES = {
    "cuda": (
        {"hidden_size": 2304, "intermediate_size": 4608, "sliding_window": 512},
        (1, 130, 700, 1800),
        512,
    ),
    "cpu": ({"hidden_size": 64, "intermediate_size": 96, "sliding_window": 24}, (1, 13, 60), 32),
}
"""Sizes, lengths of prompts, and tokens of a chunk."""
EXACT = 2e-3
"""What float32's log-probabilities may be off by: sums in another order, over logits of some
ten."""
MEAN, MOST = 1.25, 2.0
"""By how much the errors in bfloat16 may exceed those of transformers' own bfloat16, on average and
at their largest."""


def save(path: Path, device: str) -> None:
    """In bfloat16, with norms that are not quite 1."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(SEED)
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "num_hidden_layers": 2,
        "query_pre_attn_scalar": 256,
    }
    config = Gemma2Config(
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        **heads,
        **SIZES[device][0],
    )
    model: Any = Gemma2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)


@dataclass
class Told:
    """Of one request: prompt and output, and (position, id, log-probability) of tokens."""

    tokens: list[int]
    scores: list[tuple[int, int, float]]


def prompts(device: str) -> list[list[int]]:
    make = torch.Generator().manual_seed(SEED)
    return [
        torch.randint(3, VOCAB, (length,), generator=make).tolist() for length in SIZES[device][1]
    ]


def started(path: Path, device: str, dtype: str) -> Any:
    settings = WorkerConfig(device=device, dtype=dtype, num_kv_blocks=512)
    given = (
        path,
        ModelConfig(max_model_len=2048),
        SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=2048),
        settings,
    )
    if device == "cuda":
        from pagewire.worker.gpu.runner import start

        return start(*given)
    from pagewire.worker.cpu.runner import Runner
    from pagewire.worker.runners import AsyncFromSync

    return AsyncFromSync(Runner(*given))


def run(runner: Any, asked: list[list[int]], chunk: int) -> list[Told]:
    """All in one batch, prompts in chunks beside the others' decodes, greedily."""
    found = [Told(list(prompt), []) for prompt in asked]
    sent, end = [0] * len(asked), [len(prompt) + STEPS for prompt in asked]
    admit, n = _admissions(asked, runner.facts().block_size), 0
    while running := [slot for slot, told in enumerate(found) if len(told.tokens) < end[slot]]:
        counts = [min(chunk, len(found[slot].tokens) - sent[slot]) for slot in running]
        flight = runner.launch(
            Step(1, n, admit=admit, run_slots=pack("i", running), run_counts=pack("i", counts))
        )
        admit, n = (), n + 1
        for slot, count in zip(running, counts, strict=True):
            sent[slot] += count
        while not flight.done():
            time.sleep(0)
        _take(flight.result(), found)
    return found


def _admissions(asked: list[list[int]], block_size: int) -> tuple[Admission, ...]:
    free, found = iter(range(512)), list[Admission]()
    sampling = Sampling(
        SEED, STEPS, temperature=0.0, logprobs=TOP, prompt_logprobs=TOP, ignore_eos=True
    )
    for slot, prompt in enumerate(asked):
        blocks = [next(free) for _ in range(-(-(len(prompt) + STEPS) // block_size))]
        found.append(Admission(slot, slot, pack("i", prompt), b"", pack("i", blocks), 0, sampling))
    return tuple(found)


def _take(result: StepResult, found: list[Told]) -> None:
    if any(result.flags):
        raise ValueError("logits that are not finite")
    slots = unpack("i", result.slots).tolist()
    for slot, token in zip(slots, unpack("i", result.tokens).tolist(), strict=True):
        found[slot].tokens.append(token)
    for part in result.prompt_logprobs:
        counts = unpack("i", part.counts).tolist()
        places = [part.first + i for i, count in enumerate(counts) for _ in range(count)]
        found[part.slot].scores += zip(
            places, unpack("i", part.ids).tolist(), unpack("f", part.values).tolist(), strict=True
        )
    if (columns := result.logprobs) is not None:
        mine = [slots[row] for row in unpack("i", columns.rows).tolist()]
        owners = [
            slot
            for slot, count in zip(mine, unpack("i", columns.counts).tolist(), strict=True)
            for _ in range(count)
        ]
        for slot, token, value in zip(
            owners,
            unpack("i", columns.ids).tolist(),
            unpack("f", columns.values).tolist(),
            strict=True,
        ):
            found[slot].scores.append((len(found[slot].tokens) - 1, token, value))


@torch.inference_mode()
def judge(path: Path, told: list[Told], dtype: str, device: str) -> tuple[str, list[str]]:
    """A line of figures, and what is wrong."""
    from transformers import Gemma2ForCausalLM

    exact: Any = (
        Gemma2ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        .to(device)
        .eval()
    )
    rough = copy.deepcopy(exact)
    for parameter in (
        rough.parameters()
    ):  # not the buffers: transformers keeps the rotary frequencies in float32
        parameter.data = parameter.data.bfloat16()
    ours, theirs, behind = list[torch.Tensor](), list[torch.Tensor](), 0.0
    for request in told:
        ids = torch.tensor([request.tokens], device=device)
        true, near = (model(ids).logits[0].float().log_softmax(-1) for model in (exact, rough))
        at, tokens = (
            torch.tensor(column, device=device)
            for column in list(zip(*request.scores, strict=True))[:2]
        )
        values = torch.tensor([score[2] for score in request.scores], device=device)
        ours.append((values - true[at - 1, tokens]).abs())
        theirs.append((near[at - 1, tokens] - true[at - 1, tokens]).abs())
        chosen = true[-STEPS - 1 : -1]
        gap = chosen.amax(-1) - chosen.gather(1, ids[0, -STEPS:, None])[:, 0]
        behind = max(behind, float(gap.max()))
    mine, others = torch.cat(ours), torch.cat(theirs)
    line = f"{len(mine)} scores off by {mine.mean():.2g}, {mine.max():.2g} at most (transformers in bfloat16 {others.mean():.2g}, "
    line += f"{others.max():.2g}); tokens {behind:.2g} behind the best"
    wrong = _wrong(mine, others, behind, dtype)
    return line, [f"{fault}: {line}" for fault in wrong]


def _wrong(mine: torch.Tensor, others: torch.Tensor, behind: float, dtype: str) -> list[str]:
    if dtype == "float32":
        return [] if mine.max() <= EXACT and behind <= EXACT else [f"more than {EXACT}"]
    close = mine.mean() <= MEAN * others.mean() and mine.max() <= MOST * others.max()
    return (
        []
        if close and behind <= 2 * float(others.max())
        else ["more than transformers in bfloat16"]
    )
