"""Host memory that the GPU copies from and to without the CPU waiting: a pinned arena for what goes
up, pinned rows for what comes back.

Knows nothing of requests. What goes up in one step must fit the arena several times over, so that a
region is not written again while a copy from it is still queued.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ARENA_BYTES = 64 << 20
ALIGNMENT = 256


class Uploads:
    """`up(array)` gives the array on the device, asynchronously. A lap of the arena ends with one
    wait for the stream."""

    def __init__(self, device: str, size: int = ARENA_BYTES) -> None:
        self._device = device
        self._arena = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._bytes = self._arena.numpy()
        self._at = 0

    def staging(self, size: int) -> "Staging":
        """Memory of its own, outside the arena."""
        return Staging(size)

    def up(self, values: npt.NDArray[Any], out: Tensor | None = None) -> Tensor:
        """values, contiguous or not, copied to the device: into `out` when given (same shape and
        dtype)."""
        values = np.ascontiguousarray(values)
        if self._at + values.nbytes > len(self._bytes):
            # A copy from the beginning of the arena may still be queued.
            torch.cuda.current_stream().synchronize()
            self._at = 0
        first = self._at
        last = first + values.nbytes
        self._bytes[first:last] = values.reshape(-1).view(np.uint8)
        self._at = -(-last // ALIGNMENT) * ALIGNMENT
        host = (
            self._arena[first:last]
            .view(torch.from_numpy(values[:0].reshape(0)).dtype)
            .view(values.shape)
        )
        if out is None:
            return host.to(self._device, non_blocking=True)
        return out.copy_(host, non_blocking=True)


class Staging:
    """Pinned memory for what each step brings to the device in one piece, at the same place."""

    def __init__(self, size: int) -> None:
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._copied = torch.cuda.Event()

    def wait(self) -> None:
        """Until what was sent last is on its way no longer, and `host` may be written again."""
        self._copied.synchronize()

    def send(self, size: int, out: Tensor) -> None:
        """The first `size` bytes, to the beginning of `out` on the device; asynchronously."""
        out[:size].copy_(self.host[:size], non_blocking=True)
        self._copied.record()


class Waiter:
    """Calls `wake` from a thread of its own when an event has happened on the GPU, so that the loop
    neither blocks nor spins."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._events: queue.SimpleQueue[torch.cuda.Event] = queue.SimpleQueue()
        self._wake = wake
        threading.Thread(target=self._run, name="gpu-waiter", daemon=True).start()

    def watch(self, event: "torch.cuda.Event") -> None:
        """`wake` is called once `event` has happened."""
        self._events.put(event)

    def _run(self) -> None:
        while True:
            try:
                self._events.get().synchronize()
            except RuntimeError:
                # The loop meets the same CUDA error when it looks at the event, and ends the
                # process with its text.
                self._wake()
                return
            self._wake()
