"""The formats that quantized weights have in panels (`cpu_panels`), for those who compile for them.
Needs no torch."""

from dataclasses import dataclass
from typing import Final

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
    def name(self) -> str:
        return f"{self.bits}x{self.group}{'h' if self.half else ''}{'m' if self.minima else ''}"

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
