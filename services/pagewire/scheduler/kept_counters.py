"""The scheduler's counters over its lives: what is shown in /metrics must not fall because a
scheduler was started again. Knows a file, nothing of who shows them."""

import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Final, cast

import msgspec

from pagewire.requests.counters import Histogram

from .worker_state import Counters

FILE: Final = "counters-scheduler"
"""In the run directory."""
_decoder: Final = msgspec.json.Decoder(dict[str, int | float | list[int]])


class KeptCounters:
    """Where the counters of a stack's scheduler lie between two lives."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._written = b""

    def load(self, counters: Counters) -> int:
        """Add the former lives' counts to `counters`. Returns the deaths of services that they had
        counted. A file that cannot be read counts nothing."""
        try:
            kept = _decoder.decode(self._path.read_bytes())
            for entry in fields(counters):
                value = getattr(counters, entry.name)
                if isinstance(value, Histogram):
                    value.counts = [int(count) for count in cast(list[int], kept[entry.name])]
                    value.sum = cast(float, kept[f"{entry.name}_sum"])
                else:
                    setattr(counters, entry.name, kept[entry.name])
            return int(cast(int, kept["deaths"]))
        except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError):
            return 0

    def save(self, counters: Counters, deaths: int) -> None:
        """Before anyone is told of them: what was shown once is not taken back."""
        content: dict[str, object] = {"deaths": deaths}
        for entry in fields(counters):
            value = getattr(counters, entry.name)
            if isinstance(value, Histogram):
                content |= {entry.name: value.counts, f"{entry.name}_sum": value.sum}
            else:
                content[entry.name] = value
        encoded = msgspec.json.encode(content)
        if encoded == self._written:
            return
        fresh = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            fresh.write_bytes(encoded)
            fresh.replace(self._path)
            self._written = encoded
