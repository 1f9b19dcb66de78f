"""The layout of quantized weights on a CPU: panels of 16 rows, in each panel group after group,
everything a group needs in one piece.

    panel p, group g:  codes | 16 scales | 16 minima
    codes of 8 bits:   for each input of the group 16 bytes, one a row
    codes of 4 bits:   for each two inputs 16 bytes, the first in the low halves

So a product reads memory from front to back, sixteen results side by side, whatever the width of
the processor's vectors.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .cpu_format import FORMATS, ROWS, Format
from .quantized import Quantized

AT_A_TIME: Final = 1 << 16
"""Codes that are packed in one go: what that takes stays in a core's cache."""


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
    """One whose groups are the weight's, or parts of them. half: the processor converts float16 by
    itself. Raises ValueError where there is no kernel for the weight."""
    for known in FORMATS:
        fits = (
            known.bits == weight.bits
            and weight.group % known.group == 0
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
    form = choose_format(weight, half)
    rows, columns = weight.shape
    weight = weight.regrouped(form.group)
    panels = -(-rows // ROWS)
    groups = columns // form.group
    data = np.zeros((panels, groups, form.group_bytes), np.uint8)
    threads = torch.get_num_threads()
    shares = [slice(panels * i // threads, panels * (i + 1) // threads) for i in range(threads)]
    list(
        _threads(threads).map(
            lambda share: _pack_codes(weight, form, data[share], share.start * ROWS), shares
        )
    )
    kind = torch.float16 if form.half else torch.float32
    for i, values in enumerate((weight.scale, weight.minimum) if form.minima else (weight.scale,)):
        if values is not None:
            first = form.code_bytes + i * form.scale_bytes
            by_group = (
                _padded(values.to(kind), panels)
                .view(panels, ROWS, groups)
                .numpy()
                .transpose(0, 2, 1)
            )
            data[:, :, first : first + form.scale_bytes].view(by_group.dtype)[...] = by_group
    return Panels(torch.from_numpy(data), rows, form)


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "pack")


def _pack_codes(weight: Quantized, form: Format, out: np.ndarray, first: int) -> None:
    """Codes of the rows from `first` on to their places in panels `out` [panels, groups, bytes of a
    group]."""
    step = max(1, AT_A_TIME // (ROWS * weight.shape[1]))
    for i in range(0, len(out), step):
        _pack_some(weight, form, out[i : i + step], first + i * ROWS)


def _pack_some(weight: Quantized, form: Format, out: np.ndarray, first: int) -> None:
    last = first + len(out) * ROWS
    codes = weight.by_place(first, last, ROWS).view(np.uint8)
    if last > weight.shape[0]:
        codes[:, -1, :, weight.shape[0] - last :] = 0
    parts = len(codes) // form.group
    blocks = codes.shape[2]
    if form.bits == 4:
        codes = codes[::2] | codes[1::2] << 4
    source = codes.reshape(parts, -1, len(out), blocks, ROWS).view(_SIXTEEN)[..., 0]
    place = out.reshape(len(out), blocks, parts, form.group_bytes)[..., : form.code_bytes].view(
        _SIXTEEN
    )
    place[...] = source.transpose(2, 3, 0, 1)


_SIXTEEN: Final = np.dtype((np.void, ROWS))
"""Bytes that numpy copies in one piece."""


def _padded(values: Tensor, panels: int) -> Tensor:
    missing = panels * ROWS - len(values)
    return (
        values if not missing else torch.cat((values, values.new_zeros(missing, values.shape[1])))
    )


def rows_of(weight: Panels, ids: Tensor) -> Tensor:
    """The rows `ids` [T] int64, dequantized: [T, K] float32. An embedding."""
    form = weight.format
    panels = weight.data[ids // ROWS]
    lane = (ids % ROWS)[:, None, None, None]
    codes = panels[:, :, : form.code_bytes].unflatten(2, (-1, ROWS))
    codes = codes.gather(3, lane.expand(*codes.shape[:3], 1))[..., 0]
    codes = (
        torch.stack((codes & 15, codes >> 4), -1).flatten(2)
        if form.bits == 4
        else codes.view(torch.int8)
    )
    scale, minimum = (_scales(weight, panels, which, lane) for which in (0, 1))
    out = codes.float().mul_(scale)
    return (out.add_(minimum) if form.minima else out).flatten(1)


def _scales(weight: Panels, panels: Tensor, which: int, lane: Tensor) -> Tensor:
    """[T, groups, 1] float32 of found [T, groups, bytes]: scales (0) or minima (1)."""
    form = weight.format
    first = form.code_bytes + (which if form.minima else 0) * form.scale_bytes
    values = (
        panels[:, :, first : first + form.scale_bytes]
        .contiguous()
        .view(torch.float16 if form.half else torch.float32)
    )
    return values.gather(2, lane[..., 0].expand(*values.shape[:2], 1)).float()
