"""The counters of all frontends of a stack: each publishes its own as a file in the run directory,
and whoever is asked adds them up.

Several processes share one listening socket, so a scraper reaches any of them; what it reads must
not depend on which. Counts of a frontend that is gone leave the sum, as they would with a process
of its own. Knows files and Counters, nothing of how they are shown.
"""

import contextlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from .counters import Counters, Histogram

PREFIX: Final = "counters-"
Plain = dict[str, int | dict[str, int] | tuple[float, list[int]]]
"""Numbers, numbers by name, and histograms as (sum, counts)."""
_decoder: Final = msgspec.json.Decoder(Plain)
_UNREADABLE: Final = (
    OSError,
    msgspec.MsgspecError,
    UnicodeDecodeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
)
"""What a file that is missing, cut off or of another version raises."""


class CounterExchange:
    """This frontend's way to the counters of the others."""

    def __init__(self, run_dir: Path, incarnation: int, counters: Counters) -> None:
        self._run_dir = run_dir
        self._counters = counters
        self._file = run_dir / f"{PREFIX}{incarnation:016x}"
        self._published = b""

    def publish(self) -> None:
        """Write this frontend's counters; call now and then. A full disk must not end a frontend:
        the others then read older counts."""
        content = msgspec.json.encode(dump(self._counters))
        if content == self._published:
            return
        fresh = self._file.with_suffix(".new")
        with contextlib.suppress(OSError):
            fresh.write_bytes(content)
            fresh.replace(self._file)
            self._published = content

    def total(self, incarnations: Set[int]) -> Counters:
        """New Counters: this frontend's, and those of the others of `incarnations` that have
        published theirs."""
        total = Counters()
        add(total, dump(self._counters))
        for incarnation in incarnations:
            file = self._run_dir / f"{PREFIX}{incarnation:016x}"
            if file != self._file:
                with contextlib.suppress(*_UNREADABLE):
                    add(total, _decoder.decode(file.read_bytes()))
        return total

    def remove(self) -> None:
        """Take this frontend's counters back."""
        for file in (self._file, self._file.with_suffix(".new")):
            with contextlib.suppress(OSError):
                file.unlink()


def dump(counters: Counters) -> Plain:
    """All counts as plain values, for `add`."""
    plain: Plain = {}
    for name, value in vars(counters).items():
        if isinstance(value, Histogram):
            plain[name] = (value.sum, value.counts)
        elif isinstance(value, int):
            plain[name] = value
        elif isinstance(value, dict):
            plain[name] = dict(cast(Mapping[str, int], value))
    return plain


def add(total: Counters, plain: Plain) -> None:
    """Add what `dump` made to `total`. Raises one of _UNREADABLE for anything else."""
    for name, value in plain.items():
        mine: Any = vars(total)[name]
        if isinstance(value, tuple):
            mine.counts = [a + b for a, b in zip(mine.counts, value[1], strict=True)]
            mine.sum += value[0]
        elif isinstance(value, dict):
            for key, count in value.items():
                mine[key] = mine.get(key, 0) + count
        else:
            setattr(total, name, mine + value)
