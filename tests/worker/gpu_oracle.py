"""How far what a stack said is from transformers in float32, beside how far transformers' own bf16 is: for checks on a machine with a GPU.

A chosen token, or the n-th most likely one, may be behind float32's by twice the largest error of transformers' bf16 logits at its
position: each of the two logits that are compared may be off by one such error. Errors of log-probabilities are bounded by those of
transformers' bf16 for the same tokens at the same positions. Knows neither models nor how the stack was set up.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

PIECE = 512
"""Positions whose logits exist at a time."""
MEAN, MOST = 1.25, 2.0
"""By how much our errors may exceed those of transformers' bf16, on average and at their largest."""
TOP = 5
"""Log-probabilities that are asked for."""

R = TypeVar("R")


class Oracle:
    """The model at `path`, a directory or a GGUF file, in float32 and with the same weights in bf16."""

    def __init__(self, path: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        place: Any = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        self._device = device
        self._exact: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place).to(device).eval()
        self._rough: Any = copy.deepcopy(self._exact)
        for parameter in self._rough.parameters():  # not the buffers: transformers keeps the rotary frequencies in float32
            parameter.data = parameter.data.bfloat16()

    @torch.inference_mode()
    def logits(self, tokens: list[int], first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(position, exact, rough): float32 [n, V] of what follows the tokens from `position` on, the first piece from `first` on."""
        ids, models = torch.tensor([tokens], device=self._device), (self._exact, self._rough)
        states = [model.model(ids, use_cache=False).last_hidden_state[0] for model in models]
        for at in range(first, len(tokens), PIECE):
            exact, rough = (model.lm_head(state[at : at + PIECE]).float() for model, state in zip(models, states, strict=True))
            yield at, exact, rough


@dataclass
class Said:
    """What one request was told in the set-up `name`: `tokens` are prompt and output, greedily chosen. A score is (position of the token,
    id, rank, log-probability)."""

    name: str
    tokens: list[int]
    prompt: int
    scores: list[tuple[int, int, int, float]]

    @classmethod
    def of(cls, name: str, output: Any) -> "Said":
        """Raises ValueError where a position that was asked for has no scores, or not all."""
        done, prompt = output.outputs[0], output.prompt_token_ids
        tokens = [*prompt, *done.token_ids]
        entries = [*(output.prompt_logprobs or [None] * len(prompt)), *(done.logprobs or [None] * len(done.token_ids))]
        wanted = 1 if output.prompt_logprobs else len(prompt) if done.logprobs else len(tokens)
        for position, (token, told) in enumerate(zip(tokens, entries, strict=True)):
            if bool(told) != (position >= wanted) or (told and (token not in told or len(told) < TOP)):
                raise ValueError(f"{name}: token {position} behind a prompt of {len(prompt)} has the scores {told}")
        flat = [(at, token, one.rank, one.logprob) for at, told in enumerate(entries) for token, one in (told or {}).items()]
        return cls(name, tokens, len(prompt), flat)

    @property
    def first(self) -> int:
        """The first position whose logits are needed."""
        return min((score[0] for score in self.scores), default=self.prompt) - 1


@dataclass
class Tally:
    """Of one set-up. `chosen` tokens, of which `second` are not float32's first; `outside` of them and of the scores, `ranked` in all, are
    further behind than they may be; `behind` is the most of it, in errors of transformers' bf16."""

    chosen: int = 0
    second: int = 0
    outside: int = 0
    ranked: int = 0
    behind: float = 0.0
    _ours: list[Tensor] = field(default_factory=list[Tensor])
    _theirs: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, said: Said, at: int, exact: Tensor, rough: Tensor) -> None:
        """exact, rough [n, V]: logits of what follows the positions from `at` on."""
        noise = (rough - exact).abs().amax(-1)
        best = exact.topk(TOP).values
        end = min(at + len(exact), len(said.tokens) - 1)
        chosen = [(place - 1 - at, said.tokens[place]) for place in range(max(said.prompt, at + 1), end + 1)]
        if chosen:
            rows, ids = torch.tensor(chosen, device=exact.device).T
            gap = best[rows, 0] - exact[rows, ids]
            self.chosen += len(chosen)
            self.second += int((gap > 0).sum())
            self._check(gap, noise[rows])
        scores = [score for score in said.scores if at < score[0] <= at + len(exact)]
        if scores:
            places, ids, ranks = torch.tensor([score[:3] for score in scores], device=exact.device).T
            self._score(places - 1 - at, ids, ranks, torch.tensor([score[3] for score in scores], device=exact.device), exact, rough)
            rows = (places - 1 - at)[ranks <= TOP]
            self._check(best[rows, ranks[ranks <= TOP] - 1] - exact[rows, ids[ranks <= TOP]], noise[rows])

    def _check(self, gap: Tensor, noise: Tensor) -> None:
        self.ranked += len(gap)
        self.outside += int((~(gap <= 2 * noise)).sum())
        self.behind = max(self.behind, float((gap / noise).max()))

    def _score(self, rows: Tensor, ids: Tensor, ranks: Tensor, values: Tensor, exact: Tensor, rough: Tensor) -> None:
        true = exact.log_softmax(-1)[rows, ids]
        self._ours.append((values - true).abs().cpu())
        self._theirs.append((rough.log_softmax(-1)[rows, ids] - true).abs().cpu())

    def verdict(self) -> tuple[str, list[str]]:
        """A line of figures, and what is wrong."""
        line = f"{self.chosen} tokens, {self.second} not float32's first; {self.outside} of {self.ranked} ranked too high"
        line += f" (worst {self.behind:.2f} errors of bf16)"
        faults = [f"{self.outside} tokens are ranked higher than bf16 could by mistake"] if self.outside else []
        if self._ours:
            ours, theirs = torch.cat(self._ours), torch.cat(self._theirs)
            line += f"; {len(ours)} log-probabilities: error {ours.mean():.4f}, at most {ours.max():.3f}"
            line += f" (transformers' bf16 {theirs.mean():.4f}, {theirs.max():.3f})"
            if not ours.mean() <= MEAN * theirs.mean():
                faults.append(f"log-probabilities are off by {ours.mean():.4f} on average, more than {MEAN} times {theirs.mean():.4f}")
            if not ours.max() <= MOST * theirs.max():
                faults.append(f"a log-probability is off by {ours.max():.3f}, more than {MOST} times {theirs.max():.3f}")
        return line, faults


def judge(oracle: Oracle, said: list[Said]) -> dict[str, Tally]:
    """By set-up. Transformers reads what several set-ups said alike only once."""
    alike: dict[tuple[int, ...], list[Said]] = {}
    for one in said:
        alike.setdefault(tuple(one.tokens), []).append(one)
    tallies = {one.name: Tally() for one in said}
    for tokens, several in alike.items():
        for at, exact, rough in oracle.logits(list(tokens[:-1]), min(one.first for one in several)):
            for one in several:
                tallies[one.name].add(one, at, exact, rough)
    return tallies


def in_turn(run: Callable[[str], R], names: list[str], at_once: int) -> dict[str, R]:
    """run(name) of each: the first alone, so that the others find its kernels compiled, then several stacks side by side."""
    found = {names[0]: run(names[0])}
    with ThreadPoolExecutor(at_once) as pool:
        return found | dict(zip(names[1:], pool.map(run, names[1:]), strict=True))


def conclude(check: str, faults: list[str]) -> int:
    """Prints the last lines; the exit status."""
    print(f"{check}: {'FAILED' if faults else 'OK'}", *faults[:20], sep="\n", flush=True)
    return 1 if faults else 0


def has_device(check: str, device: str) -> bool:
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{check}: NOT RUN, torch sees no GPU")
        return False
    return True
