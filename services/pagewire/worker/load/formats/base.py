"""What a format of quantized checkpoints has to say, and how the tensors of one matrix are brought
together. Knows no single format.

A quantized matrix is several tensors of the checkpoint with a common name before their endings, as
`….q_proj.qweight`, `.scales` and `.qzeros`. They may lie in different files and come in any order.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pagewire_kernels.quantized import Quantized
from torch import Tensor

from ...models.architecture import Unsupported

Named = tuple[str, Tensor]
Value = tuple[str, Tensor | Quantized]
Parts = Mapping[str, Tensor]
"""The tensors of one matrix by their endings."""


FOUR_BITS = 4


@dataclass(frozen=True)
class Extent:
    """Size of a quantized matrix W [rows, columns]. bits: of its codes, where it is codes with
    scales and minima, or (table) with the table of that name (lookup_tables); 0: it is none of those
    nor (is_float) floating-point numbers of 8 bits, and made full. group: inputs that share a
    scale."""

    rows: int
    columns: int
    bits: int
    is_float: bool = False
    group: int = 0
    table: str = ""

    @property
    def code_bytes(self) -> float:
        """Of a code where it is kept: in a half byte or a whole one."""
        return 0.5 if self.bits <= FOUR_BITS else 1.0


class CheckpointFormat(ABC):
    """One format, with what the checkpoint's configuration says of it."""

    name: ClassVar[str]
    """As `quant_method` has it."""
    endings: ClassVar[tuple[str, ...]]
    """Of the tensors that make a matrix. What has one of `markers` is a quantized matrix."""
    markers: ClassVar[tuple[str, ...]]
    unused: ClassVar[tuple[str, ...]] = ()
    """Endings of tensors that products with 16-bit activations have no use for."""
    rounds: ClassVar[bool] = True
    """Whether `rounded` rounds."""

    @property
    def rounding_name(self) -> str:
        """What `rounded` does, as --quantization calls it."""
        return self.name

    @abstractmethod
    def title(self) -> str:
        """For a log line: the format and its numbers."""

    @abstractmethod
    def matrix(self, module: str, parts: Parts) -> Tensor | Quantized:
        """W [out features, in features] of the matrix named `module`, with all values exact in
        float32: Quantized where it is codes with scales and minima, or with a table, else
        dequantized. Raises
        Unsupported, with names and shapes, for parts that do not fit each other."""

    def rounded(self, weight: Tensor) -> Tensor | Quantized:
        """A full matrix [N, K] as a checkpoint of this format would have it; full where the format
        does not say how. Random weights are made so."""
        return weight

    @abstractmethod
    def extent(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
        """Of a matrix, from the shapes of its parts."""


class Assembler:
    """Brings together the tensors of quantized matrices. `names`: of all tensors there will be."""

    def __init__(self, form: CheckpointFormat, names: Iterable[str]) -> None:
        self._form = form
        self._expected: dict[str, set[str]] = {}
        everything = list(names)
        for name in everything:
            for marker in form.markers:
                module = name.removesuffix(f".{marker}")
                if module != name:
                    self._expected[module] = set()
        for name in everything:
            module, ending = self._split(name)
            if module in self._expected and ending in form.endings:
                self._expected[module].add(ending)

    @property
    def modules(self) -> Mapping[str, set[str]]:
        """The quantized matrices, with the endings of their tensors."""
        return self._expected

    def assembled(self, tensors: Iterable[Named], device: torch.device | str) -> Iterator[Value]:
        """`tensors` with each quantized matrix as one, `….weight`, made on `device`; others as they
        are. Raises Unsupported."""
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            module, ending = self._split(name)
            expected = self._expected.get(module)
            if expected is None or ending not in expected:
                if not name.endswith(self._form.unused):
                    yield name, tensor
                continue
            parts = waiting.setdefault(module, {})
            parts[ending] = tensor.to(device)
            if len(parts) == len(expected):
                yield f"{module}.weight", self._form.matrix(module, waiting.pop(module))
        for module, parts in waiting.items():
            missing = ", ".join(sorted(self._expected[module] - set(parts)))
            raise Unsupported(f"the checkpoint lacks {missing} of {module}")

    def _split(self, name: str) -> tuple[str, str]:
        """(name of the matrix, ending), the longest ending that fits."""
        for ending in sorted(self._form.endings, key=len, reverse=True):
            if name.endswith(f".{ending}"):
                return name.removesuffix(f".{ending}"), ending
        return name, ""


def required(module: str, parts: Parts, ending: str) -> Tensor:
    """The part with this ending. Raises Unsupported where there is none."""
    if ending not in parts:
        raise Unsupported(f"{module} is quantized, but the checkpoint has no {module}.{ending}")
    return parts[ending]


def check_shape(module: str, ending: str, tensor: Tensor, *shape: int) -> None:
    """Raises Unsupported with both shapes."""
    if tuple(tensor.shape) != shape:
        raise Unsupported(
            f"{module}.{ending} has shape {list(tensor.shape)} where the other tensors of the "
            f"matrix ask for {list(shape)}: the checkpoint is damaged or its quantization "
            f"configuration is another's"
        )


def whole_number(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of these fields that the configuration has. Raises Unsupported where there is none
    or it is no whole number."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise Unsupported(f"{name} of the quantization is {value!r}, not a whole number")
        return value
    if default is None:
        raise Unsupported(f"the quantization's configuration does not say {' or '.join(names)}")
    return default
