"""Memory that every rank of a host can address, and what collective kernels keep in it.

Each rank has one region, laid out alike: signal pads, packed words, two data buffers. Kernels get
the regions' addresses as a table on the device. `make_regions` gets such memory from CUDA; whoever
can address memory of other processes in some other way makes a SymmetricMemory of it directly.
Knows no collective operation.

Every launch of a collective kernel is a generation, counted on the device: arguments of a captured
launch are fixed, and its replays have to differ. Generation g uses the buffers g % 2. A rank begins
generation g + 2 when it has seen every other rank in g + 1, and no rank begins g + 1 before its own
kernel of g has ended: nobody still reads what is overwritten, and no kernel has to wait at its end.
Signals are generations as well, so that no pad is ever reset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from triton import next_power_of_2

PHASES: Final = 2
"""Signals that one launch can give."""
ALIGNMENT: Final = 256
LIMIT, FAILED, GENERATIONS = range(3)
"""Places in `control`: the time limit of a wait in nanoseconds, the code of the first wait that
reached it, and from there on the generation of each program."""
POLLS_A_LOOK: Final = 256
"""Polls of a wait between two looks at the clock."""


@dataclass(frozen=True)
class Layout:
    """Of a region. `size`: ranks; `programs`: the most of a launch, a power of two; `packed_bytes`:
    the most bytes of a tensor that go as packed words; `buffer_bytes`: of each of the two data
    buffers."""

    size: int
    programs: int = 128
    packed_bytes: int = 1 << 18
    buffer_bytes: int = 1 << 24

    def __post_init__(self) -> None:
        if self.programs != next_power_of_2(self.programs):
            raise ValueError(f"programs is {self.programs}, and must be a power of two")
        for name, value in (("packed", self.packed_bytes), ("buffer", self.buffer_bytes)):
            if value % ALIGNMENT:
                raise ValueError(f"{name}_bytes is {value}, and must be a multiple of {ALIGNMENT}")

    @property
    def words_at(self) -> int:
        """Offset of the packed words: int64 [2, size, packed_bytes / 4], by the rank that wrote."""
        pads = PHASES * self.programs * self.size * 8
        return -(-pads // ALIGNMENT) * ALIGNMENT

    @property
    def data_at(self) -> int:
        """Offset of the data buffers: bytes [2, buffer_bytes]."""
        return self.words_at + 2 * self.size * self.packed_bytes * 2

    @property
    def packed_area(self) -> tuple[int, int]:
        """(offset of the packed words, the most words of one rank)."""
        return self.words_at, self.packed_bytes // 4

    @property
    def buffer_area(self) -> tuple[int, int]:
        """(offset of the data buffers, bytes of one)."""
        return self.data_at, self.buffer_bytes

    @property
    def nbytes(self) -> int:
        """Of a region."""
        return self.data_at + 2 * self.buffer_bytes


@dataclass(frozen=True)
class SymmetricMemory:
    """One rank's view of the regions of all. peers int64 [size]: their addresses, as this rank's
    device has them; control int64 [GENERATIONS + programs], this rank's alone; report int64 [1]:
    memory of the host that kernels can write. `kept`: what holds the regions' memory."""

    rank: int
    layout: Layout
    peers: Tensor
    control: Tensor
    report: Tensor
    kept: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.layout.size

    @property
    def polls_a_look(self) -> int:
        """On a CPU, in Triton's interpreter, a poll takes long itself."""
        return 2 if self.peers.device.type == "cpu" else POLLS_A_LOOK

    def set_timeout(self, timeout_s: float) -> None:
        """How long a kernel waits for other ranks; holds for captured launches too."""
        self.control[LIMIT] = int(timeout_s * 1e9)

    @property
    def failure(self) -> int:
        """0, or the code that a kernel has left which waited for too long. Does not wait for the
        device."""
        return int(self.report.item())

    def launch(
        self,
        kernel: Any,
        pieces: int,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float],
        **options: Any,
    ) -> None:
        """Start a collective kernel with a program for each of `pieces`, as far as there may be so
        many. Its arguments are `tensors`, then peers, control, report and rank of this memory, then
        `numbers`; compiled for `options` and for what this memory is."""
        programs = self.layout.programs
        kernel[(max(1, min(programs, pieces)),)](
            *tensors,
            self.peers,
            self.control,
            self.report,
            self.rank,
            *numbers,
            SIZE=self.size,
            PAD=next_power_of_2(self.size),
            PROGRAMS=programs,
            POLLS=self.polls_a_look,
            **options,
        )


def make(
    rank: int,
    layout: Layout,
    addresses: Sequence[int],
    device: torch.device,
    timeout_s: float,
    kept: tuple[Any, ...] = (),
) -> SymmetricMemory:
    """`addresses`: of the regions, by rank. They must hold zeros before any rank launches a
    kernel."""
    peers = torch.tensor(addresses, dtype=torch.int64, device=device)
    control = torch.zeros(GENERATIONS + layout.programs, dtype=torch.int64, device=device)
    report = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
    memory = SymmetricMemory(rank, layout, peers, control, report, kept)
    memory.set_timeout(timeout_s)
    return memory
