"""Why a service ends, in its own words: printed as its last line, and left where the process that
started it can read them after its end. Only the standard library is imported here."""

import mmap
import sys
from typing import Final

PAGE_BYTES: Final = 1024

_page: mmap.mmap | None = None


def new_page() -> mmap.mmap:
    """Memory for the words of one child that is forked after this call."""
    return mmap.mmap(-1, PAGE_BYTES)


def leave_in(page: mmap.mmap) -> None:
    """From now on what `say` prints is left in `page` as well."""
    global _page
    _page = page


def say(service: str, line: str) -> None:
    """Print why this service ends."""
    print(f"pagewire {service}: {line}", file=sys.stderr, flush=True)
    if _page is not None:
        text = line.encode(errors="replace")[: PAGE_BYTES - 1]
        _page[: len(text) + 1] = text + b"\0"


def read(page: mmap.mmap) -> str:
    """What was left there; empty where it was nothing."""
    return page[:].partition(b"\0")[0].decode(errors="replace")
