"""How far what a stack said is from transformers in float32, beside how far transformers' own bf16
is: for checks on a machine with a GPU.

A chosen token, or the n-th most likely one, may be behind float32's by twice the largest error of
transformers' bf16 logits at its position: each of the two logits that are compared may be off by
one such error. Where transformers came closer than it does on average, the average of the part
counts: that its roundings happened to cancel out there says nothing of ours. Where tokens choose
experts, another choice makes a difference that no error at that position need tell of: the largest
error of the whole part counts there. Errors of log-probabilities are bounded by those of
transformers' bf16 for the same tokens at the same positions.
Knows neither models nor how the stack was set up.
"""

import copy
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pagewire.worker.models.rounding import E4M3_MOST
from torch import Tensor

PIECE = 512
"""Positions whose logits exist at a time."""
MEAN, MOST, MOST_ROUTED = 1.25, 2.0, 3.0
"""By how much our errors may exceed those of transformers' bf16, on average and at their largest;
among experts, whose largest errors are those of a few tokens that chose others."""
FURTHEST = 2.0
"""How far a token may be behind, in errors of transformers' bf16."""
TOP = 5
"""Log-probabilities that are asked for."""

R = TypeVar("R")


class Oracle:
    """The model at `path`, a directory or a GGUF file, in float32 and with the same weights in bf16.
    float8_inputs: there the inputs of the layers' matrices are rounded to float8 as well, each row
    with a scale of its own. float8_cache: in both, keys and values are what a KV cache in float8
    keeps of them, by a scale of 1."""

    def __init__(
        self, path: Path, device: str, float8_inputs: bool = False, float8_cache: bool = False
    ) -> None:
        from transformers import AutoModelForCausalLM

        place: Any = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        self._device = device
        if float8_cache:
            place["attn_implementation"] = _attention_by_float8()
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place)
        self._exact: Any = model.to(device).eval()
        self._rough: Any = copy.deepcopy(self._exact)
        self.routed = bool(getattr(self._exact.config, "num_experts", 0))
        for parameter in (
            self._rough.parameters()
        ):  # not the buffers: transformers keeps the rotary frequencies in float32
            parameter.data = parameter.data.bfloat16()
        if float8_inputs:
            for name, module in self._rough.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    module.register_forward_pre_hook(_in_float8)

    @torch.inference_mode()
    def logits(self, tokens: list[int], first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(position, exact, rough): float32 [n, V] of what follows the tokens from `position` on,
        the first piece from `first` on."""
        ids, models = torch.tensor([tokens], device=self._device), (self._exact, self._rough)
        states = [model.base_model(ids, use_cache=False).last_hidden_state[0] for model in models]
        for at in range(first, len(tokens), PIECE):
            exact, rough = (
                model.lm_head(state[at : at + PIECE]).float()
                for model, state in zip(models, states, strict=True)
            )
            yield at, exact, rough


def _in_float8(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    scale = x.float().abs().amax(-1, keepdim=True).clamp_(min=torch.finfo().tiny) / E4M3_MOST
    rounded = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    return (rounded.to(x.dtype),)


def _attention_by_float8() -> str:
    """The name by which transformers knows its own attention over such keys and values."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        return sdpa_attention_forward(module, query, _kept(key), _kept(value), *args, **kw)

    name = "sdpa_float8_cache"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _kept(x: Tensor) -> Tensor:
    return x.float().clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).to(x.dtype)


@dataclass
class Said:
    """What one request was told in a set-up, or a part of it: `tokens` are prompt and output; those
    from `chosen` on were chosen greedily. A score is (position of the token, id, rank,
    log-probability)."""

    setup: str
    part: str
    tokens: list[int]
    chosen: int
    scores: list[tuple[int, int, int, float]]

    @classmethod
    def output(cls, setup: str, part: str, output: Any) -> "Said":
        """Raises ValueError where a token has no scores, or not all that were asked for."""
        tokens, first = _tokens(output), len(output.prompt_token_ids)
        told = output.outputs[0].logprobs
        return cls(
            setup, part, tokens, first, _flat(tokens[first:], first, told, setup) if told else []
        )

    @classmethod
    def prompt(cls, setup: str, part: str, output: Any) -> "Said":
        """Raises ValueError likewise."""
        tokens = _tokens(output)
        return cls(
            setup,
            part,
            tokens,
            len(tokens),
            _flat(output.prompt_token_ids[1:], 1, output.prompt_logprobs[1:], setup),
        )

    @property
    def first(self) -> int:
        """The first position whose logits are needed."""
        return min((score[0] for score in self.scores), default=self.chosen) - 1


def _tokens(output: Any) -> list[int]:
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def _flat(
    tokens: list[int], first: int, entries: list[Any], setup: str
) -> list[tuple[int, int, int, float]]:
    """The scores of `tokens`, whose positions begin at `first`."""
    if len(entries) != len(tokens):
        raise ValueError(f"{setup}: {len(entries)} of {len(tokens)} tokens have log-probabilities")
    for position, (token, told) in enumerate(zip(tokens, entries, strict=True), first):
        if not told or token not in told or len(told) < TOP:
            raise ValueError(
                f"{setup}: token {token} at {position} has the log-probabilities {told}"
            )
    return [
        (at, token, one.rank, one.logprob)
        for at, told in enumerate(entries, first)
        for token, one in told.items()
    ]


@dataclass
class Tally:
    """Of one part of a set-up. `chosen` tokens, of which `second` are not float32's first."""

    chosen: int = 0
    second: int = 0
    routed: bool = False
    """Tokens choose experts."""
    _gaps: list[Tensor] = field(default_factory=list[Tensor])
    """How far these tokens, and the most likely ones, are behind float32's."""
    _noise: list[Tensor] = field(default_factory=list[Tensor])
    """The largest error of transformers' bf16 at each one's position."""
    _ours: list[Tensor] = field(default_factory=list[Tensor])
    _theirs: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, said: Said, at: int, exact: Tensor, rough: Tensor) -> None:
        """exact, rough [n, V]: logits of what follows the positions from `at` on."""
        noise = (rough - exact).abs().amax(-1)
        best = exact.topk(TOP).values
        end = min(at + len(exact), len(said.tokens) - 1)
        chosen = [
            (place - 1 - at, said.tokens[place])
            for place in range(max(said.chosen, at + 1), end + 1)
        ]
        if chosen:
            rows, ids = torch.tensor(chosen, device=exact.device).T
            gap = best[rows, 0] - exact[rows, ids]
            self.chosen += len(chosen)
            self.second += int((gap > 0).sum())
            self._compare(gap, noise[rows])
        scores = [score for score in said.scores if at < score[0] <= at + len(exact)]
        if scores:
            places, ids, ranks = torch.tensor(
                [score[:3] for score in scores], device=exact.device
            ).T
            self._score(
                places - 1 - at,
                ids,
                ranks,
                torch.tensor([score[3] for score in scores], device=exact.device),
                exact,
                rough,
            )
            rows = (places - 1 - at)[ranks <= TOP]
            self._compare(
                best[rows, ranks[ranks <= TOP] - 1] - exact[rows, ids[ranks <= TOP]], noise[rows]
            )

    def _compare(self, gap: Tensor, noise: Tensor) -> None:
        self._gaps.append(gap.cpu())
        self._noise.append(noise.cpu())

    def _ranks(self) -> tuple[int, int, float]:
        """Ranks that were compared; those that are further behind than they may be; the furthest,
        in errors of transformers' bf16."""
        if not self._gaps:
            return 0, 0, 0.0
        gaps, noise = torch.cat(self._gaps), torch.cat(self._noise)
        error = noise.max() if self.routed else noise.clamp(min=noise.mean())
        outside = ~(gaps <= FURTHEST * error)  # what is no number, too
        return len(gaps), int(outside.sum()), float((gaps / error).nan_to_num(0.0).max())

    def _score(
        self, rows: Tensor, ids: Tensor, ranks: Tensor, values: Tensor, exact: Tensor, rough: Tensor
    ) -> None:
        true = exact.log_softmax(-1)[rows, ids]
        self._ours.append((values - true).abs().cpu())
        self._theirs.append((rough.log_softmax(-1)[rows, ids] - true).abs().cpu())

    def verdict(self) -> tuple[str, list[str]]:
        """Figures, and what is wrong."""
        ranked, outside, behind = self._ranks()
        words = (
            [f"{self.second} of {self.chosen:,} tokens not float32's first"] if self.chosen else []
        )
        words.append(f"{outside} of {ranked:,} ranks wrong (worst {behind:.2f})")
        faults = (
            [f"{outside} tokens are ranked higher than an error of bf16 explains"]
            if outside
            else []
        )
        if self._ours:
            ours, theirs = torch.cat(self._ours), torch.cat(self._theirs)
            words.append(
                f"{len(ours):,} scores off by {ours.mean():.4f}, {ours.max():.3f} (bf16 {theirs.mean():.4f}, {theirs.max():.3f})"
            )
            if not ours.mean() <= MEAN * theirs.mean():
                faults.append(
                    f"log-probabilities are off by {ours.mean():.4f} on average, more than {MEAN} times {theirs.mean():.4f}"
                )
            most = MOST_ROUTED if self.routed else MOST
            if not ours.max() <= most * theirs.max():
                faults.append(
                    f"a log-probability is off by {ours.max():.3f}, more than {most} times {theirs.max():.3f}"
                )
        return ", ".join(words), faults


def judge(oracle: Oracle, said: list[Said]) -> dict[str, tuple[str, list[str]]]:
    """For each set-up a line of figures and what is wrong, part by part: a small part may be wrong
    where the whole looks right. Transformers reads only once what several set-ups said alike."""
    alike: dict[tuple[int, ...], list[Said]] = {}
    for one in said:
        alike.setdefault(tuple(one.tokens), []).append(one)
    tallies: dict[str, dict[str, Tally]] = {}
    for one in said:
        tallies.setdefault(one.setup, {}).setdefault(one.part, Tally(routed=oracle.routed))
    for tokens, several in alike.items():
        for at, exact, rough in oracle.logits(list(tokens[:-1]), min(one.first for one in several)):
            for one in several:
                tallies[one.setup][one.part].add(one, at, exact, rough)
    found: dict[str, tuple[str, list[str]]] = {}
    for setup, parts in tallies.items():
        verdicts = {part: tally.verdict() for part, tally in parts.items()}
        line = "; ".join(f"{part}: {figures}" for part, (figures, _) in verdicts.items())
        found[setup] = (
            line,
            [
                f"{setup}, {part}: {'; '.join(faults)}"
                for part, (_, faults) in verdicts.items()
                if faults
            ],
        )
    return found


def in_turn(run: Callable[[str], R], names: list[str], at_once: int) -> dict[str, R]:
    """run(name) of each: the first alone, so that the others find its kernels compiled, then
    several stacks side by side."""
    found = {names[0]: run(names[0])}
    with ThreadPoolExecutor(at_once) as pool:
        return found | dict(zip(names[1:], pool.map(run, names[1:]), strict=True))


def conclude(check: str, work: Callable[[], list[str]]) -> int:
    """Prints what `work` says is wrong, and the verdict as the last line; the exit status. A stack
    that breaks down is a fault, too."""
    start = time.monotonic()
    try:
        faults = work()
    except (ValueError, RuntimeError) as error:
        traceback.print_exc()
        faults = [f"the check broke off: {error}"]
    verdict = f"{check}: {'FAILED' if faults else 'OK'}, {time.monotonic() - start:.0f} s"
    print(*faults[:20], verdict, sep="\n", flush=True)
    return 1 if faults else 0


def begin(check: str, device: str) -> bool:
    """Whether there is the device."""
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{check}: NOT RUN, torch sees no GPU")
        return False
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # an environment may ask for less
    return True
