"""A tensor over memory that is not its own: what a captured graph writes can be read without
keeping that memory from the next capture.

Graphs of one pool may share memory, since they are replayed one after the other on one stream. But
a tensor that outlives its capture keeps its block: the logits of all buckets together would be
gigabytes.
"""

from typing import Any

import torch
from torch import Tensor


class _Memory:
    """The bytes of a tensor, in the form that torch takes from other libraries. It does not hold
    the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """The same values at the same place, valid until the graph that wrote them, or another one of
    its pool, is replayed. `tensor` is contiguous and on a GPU; the graph must be kept, and with it
    the pool."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous"
        )
    return (
        torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)
    )
