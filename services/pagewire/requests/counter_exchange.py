"""The counts of all frontends of a stack: each leaves its own in the run directory, and whoever is
asked adds them up.

Several processes share one listening socket, so a scraper reaches any of them; what it reads must
not depend on which. Counts of a frontend that is gone leave the sum, as they would with a process
of its own. Knows files and Tallies, nothing of how they are published.
"""

import contextlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from .counters import Counters, Histogram

PREFIX: Final = "tally-"
Plain = dict[str, int | dict[str, int] | tuple[float, list[int]]]
"""Numbers, numbers by name, and histograms as (sum, counts)."""
_decoder: Final = msgspec.json.Decoder(Plain)
_WRONG: Final = (
    OSError,
    msgspec.MsgspecError,
    UnicodeDecodeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
)


class CounterExchange:
    def __init__(self, run_dir: Path, incarnation: int, tally: Counters) -> None:
        self._run_dir, self._tally = run_dir, tally
        self._file = run_dir / f"{PREFIX}{incarnation:016x}"
        self._left = b""

    def leave(self) -> None:
        """For the others; call now and then. A full disk must not end a frontend: the others then
        read older counts."""
        content = msgspec.json.encode(dump(self._tally))
        if content != self._left:
            fresh = self._file.with_suffix(".new")
            with contextlib.suppress(OSError):
                fresh.write_bytes(content)
                fresh.replace(self._file)
                self._left = content

    def whole(self, incarnations: Set[int]) -> Counters:
        """A new Counters of this frontend and of those others of `incarnations` that have left
        theirs."""
        total = Counters()
        add(total, dump(self._tally))
        for incarnation in incarnations:
            file = self._run_dir / f"{PREFIX}{incarnation:016x}"
            if file != self._file:
                with contextlib.suppress(*_WRONG):
                    add(total, _decoder.decode(file.read_bytes()))
        return total

    def forget(self) -> None:
        for file in (self._file, self._file.with_suffix(".new")):
            with contextlib.suppress(OSError):
                file.unlink()


def dump(tally: Counters) -> Plain:
    plain: Plain = {}
    for name, value in vars(tally).items():
        if isinstance(value, Histogram):
            plain[name] = (value.sum, value.counts)
        elif isinstance(value, int):
            plain[name] = value
        elif isinstance(value, dict):
            counts = cast(Mapping[object, int], value)
            plain[name] = {str(key): count for key, count in counts.items()}
    return plain


def add(total: Counters, plain: Plain) -> None:
    """Add what `dump` made to `total`. Raises one of _WRONG for anything else."""
    for name, value in plain.items():
        mine: Any = vars(total)[name]
        if isinstance(value, tuple):
            mine.counts = [a + b for a, b in zip(mine.counts, value[1], strict=True)]
            mine.sum += value[0]
        elif isinstance(value, dict):
            for text, count in value.items():
                key: Any = int(text) if name == "responses" else text
                mine[key] = mine.get(key, 0) + count
        else:
            setattr(total, name, mine + value)
