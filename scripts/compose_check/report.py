"""What is printed, and whether all was as promised."""

from typing import Protocol


class Report(Protocol):
    """Where the outcome of a check goes."""

    def check(self, what: str, holds: bool, detail: str = "") -> None:
        """One promise."""
        ...

    def not_run(self, what: str, why: str) -> None:
        """Something that this machine does not allow."""
        ...
