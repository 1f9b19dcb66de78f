"""`pagewire serve` whose fake workers end at once, as in a fault of a kernel, when they compute a
prompt that begins with POISON. Run as a program, with the flags of `pagewire serve`."""

import os
import sys
from typing import Any, Final

from pagewire import cli
from pagewire.launch import supervisor
from pagewire.worker.fake import FakeRunner
from pagewire_protocol.columns import pack
from pagewire_protocol.messages import Step
from pagewire_protocol.structs import Admission

POISON: Final = 666
STATUS: Final = 139
"""What a shell says of a segmentation fault."""


def poison_workers() -> None:
    """Slots are poisoned by what is admitted to them, and end the process when a step runs them."""
    poisoned: set[int] = set()
    admit, rows = FakeRunner._admit, FakeRunner._rows

    def watched_admit(self: FakeRunner, admission: Admission) -> None:
        admit(self, admission)
        is_poison = admission.prompt[:4] == pack("i", [POISON])
        (poisoned.add if is_poison else poisoned.discard)(admission.slot)

    def watched_rows(self: FakeRunner, step: Step) -> Any:
        slots, counts = rows(self, step)
        if poisoned & set(slots.tolist()):
            os._exit(STATUS)
        return slots, counts

    FakeRunner._admit, FakeRunner._rows = watched_admit, watched_rows


def command_of(service: supervisor.Service) -> list[str]:
    """Workers are this program again."""
    start = [__file__] if service.kind == "worker" else ["-m", "pagewire"]
    return [sys.executable, *start, *service.arguments]


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        poison_workers()
    else:
        supervisor.command_of = command_of
    sys.exit(cli.main(sys.argv[1:]))
