"""What a rank knows of a group that spans several hosts. Only the standard library is imported
here."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

HOSTS_VARIABLE: Final = "PAGEWIRE_HOSTS"
"""Names, in the environment of a rank, its Hosts; not there where the group is on one host."""


@dataclass(frozen=True)
class Hosts:
    """nodes: the number of each rank's host. address: by which this rank's host is reached.
    store_host, store_port: where the ranks find each other. listen_fd: of rank 0, the socket that
    listens there; -1 of others."""

    nodes: tuple[int, ...]
    address: str
    store_host: str
    store_port: int
    listen_fd: int = -1

    def as_variable(self) -> str:
        """For the environment of the rank's process."""
        return json.dumps(asdict(self))

    @classmethod
    def inherited(cls) -> "Hosts | None":
        """Of this process, None where its group is on one host. Taken once."""
        text = os.environ.pop(HOSTS_VARIABLE, "")
        if not text:
            return None
        fields = json.loads(text)
        return cls(**{**fields, "nodes": tuple(fields["nodes"])})

    def local(self, rank: int) -> tuple[int, int]:
        """(the number of `rank` among those of its host, how many these are)."""
        before = self.nodes[:rank].count(self.nodes[rank])
        return before, self.nodes.count(self.nodes[rank])

    def are_together(self, ranks: Iterable[int]) -> bool:
        """Whether one host has all of `ranks`."""
        return len({self.nodes[rank] for rank in ranks}) == 1
