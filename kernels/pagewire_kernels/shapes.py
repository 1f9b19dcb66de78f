"""Launch shapes that fit the GPU: of the candidates that a kernel lists, best first, the first whose shared memory a block may have.

Cards differ by a factor of two in what a block may have, and the element size doubles what a shape needs. Each candidate names the smallest
cards that it was compiled for (tests/ops/test_shapes_fit.py does so for every target). A shape that the GPU refuses all the same gives way
to the next one, for the rest of the process. Knows no kernel.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
_refused: set[tuple[str, object]] = set()


@functools.cache
def _optin(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have. Where nothing is launched on a GPU (Triton's interpreter), the most of any."""
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
    """`least`: of the limits of all cards on which the shape fits, the lowest; the same shape needs more bytes on larger cards, where the
    compiler keeps more in shared memory."""

    shape: S
    least: int = KIB_99


@dataclass(frozen=True)
class Choice(Generic[S]):
    """A kernel in a person's words, such as "prefill attention (head size 256, 4 bytes an element)", and its candidates, best first."""

    kernel: str
    candidates: tuple[Candidate[S], ...]

    def fitting(self, device: torch.device) -> list[S]:
        """At least one: the last candidate is tried whatever the limit."""
        there = limit(device)
        fits = [candidate.shape for candidate in self.candidates if candidate.least <= there]
        left = [shape for shape in fits if (self.kernel, shape) not in _refused]
        return left or [self.candidates[-1].shape]

    def first(self, device: torch.device) -> S:
        return self.fitting(device)[0]

    def launch(self, device: torch.device, run: Callable[[S], None]) -> None:
        """run(shape) with the first shape that the GPU takes. Raises OutOfResources, with the kernel's name as a note, when none is left.

        Triton refuses a kernel before it runs for the first time, which is while a worker warms up and before it captures graphs.
        """
        shapes = self.fitting(device)
        for shape, following in zip(shapes, [*shapes[1:], None], strict=True):
            try:
                return run(shape)
            except OutOfResources as error:
                if following is None:
                    error.add_note(self.kernel)
                    raise
                _refused.add((self.kernel, shape))
                log.warning("%s: %s does not fit this GPU (%s); %s is used", self.kernel, shape, _short(error), following)


def _short(error: OutOfResources) -> str:
    return f"{error.required:,} of {error.limit:,} of {error.name}"
