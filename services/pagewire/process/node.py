"""One process's place in a stack: the run directory, its incarnation, the sockets by which it is
reached and reaches others, and its membership.

Used by every process but the scheduler, whose inbox has a well-known address. Knows no message but
those of membership.
"""

import gc
import os
from pathlib import Path
from typing import Final, Generic, TypeVar

from pagewire_protocol.channels import Inbox, Outbox, new_incarnation, prepare_run_dir
from pagewire_protocol.messages import Role

from . import liveness
from .membership import Membership

M = TypeVar("M")
"""What the role receives: ToFrontend, ToTokenizer or ToWorker."""
MANY_OBJECTS: Final = (50_000, 50, 50)
"""Thresholds of the garbage collector for a loop whose messages are many objects without cycles."""


class Node(Generic[M]):
    """A bound inbox under a fresh incarnation, an outbox without connections, and a membership that
    has said nothing yet.

    `name` stays the same over restarts; empty: made of the role and the process id. `group`, `rank`
    and `group_size` say which processes run one model together. Raises PermissionError and
    ValueError for a run directory that cannot be used.
    """

    def __init__(
        self,
        run_dir: str | Path,
        role: Role,
        name: str = "",
        group: str = "",
        rank: int = 0,
        group_size: int = 1,
    ) -> None:
        self.run_dir = prepare_run_dir(str(run_dir))
        self.incarnation = new_incarnation()
        liveness.own.introduce(self.incarnation)
        self.inbox: Inbox[M] = Inbox(self.run_dir, role, self.incarnation)
        self.outbox = Outbox()
        self.membership = Membership(
            role,
            name or f"{role.name.lower()}-{os.getpid()}",
            self.incarnation,
            self.inbox,
            self.outbox,
            self.run_dir,
            group,
            rank,
            group_size,
        )

    def close(self, linger_ms: int = 0) -> None:
        """Close both sockets; what is queued gets `linger_ms` milliseconds to leave."""
        self.inbox.close()
        self.outbox.close(linger_ms)


def settle_gc(thresholds: tuple[int, int, int] | None = None) -> None:
    """Call once a process is ready: what it has made so far stays, so the garbage collector need
    not look at it again. `thresholds`: new ones for what comes."""
    gc.collect()
    gc.freeze()
    if thresholds is not None:
        gc.set_threshold(*thresholds)
