"""Where compiled kernels are kept: on disk, so that the second start compiles nothing. To be set
before one is compiled. Needs no torch."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pagewire_kernels import cpu_native

from ...hub.huggingface import cache_dir

log = logging.getLogger("pagewire.worker")
VARIABLE: Final = "TRITON_CACHE_DIR"


def usual() -> Path:
    """What the user named, else a directory in the user's cache. Raises RuntimeError where there is
    no home."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else cache_dir() / "triton"


def prepare(run_dir: Path) -> Path:
    """Make the directory and point Triton at it. Where it cannot be written, one below `run_dir`
    serves, for as long as that exists."""
    try:
        directory = usual()
        try_writing(directory)
    except (OSError, RuntimeError) as error:
        directory = run_dir / "triton"
        log.warning(
            "compiled kernels cannot be kept (%s): they go to %s; set %s to a directory that stays",
            error,
            directory,
            VARIABLE,
        )
        try_writing(directory)
    os.environ[VARIABLE] = str(directory)
    return directory


def try_writing(directory: Path) -> None:
    """Makes the directory. Raises OSError where nothing can be kept in it."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def keep_native() -> None:
    """The CPU's go to the user's cache, or where that cannot be written to a directory of this
    user's for as long as the machine runs."""
    try:
        directory = cache_dir() / "native" / cpu_native.digest()
        try_writing(directory)
    except (OSError, RuntimeError):
        directory = Path(f"/tmp/pagewire-{os.getuid()}") / "native" / cpu_native.digest()
        try_writing(directory)
    cpu_native.keep_in(directory)


def compiled(directory: Path) -> int:
    """How many kernels are there: each has its binary in a directory of its own."""
    return sum(1 for _ in directory.glob("*/*.cubin"))


@contextlib.contextmanager
def kept(run_dir: Path) -> Iterator[None]:
    """What is compiled inside is found again by the next start; says how much that was."""
    directory = prepare(run_dir)
    before = compiled(directory)
    yield
    now = compiled(directory)
    log.info("%d kernels compiled, %d found in %s", now - before, before, directory)
