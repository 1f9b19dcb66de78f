"""The layout of quantized weights on a CPU: panels of 16 rows, in each panel group after group,
everything a group needs in one piece.

    panel p, group g:  codes | 16 scales | 16 minima
    codes of 8 bits:   for each input of the group 16 bytes, one a row
    codes of 4 bits:   for each two inputs 16 bytes, the first in the low halves

So a product reads memory from front to back, sixteen results side by side, whatever the width of
the processor's vectors.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .quantized import Quantized

ROWS: Final = 16
"""Of a panel."""


@dataclass(frozen=True)
class Format:
    """half: scales and minima are float16, which holds them exactly; else float32."""

    bits: int
    group: int
    half: bool
    minima: bool

    @property
    def code_bytes(self) -> int:
        return ROWS * self.group * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        return ROWS * (2 if self.half else 4)

    @property
    def group_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes * (2 if self.minima else 1)


FORMATS: Final = (
    Format(4, 32, True, True),
    Format(4, 32, False, True),
    Format(8, 32, True, False),
    Format(8, 32, False, False),
    Format(8, 32, False, True),
    Format(8, 16, False, False),
)
"""What there are kernels for; the first that holds a weight exactly is chosen."""


@dataclass(frozen=True)
class Panels:
    """data [panels, groups, bytes of a group] uint8; the rows that pad the last panel are zero."""

    data: Tensor
    rows: int
    format: Format

    @property
    def columns(self) -> int:
        return self.data.shape[1] * self.format.group

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.columns))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def choose_format(weight: Quantized, half: bool) -> Format:
    """half: the processor converts float16 by itself. Raises ValueError where there is no kernel
    for the weight."""
    for known in FORMATS:
        fits = (
            known.bits == weight.bits
            and known.group == weight.group
            and (known.minima or weight.minimum is None)
        )
        if fits and (
            not known.half
            or (
                half
                and _is_half(weight.scale)
                and (weight.minimum is None or _is_half(weight.minimum))
            )
        ):
            return known
    raise ValueError(f"no kernel for {weight.bits} bits in groups of {weight.group}")


def _is_half(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values)


def pack(weight: Quantized, half: bool = True) -> Panels:
    """weight in panels. Raises ValueError where there is no kernel for it."""
    form, (rows, columns) = choose_format(weight, half), weight.shape
    panels, groups = -(-rows // ROWS), columns // form.group
    codes = _padded(weight.codes, panels).view(panels, ROWS, groups, form.group).permute(0, 2, 3, 1)
    if form.bits == 4:
        codes = codes[:, :, ::2] | codes[:, :, 1::2] << 4
    kind = torch.float16 if form.half else torch.float32
    parts = [codes.reshape(panels, groups, -1).view(torch.uint8)]
    for values in (weight.scale, weight.minimum) if form.minima else (weight.scale,):
        found = torch.zeros_like(weight.scale) if values is None else values
        by_group = _padded(found.to(kind), panels).view(panels, ROWS, groups).mT.contiguous()
        parts.append(by_group.view(torch.uint8))
    return Panels(torch.cat(parts, 2), rows, form)


def _padded(values: Tensor, panels: int) -> Tensor:
    missing = panels * ROWS - len(values)
    return (
        values if not missing else torch.cat((values, values.new_zeros(missing, values.shape[1])))
    )


def rows_of(weight: Panels, ids: Tensor) -> Tensor:
    """The rows `ids` [T] int64, dequantized: [T, K] float32. An embedding."""
    form = weight.format
    found, lane = weight.data[ids // ROWS], (ids % ROWS)[:, None, None, None]
    codes = found[:, :, : form.code_bytes].unflatten(2, (-1, ROWS))
    codes = codes.gather(3, lane.expand(*codes.shape[:3], 1))[..., 0]
    codes = (
        torch.stack((codes & 15, codes >> 4), -1).flatten(2)
        if form.bits == 4
        else codes.view(torch.int8)
    )
    scale, minimum = (_scales(weight, found, which, lane) for which in (0, 1))
    out = codes.float().mul_(scale)
    return (out.add_(minimum) if form.minima else out).flatten(1)


def _scales(weight: Panels, found: Tensor, which: int, lane: Tensor) -> Tensor:
    """[T, groups, 1] float32 of found [T, groups, bytes]: scales (0) or minima (1)."""
    form = weight.format
    first = form.code_bytes + (which if form.minima else 0) * form.scale_bytes
    values = (
        found[:, :, first : first + form.scale_bytes]
        .contiguous()
        .view(torch.float16 if form.half else torch.float32)
    )
    return values.gather(2, lane[..., 0].expand(*values.shape[:2], 1)).float()
