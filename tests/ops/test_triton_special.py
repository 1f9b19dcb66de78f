"""Rows with limits and penalties through the real kernels: logits of minus infinity, counts that
the host never sees."""

from pagewire.worker.gpu.resample import KERNELS
from worker.special_rows import Rows


def test_special_rows_with_the_gpus_kernels() -> None:
    rows = Rows(7, KERNELS)
    for _ in range(8):
        rows.step()
