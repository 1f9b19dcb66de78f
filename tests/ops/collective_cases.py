"""Checks of collective kernels that every rank of a group runs at the same time, in Triton's
interpreter or on GPUs: against the oracles, which each rank computes from all ranks' inputs, with
results that hold NaN until they are written, and with a digest of all results, which has to be the
same on all ranks.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pagewire_kernels import all_gather, all_reduce, reference
from pagewire_kernels.all_reduce import AddNorm, share_of
from pagewire_kernels.symmetric_communicator import Crossings, SymmetricCommunicator
from pagewire_kernels.symmetric_memory import GENERATIONS, SymmetricMemory
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SUMS: dict[str, Callable[..., Tensor]] = {
    "low-latency": all_reduce.low_latency,
    "one-shot": all_reduce.one_shot,
    "two-shot": all_reduce.two_shot,
}
GATHERS: dict[str, Callable[..., Tensor]] = {
    "low-latency": all_gather.low_latency,
    "one-shot": all_gather.one_shot,
}
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of a normed element's difference, relative to the largest: a rounding of the type, twice."""
EPS = 1e-5
WIDE = 1024
"""Of rows that do not all fit a buffer at a time."""


@dataclass
class Sizes:
    """`shapes`: of sums alone; `rows` and `widths`: of [T, H]; `rounds`: of random operations;
    `pause_s`: how long a rank lags behind at most. `thorough`: every shape in every type, and all
    norms in all kernels; otherwise each once."""

    shapes: Sequence[tuple[int, ...]]
    rows: Sequence[int]
    widths: Sequence[int]
    rounds: int
    pause_s: float
    thorough: bool

    def with_types(self, shapes: Sequence[Any]) -> list[tuple[Any, torch.dtype]]:
        """What is checked in what type."""
        if self.thorough:
            return [(shape, dtype) for shape in shapes for dtype in DTYPES]
        return [(shape, DTYPES[i % len(DTYPES)]) for i, shape in enumerate(shapes)]


TINY = Sizes(((1, 6), (7, 1300), (3, 2, 34)), (1, 6, 9), (72, 128), 24, 0.004, thorough=False)
REAL = Sizes(
    ((1, 8192), (7, 1300), (64, 8192)),
    (1, 6, 64, 333),
    (4096, 5120, 8192, 12288),
    400,
    0.002,
    thorough=True,
)


@dataclass
class Rank:
    """This rank in a check. `failures`: what was wrong; `digest`: of all results that have to be
    the same on all ranks."""

    memory: SymmetricMemory
    device: torch.device
    sizes: Sizes
    failures: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    _drawn: int = 0

    @property
    def number(self) -> int:
        """Of this rank."""
        return self.memory.rank

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same on every rank, and new in every call."""
        self._drawn += 1
        generator = torch.Generator().manual_seed(self._drawn)
        return torch.randn(*shape, generator=generator).to(dtype).to(self.device)

    def parts(self, *shape: int, dtype: torch.dtype) -> list[Tensor]:
        """Inputs of all ranks."""
        return [self.draw(*shape, dtype=dtype) for _ in range(self.memory.size)]

    def pause(self) -> None:
        """Lag behind the others, or not."""
        time.sleep(random.random() * self.sizes.pause_s * (random.random() < 0.3))

    def equal(self, what: str, got: Tensor, wanted: Tensor, common: bool = True) -> None:
        """`common`: whether all ranks have the same result."""
        if got.shape != wanted.shape or got.dtype != wanted.dtype or not torch.equal(got, wanted):
            self.failures.append(f"rank {self.number}: {what}: {difference(got, wanted)}")
        if common:
            self.add(got)

    def close(self, what: str, got: Tensor, wanted: Tensor) -> None:
        """As equal, within rounding."""
        gap = (got.double() - wanted.double()).abs().max()
        if not gap <= BOUNDS[got.dtype] * wanted.double().abs().max():
            self.failures.append(f"rank {self.number}: {what}: {difference(got, wanted)}")
        self.add(got)

    def add(self, result: Tensor) -> None:
        """To the digest."""
        self.digest.update(result.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def difference(got: Tensor, wanted: Tensor) -> str:
    """In words."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{list(got.shape)} {got.dtype} instead of {list(wanted.shape)} {wanted.dtype}"
    wrong = (got != wanted).sum().item()
    gap = (got.double() - wanted.double()).abs().max().item()
    return f"{wrong:,} of {got.numel():,} elements differ, by {gap:.3g} at most"


def fitting(rank: Rank, x: Tensor) -> list[str]:
    """The kernels for sums that take x."""
    small = all_reduce.takes_low_latency(rank.memory, x)
    return [name for name in SUMS if small or name != "low-latency"]


def sums(rank: Rank) -> None:
    """Alone, of every shape and type."""
    for shape, dtype in rank.sizes.with_types(rank.sizes.shapes):
        parts = rank.parts(*shape, dtype=dtype)
        for name in fitting(rank, parts[0]):
            rank.pause()
            got = SUMS[name](rank.memory, parts[rank.number])
            rank.equal(f"{name} of {list(shape)} {dtype}", got, reference.all_reduce(parts))


def norms(rank: Rank) -> None:
    """RMS norms, layer norms, and residuals and weights of a wider type."""
    for number, (rows, dtype) in enumerate(rank.sizes.with_types(rank.sizes.rows)):
        width = rank.sizes.widths[number % len(rank.sizes.widths)]
        kind = torch.float32 if rows % 2 == 0 else dtype
        parts = rank.parts(rows, width, dtype=dtype)
        residual = rank.draw(rows, width, dtype=kind)
        weight = rank.draw(width, dtype=kind)
        bias = rank.draw(width, dtype=kind)
        total = (reference.all_reduce(parts).float() + residual.float()).to(kind)
        for name in fitting(rank, parts[0]):
            what = f"{name} and norm of {[rows, width]} {dtype}"
            own = residual.clone()
            rank.pause()
            normed = SUMS[name](rank.memory, parts[rank.number], AddNorm(own, weight, EPS))
            rank.equal(f"{what}: residual", own, total)
            wanted = reference.rms_norm(total.double(), weight.double(), EPS)
            rank.close(what, normed, wanted.to(dtype))
            if not rank.sizes.thorough and name != "one-shot":
                continue
            own = residual.clone()
            layer_norm = AddNorm(own, weight, EPS, bias, centre=True)
            normed = SUMS[name](rank.memory, parts[rank.number], layer_norm)
            wanted = reference.layer_norm(total.double(), weight.double(), bias.double(), EPS)
            rank.close(f"{what} (layer norm)", normed, wanted.to(dtype))


def shares(rank: Rank) -> None:
    """Reduce-scatter, and norms of the rank's own share."""
    size = rank.memory.size
    for rows in rank.sizes.rows:
        width = rank.sizes.widths[0]
        dtype = DTYPES[rows % 3]
        parts = rank.parts(rows, width, dtype=dtype)
        rank.pause()
        got = all_reduce.reduce_scatter(rank.memory, parts[rank.number])
        wanted = reference.reduce_scatter(parts, rank.number)
        rank.equal(f"reduce-scatter of {[rows, width]} {dtype}", got, wanted, common=False)
        share = share_of(rows, size)
        residual = rank.draw(share * size, width, dtype=dtype)
        weight = rank.draw(width, dtype=dtype)
        first = rank.number * share
        own = residual[first : first + share].clone()
        rank.pause()
        normed = all_reduce.scattered(rank.memory, parts[rank.number], AddNorm(own, weight, EPS))
        _, total = reference.all_reduce_add_norm(parts, residual[:rows], weight, EPS)
        there = max(0, min(rows - first, share))
        what = f"scattered norm of {[rows, width]} {dtype}"
        rank.equal(f"{what}: residual", own[:there], total[first : first + there], common=False)
        rank.equal(f"{what}: beyond", own[there:], residual[first + there : first + share], False)
        wanted = reference.rms_norm(total.double(), weight.double(), EPS)
        rank.close(what, normed, wanted.to(dtype))


def gathers(rank: Rank) -> None:
    """Along every dimension, in words of every size."""
    pieces = [((5, 24), torch.float32), ((3, 7), torch.bfloat16), ((2, 3, 5), torch.uint8)]
    pieces.append(((1, 5000), torch.float32))
    for shape, dtype in pieces:
        parts = [(part * 50).to(dtype) for part in rank.parts(*shape, dtype=torch.float32)]
        for dim in range(len(shape)):
            for name, kernel in GATHERS.items():
                if name == "low-latency" and not all_gather.takes_low_latency(
                    rank.memory, parts[0], dim
                ):
                    continue
                rank.pause()
                got = kernel(rank.memory, parts[rank.number], dim)
                wanted = reference.all_gather(parts, dim)
                rank.equal(f"{name} gather of {list(shape)} {dtype} along {dim}", got, wanted)


def mixed(rank: Rank) -> None:
    """Operations of random sizes one after the other, with ranks that lag: what is overwritten too
    early, or read too late, shows. Checked at the end, so that nothing waits in between."""
    choice = random.Random(7)
    width = rank.sizes.widths[-1]
    checks: list[tuple[str, Tensor, Tensor]] = []
    for number in range(rank.sizes.rounds):
        rows = choice.choice(rank.sizes.rows)
        parts = rank.parts(rows, width, dtype=torch.bfloat16)
        name = choice.choice(fitting(rank, parts[0]))
        rank.pause()
        got = SUMS[name](rank.memory, parts[rank.number])
        checks.append((f"operation {number}, {name}", got, reference.all_reduce(parts)))
        if choice.random() < 0.3:
            gather = choice.choice(sorted(GATHERS))
            small = [part[:1, :16].contiguous() for part in parts]
            got = GATHERS[gather](rank.memory, small[rank.number], 0)
            checks.append((f"operation {number}, gather", got, reference.all_gather(small, 0)))
    for what, got, wanted in checks:
        rank.equal(what, got, wanted)


def many_generations(rank: Rank) -> None:
    """Past the numbers that fit the 32 bits beside a packed word, signed and unsigned."""
    for start in (2**31 - 5, 2**32 - 5):
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        # the buffers go on alternating: another rank may still read those of the last generation
        start += (int(rank.memory.control[GENERATIONS].item()) - start) % 2
        rank.memory.control[GENERATIONS:] = start
        for number in range(8):
            parts = rank.parts(1, 72, dtype=torch.bfloat16)
            kernel = all_reduce.one_shot if number % 3 == 2 else all_reduce.low_latency
            rank.pause()
            got = kernel(rank.memory, parts[rank.number])
            rank.equal(f"generation {start + number + 1}", got, reference.all_reduce(parts))


class Elsewhere:
    """In place of NCCL: notes what comes to it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.seen: list[str] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.seen.append("all-reduce")
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        self.seen.append("all-gather")
        return x


def chosen_sums(rank: Rank, communicator: SymmetricCommunicator, parts: Sequence[Tensor]) -> None:
    """With and without a norm, of bfloat16 [T, H] parts."""
    own = parts[rank.number]
    what = f"chosen {tuple(own.shape)}"
    rank.equal(f"{what} sum", communicator.all_reduce(own), reference.all_reduce(parts))
    residual = rank.draw(*own.shape, dtype=torch.bfloat16)
    weight = rank.draw(own.shape[1], dtype=torch.bfloat16)
    wanted, total = reference.all_reduce_add_norm(parts, residual, weight, EPS)
    normed, added = communicator.all_reduce_add_norm(own, residual.clone(), weight, EPS)
    rank.equal(f"{what} residual", added, total)
    rank.close(f"{what} norm", normed, wanted)


def chosen(rank: Rank) -> None:
    """By the communicator: each way where it is chosen, and the library for what fits nowhere."""
    memory = rank.memory
    library = Elsewhere(rank.number, memory.size)
    ways = Crossings([(0, "low-latency"), (300, "one-shot"), (1200, "two-shot")])
    gathers_ways = Crossings([(0, "low-latency"), (300, "one-shot")])
    communicator = SymmetricCommunicator(memory, library, ways, gathers_ways)
    for rows in (1, 2, 9):
        parts = rank.parts(rows, 72, dtype=torch.bfloat16)
        chosen_sums(rank, communicator, parts)
        gathered = communicator.all_gather(parts[rank.number], -1)
        rank.equal("chosen gather", gathered, reference.all_gather(parts, -1))
    beyond = memory.layout.buffer_bytes // (WIDE * 2) + 3
    chosen_sums(rank, communicator, rank.parts(beyond, WIDE, dtype=torch.bfloat16))
    if library.seen:
        rank.failures.append(f"went elsewhere: {library.seen}")
    large = torch.zeros(memory.layout.buffer_bytes // 4 + 4, device=rank.device)
    communicator.all_reduce(large)
    communicator.all_gather(large, 0)
    communicator.all_reduce(large[:0])
    communicator.check()
    if library.seen != ["all-reduce", "all-gather", "all-reduce"]:
        rank.failures.append(f"of what fits nowhere, {library.seen} came to the library")


CASES: dict[str, Callable[[Rank], None]] = {
    "sums": sums,
    "norms": norms,
    "shares": shares,
    "gathers": gathers,
    "mixed": mixed,
    "chosen": chosen,
    "many generations": many_generations,
}


def run(memory: SymmetricMemory, device: torch.device, sizes: Sizes, case: str) -> dict[str, Any]:
    """One case on this rank, as plain values. Random inputs are the same in every run."""
    rank = Rank(memory, device, sizes)
    random.seed(memory.rank)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    CASES[case](rank)
    if memory.failure:
        rank.failures.append(f"rank {rank.number}: a wait reached its limit: {memory.failure}")
    return {"case": case, "failures": rank.failures, "digest": rank.digest.hexdigest()}
