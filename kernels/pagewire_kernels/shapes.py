"""Launch shapes that fit the GPU: of the candidates that a kernel lists, best first, the first
whose shared memory a block may have.

Cards differ by a factor of two in what a block may have, and the element size doubles what a shape
needs. Each candidate names the smallest cards that it was compiled for
(tests/ops/test_shapes_fit.py does so for every target). A shape that the GPU refuses all the same
gives way to the next one, for the rest of the process. Knows no kernel.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import torch
from triton.runtime.errors import OutOfResources

log = logging.getLogger("pagewire.kernels")
KIB_99: Final = 101_376
"""Bytes of shared memory that one block may have on compute capability 8.6, 8.9 and 12.x."""
KIB_163: Final = 166_912
"""On 8.0."""
KIB_227: Final = 232_448
"""On 9.0 and 10.x."""

S = TypeVar("S")
_pretended: list[int] = []


@functools.cache
def _optin(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have. Where nothing is launched on a GPU (Triton's
    interpreter), the most of any."""
    if _pretended:
        return _pretended[-1]
    return _optin(device) if device.type == "cuda" else KIB_227


@contextlib.contextmanager
def pretend(limit_bytes: int) -> Iterator[None]:
    """Choose as a card with this limit would, for checks of its shapes on another card."""
    _pretended.append(limit_bytes)
    try:
        yield
    finally:
        _pretended.pop()


@dataclass(frozen=True)
class Candidate(Generic[S]):
    """`least`: of the limits of all cards on which the shape fits, the lowest; the same shape needs
    more bytes on larger cards, where the compiler keeps more in shared memory."""

    shape: S
    least: int = KIB_99


@dataclass
class Choice(Generic[S]):
    """A kernel in a person's words, such as "prefill attention (head size 256, 4 bytes an
    element)", and its candidates, best first. A process has one for each kernel and keeps it: it
    remembers what was refused."""

    kernel: str
    candidates: tuple[Candidate[S], ...]
    _left: dict[int, list[S]] = field(default_factory=dict[int, list[S]], repr=False)
    """By the limit of a block: the shapes that fit it and were not refused."""

    def fitting(self, device: torch.device) -> list[S]:
        """At least one: the last candidate is tried whatever the limit."""
        there = limit(device)
        left = self._left.get(there)
        if left is None:
            fits = [candidate.shape for candidate in self.candidates if candidate.least <= there]
            left = self._left[there] = fits or [self.candidates[-1].shape]
        return left

    def first(self, device: torch.device) -> S:
        return self.fitting(device)[0]

    def launch(self, device: torch.device, run: Callable[[S], None]) -> None:
        """run(shape) with the first shape that the GPU takes. Raises OutOfResources, with the
        kernel's name as a note, when none is left.

        Triton refuses a kernel before it runs for the first time, which is while a worker warms up
        and before it captures graphs.
        """
        left = self.fitting(device)
        while True:
            try:
                return run(left[0])
            except OutOfResources as error:
                if len(left) == 1:
                    error.add_note(self.kernel)
                    raise
                log.warning(
                    "%s: %s does not fit this GPU (%s); %s is used",
                    self.kernel,
                    left[0],
                    _short(error),
                    left[1],
                )
                del left[0]


def elements(head_dim: int, itemsize: int, kv_itemsize: int) -> str:
    """An attention kernel's sizes in words: of a head, and of elements of queries and caches."""
    cache = "" if kv_itemsize == itemsize else f", {kv_itemsize} in the cache"
    return f"head size {head_dim}, {itemsize} bytes an element{cache}"


def _short(error: OutOfResources) -> str:
    return f"{error.required:,} of {error.limit:,} of {error.name}"
