"""The prefix groups (rows with common leading blocks) that captured steps read, in buffers that
never move.

Knows the wire form and the kernel's; which steps may use them is the graphs' decision.
"""

import numpy as np
import numpy.typing as npt
import torch
from pagewire_kernels.cascade import Groups
from pagewire_protocol.agreed import MAX_PREFIX_GROUPS
from pagewire_protocol.messages import Shared

from ..step.slots import BadStep
from .staging import Uploads


class GroupBuffers:
    """Room for MAX_PREFIX_GROUPS groups among `max_rows` rows."""

    def __init__(self, max_rows: int, device: torch.device | str) -> None:
        self._rows = torch.zeros(2, max_rows, dtype=torch.int32, device=device)
        """order and shared of `Groups`."""
        self._groups = torch.zeros(2, MAX_PREFIX_GROUPS + 4, dtype=torch.int32, device=device)
        """starts and lengths; rows of a multiple of 16 bytes, since Triton compiles a kernel anew
        for pointers that are not."""
        self._loaded = False

    def first(self, rows: int) -> Groups:
        """The groups as the kernel takes them, for a step of `rows` rows."""
        starts = self._groups[0, : MAX_PREFIX_GROUPS + 1]
        lengths = self._groups[1, :MAX_PREFIX_GROUPS]
        return Groups(self._rows[0, :rows], starts, lengths, self._rows[1, :rows])

    def clear(self) -> None:
        """From now on there are no groups."""
        if self._loaded:
            self._loaded = False
            self._rows.zero_()
            self._groups.zero_()

    def load(self, shared: Shared, rows: int, uploads: Uploads) -> None:
        """From now on the groups are those of `shared`, in a step whose first `rows` rows have one
        new token each. Groups beyond MAX_PREFIX_GROUPS are left to plain decoding. Raises BadStep
        when `shared` is not about such rows."""
        self._loaded = True
        order, starts, lengths = (
            np.frombuffer(column, np.int32)
            for column in (shared.order, shared.starts, shared.lengths)
        )
        _check(order, starts, lengths, rows)
        count = min(len(lengths), MAX_PREFIX_GROUPS)
        members = np.zeros(self._rows.shape, np.int32)
        members[0, : len(order)] = order
        members[1, order[: starts[count]]] = np.repeat(
            lengths[:count], np.diff(starts[: count + 1])
        )
        groups = np.zeros(self._groups.shape, np.int32)
        groups[0] = starts[count]
        groups[0, :count] = starts[:count]
        groups[1, :count] = lengths[:count]
        uploads.up(members, out=self._rows)
        uploads.up(groups, out=self._groups)


def _check(
    order: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    rows: int,
) -> None:
    whole = (
        len(starts) == len(lengths) + 1
        and starts[0] == 0
        and starts[-1] == len(order)
        and bool((np.diff(starts) >= 0).all())
    )
    if not whole or bool((lengths < 0).any()):
        raise BadStep(
            f"groups of rows do not add up: {len(order)} rows, starts {starts.tolist()}, lengths {lengths.tolist()}"
        )
    if len(order) and (
        order.min() < 0 or order.max() >= rows or len(np.unique(order)) < len(order)
    ):
        raise BadStep(f"groups name rows twice or beyond the step's {rows}")
