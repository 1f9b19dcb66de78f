"""The counters of all frontends of a stack: each publishes its own as a file in the run directory,
and whoever is asked adds them up.

Several processes share one address, so a scraper reaches any of them; what it reads must not depend
on which. Nor may it fall when one of them ends, however it ends: Prometheus takes a count that
falls for one that has begun anew, and adds all of it again. So the counts of frontends that are
gone stay in the sum: their files, which `fold` joins in one file now and then. Knows files and
Counters, nothing of how they are shown.
"""

import contextlib
import fcntl
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from .counters import Counters, Histogram

PREFIX: Final = "counters-"
GONE: Final = "counters-gone"
"""Holds the sum over frontends that are gone, and which these are."""
UNITS: Final = 2**20
"""Of a second, in sums of times. Those of several frontends are added in another order once one of
them is gone, and a float that then differs in its last bit may be lower than the one shown before,
which Prometheus takes for a count that begins anew."""
REMEMBERED: Final = 1024
"""How many names of folded files are kept. A reader that read these files before they were folded,
and the sum after, knows by their names that the sum has them."""
RUNNING: Final = "running "
"""Begins the names of those counts of API keys that are no counts: what runs ends with its
frontend."""
Plain = dict[str, int | float | dict[str, int] | tuple[float, list[int]]]
"""Numbers, numbers by name, and histograms as (sum, counts)."""


class Gone(msgspec.Struct):
    """The content of the file GONE."""

    folded: list[str] = []
    """Names of the files whose counts were added last, the latest at the end."""
    total: Plain = {}


_decoder: Final = msgspec.json.Decoder(Plain)
_gone_decoder: Final = msgspec.json.Decoder(Gone)
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
        self._file = _file_of(run_dir, incarnation)
        self._gone = run_dir / GONE
        self._published = b""

    def publish(self) -> None:
        """Write this frontend's counters; call now and then, and before they are shown: what was
        shown once must be in the file when this process is killed. A full disk must not end a
        frontend: the others then read older counts."""
        self._counters.cpu_seconds = time.process_time()
        content = msgspec.json.encode(dump(self._counters))
        if content != self._published and _write(self._file, content):
            self._published = content

    def total(self, living: Collection[int]) -> Counters:
        """New Counters: this frontend's, and those of all others of the run directory, gone or not.
        `living`: the incarnations of those that are there."""
        contents: dict[Path, bytes] = {}
        for file in _published(self._run_dir):
            if file != self._file:
                # One that vanished since the files were listed is in the sum, which is read last.
                with contextlib.suppress(OSError):
                    contents[file] = file.read_bytes()
        gone = _gone_of(_read(self._gone))
        total = Counters()
        add(total, dump(self._counters))
        with contextlib.suppress(*_UNREADABLE):
            add(total, gone.total)
        alive = {_file_of(self._run_dir, one) for one in living}
        for file, content in contents.items():
            if file.name not in gone.folded:
                with contextlib.suppress(*_UNREADABLE):
                    plain = _decoder.decode(content)
                    add(total, plain if file in alive else without_gauges(plain))
        return total

    def fold(self, living: Callable[[], Collection[int]]) -> None:
        """Join the files of frontends that are gone for good. `living` gives the incarnations of
        those that are not, this one included, whether they have published anything or not."""
        lock = self._run_dir / f"{GONE}.lock"
        with contextlib.suppress(OSError), lock.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = _gone_of(_read(self._gone))
            published = _published(self._run_dir)
            # Asked after the files were listed: whose file is there was alive when it was written.
            kept = {_file_of(self._run_dir, one) for one in living()}
            files = [file for file in published if file not in kept]
            total = Counters()
            with contextlib.suppress(*_UNREADABLE):
                add(total, gone.total)
            for file in files:
                if file.name not in gone.folded:
                    with contextlib.suppress(*_UNREADABLE):
                        add(total, without_gauges(_decoder.decode(file.read_bytes())))
            names = {file.name for file in files}
            earlier = [name for name in gone.folded if name not in names]
            remembered = earlier[-REMEMBERED:] + sorted(names)
            content = msgspec.json.encode(Gone(remembered, dump(total)))
            # First the sum that has them, then their files: a reader never finds them in neither.
            if files and _write(self._gone, content):
                for file in files:
                    file.unlink(missing_ok=True)


def _file_of(run_dir: Path, incarnation: int) -> Path:
    return run_dir / f"{PREFIX}{incarnation:016x}"


def _published(run_dir: Path) -> list[Path]:
    """The files of all frontends, living or gone."""
    names = sorted(run_dir.glob(f"{PREFIX}{'[0-9a-f]' * 16}"))
    return [path for path in names if not path.suffix]


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def _gone_of(content: bytes) -> Gone:
    with contextlib.suppress(msgspec.MsgspecError):
        return _gone_decoder.decode(content)
    return Gone()


def _write(path: Path, content: bytes) -> bool:
    """Whether it could be written; a reader finds the old content or the new one."""
    fresh = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        fresh.write_bytes(content)
        fresh.replace(path)
        return True
    return False


def _whole(value: float) -> float:
    """A multiple of 1 / UNITS, so that sums are exact, whatever the order."""
    return math.floor(value * UNITS) / UNITS


def dump(counters: Counters) -> Plain:
    """All counts as plain values, for `add`."""
    plain: Plain = {}
    for name, value in vars(counters).items():
        if isinstance(value, Histogram):
            plain[name] = (_whole(value.sum), value.counts)
        elif isinstance(value, float):
            plain[name] = _whole(value)
        elif isinstance(value, int):
            plain[name] = value
        elif isinstance(value, dict):
            plain[name] = dict(cast(Mapping[str, int], value))
    return plain


def without_gauges(plain: Plain) -> Plain:
    """`plain` without what counts only as long as its frontend lives."""
    usage = cast(Mapping[str, int], plain.get("key_usage", {}))
    kept = {name: count for name, count in usage.items() if not name.startswith(RUNNING)}
    return {**plain, "key_usage": kept}


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
