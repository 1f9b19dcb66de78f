"""Which errors speak for themselves, and the line that a process leaves of the one that ended it.
Only the standard library is imported here."""

import os
from typing import Final

EXPECTED: Final = (ValueError, OSError, MemoryError)
"""Errors whose message alone tells a user what to do; any other is a defect and keeps its
traceback."""


def missing_package(error: ModuleNotFoundError) -> str:
    """Pagewire alone, without the packages that its services need, can be installed as well."""
    return f"{error.name or error} is not installed; `pip install 'pagewire[all]'` (in a clone '.[all]') brings all that Pagewire needs"


def how_to_read(path: str) -> str:
    """What to do about a file or directory that may not be read; in a container, files of the host
    belong to users that it does not have."""
    return f"user {os.getuid()} must be able to read it, which `chmod -R a+rX {path}` allows"


def error_line(error: Exception, expected: tuple[type[Exception], ...] = EXPECTED) -> str:
    """One line. Those of `expected` speak for themselves; any other error is a defect, whose type
    says something too."""
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, PermissionError) and error.filename:
        path = os.path.abspath(os.fsdecode(error.filename))
        if not os.access(path, os.R_OK):
            return f"{error.strerror}: {path}; {how_to_read(path)}"
    line = next(iter(str(error).strip().splitlines()), "")
    return line if line and isinstance(error, expected) else f"{type(error).__name__}: {line}"
