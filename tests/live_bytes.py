"""How many bytes of tensors exist at a time, seen from outside."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._take(x, given)
        return out

    def _key(self, x: torch.Tensor) -> int:
        return x.untyped_storage()._cdata

    def _take(self, x: torch.Tensor, given: set[int]) -> None:
        key, size = self._key(x), x.untyped_storage().nbytes()
        if not self._holders[key]:
            if key in given:  # a view of a weight
                return
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] += 1
        weakref.finalize(x, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        self.now -= 0 if self._holders[key] else size
