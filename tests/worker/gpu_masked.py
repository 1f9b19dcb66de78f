"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_masked.py

Rows under masks by one launch (pagewire_kernels/masked_sampling.py) against the same rows gathered,
masked and sampled one operation after the other: the same tokens, bit for bit, for all dtypes, with
and without filters, for few rows and many. Then what both take, the copy of masks included: on the
GPU, and of the processor's time to launch them. One line tells the verdict; the exit status is 0
when all is well.
"""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from pagewire_kernels.masked_sampling import MaskedSamplingRows, sample_masked
from pagewire_kernels.sampling import sample
from pagewire_kernels.token_masks import apply_token_masks
from torch import Tensor

MOST, SLOTS = 256, 300
VOCABULARIES = (49_152, 151_936, 32_003)
REPEATS = 50


class Case:
    """Rows of a step: logits, what is uploaded, and where tokens go."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, filtered: bool) -> None:
        torch.manual_seed(count + width)
        words = -(-width // 32)
        self.logits = (torch.randn(MOST, width, device="cuda") * 3).to(dtype)
        self.size = MaskedSamplingRows.num_bytes(MOST, words, count)
        host = torch.zeros(MaskedSamplingRows.num_bytes(MOST, words, MOST), dtype=torch.uint8)
        here = MaskedSamplingRows.views(host, MOST, words)
        here.rows[:count] = torch.randperm(MOST)[:count].int()
        here.slots[:count] = torch.randperm(SLOTS)[:count].int()
        here.masks[:count] = torch.randperm(count).int()
        here.words[:count] = torch.randint(-(2**31), 2**31, (count, words), dtype=torch.int32)
        here.sampling.seeds.random_(0, 2**62)
        here.sampling.positions.random_(0, 2**34)
        temperature, top_k, top_p, min_p = here.sampling.values
        temperature.uniform_(0.2, 2.0)[::5] = 0.0
        top_k.fill_(0)
        top_p.fill_(1.0)
        min_p.fill_(0)
        if filtered:
            top_k[::3] = 20
            top_p[::2] = 0.9
            min_p[::7] = 0.05
        self.host = host.pin_memory()
        self.memory = torch.empty_like(host, device="cuda")
        self.held = MaskedSamplingRows.views(self.memory, MOST, words).first(count, filtered)
        self.sampled_tokens = torch.full((MOST,), -7, dtype=torch.int32, device="cuda")
        self.last_token = torch.full((SLOTS,), -7, dtype=torch.int32, device="cuda")

    def upload(self) -> None:
        self.memory[: self.size].copy_(self.host[: self.size], non_blocking=True)

    def at_once(self) -> None:
        """One copy and one launch, or three."""
        self.upload()
        sample_masked(self.logits, self.held, self.last_token, self.sampled_tokens)

    def one_by_one(self) -> Tensor:
        """The tokens, as they are sampled without it."""
        self.upload()
        rows = self.held.rows.long()
        x = self.logits[rows].float()
        index = torch.arange(len(rows), device="cuda")
        apply_token_masks(x, index, self.held.words[self.held.masks.long()])
        sampled = sample(x, self.held.sampling)
        tokens = sampled.tokens.int()
        self.sampled_tokens[rows] = torch.where(sampled.bad, -1, tokens)
        self.last_token[self.held.slots.long()] = tokens
        return tokens

    def fault(self) -> str:
        """What is wrong, if anything is."""
        wanted = self.one_by_one()
        count = len(wanted)
        self.sampled_tokens.fill_(-7)
        self.last_token.fill_(-7)
        self.at_once()
        got = self.sampled_tokens[self.held.rows.long()]
        differing = int((got != wanted).sum())
        if differing or not torch.equal(self.last_token[self.held.slots.long()], wanted):
            return f"{differing} of {count} tokens differ"
        left = int((self.sampled_tokens == -7).sum()), int((self.last_token == -7).sum())
        return "" if left == (MOST - count, SLOTS - count) else f"other rows were written: {left}"


def microseconds(run: Callable[[], object]) -> tuple[float, float]:
    """On the GPU, and of this thread until it is launched."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # pyright: ignore[reportPrivateUsage]  # launches wait for none
    launched = time.perf_counter()
    began.record()
    for _ in range(REPEATS):
        run()
    ended.record()
    launched = time.perf_counter() - launched
    ended.synchronize()
    return 1000 * began.elapsed_time(ended) / REPEATS, 1e6 * launched / REPEATS


def main() -> int:
    """0 when all is well, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("gpu_masked: NOT RUN, torch sees no GPU")
        return 2
    faults = 0
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    kinds = list(itertools.product((1, 2, 5, 51, 256), VOCABULARIES, dtypes, (False, True)))
    for count, width, dtype, filtered in kinds:
        fault = Case(count, width, dtype, filtered).fault()
        if fault:
            faults += 1
            print(f"{count} rows of {width} {dtype}, {filtered=}: {fault}")
    for count, width, filtered in itertools.product((51, 256), VOCABULARIES[:2], (False, True)):
        case = Case(count, width, torch.bfloat16, filtered)
        one, several = microseconds(case.at_once), microseconds(case.one_by_one)
        print(
            f"{count:>4} rows of {width:>7}{', filtered' if filtered else '':<10}: at once "
            f"{one[0]:6.0f} us on the GPU, {one[1]:4.0f} to launch; "
            f"one by one {several[0]:6.0f} and {several[1]:4.0f}"
        )
    print(f"gpu_masked: {'FAILED' if faults else 'OK'}, {len(kinds)} cases, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
