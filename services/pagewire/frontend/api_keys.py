"""The file of API keys (--api-keys-file): whose they are and what each may use. Knows TOML and
files, no requests.

    [[key]]
    name = "alice"                  # shown in /metrics and in the log
    sha256 = "2bb80d537b1da3e3…"    # of the key; the file does not hold the key itself
    requests_per_minute = 60        # these are optional; 0, or left out: no limit
    tokens_per_minute = 100000      # of prompts and answers together
    parallel = 4                    # requests at a time
    priority = 0                    # as in requests: lower goes first
"""

import logging
import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

log = logging.getLogger("pagewire.frontend")
MAX_INT32 = 2**31 - 1
Limit = Annotated[int, Meta(ge=0, le=2**53)]


class ApiKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One key. Limits of 0: none."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}$")]
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0
    parallel: Limit = 0
    priority: Annotated[int, Meta(ge=-MAX_INT32, le=MAX_INT32)] = 0

    @property
    def tenant(self) -> str:
        """The hash of the key, as `Auth` has it."""
        return self.sha256.lower()


class KeysDocument(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    key: list[ApiKey] = []


def read_keys(path: str) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises ValueError with one line that names the file and what is wrong."""
    try:
        document: Any = tomllib.loads(Path(path).read_text())
        keys = msgspec.convert(document, KeysDocument).key
    except OSError as error:
        raise ValueError(
            f"--api-keys-file: {path} cannot be read: {error.strerror or error}"
        ) from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-keys-file: {path}: {error}") from None
    for what in ("name", "tenant"):
        ((value, count),) = Counter(getattr(key, what) for key in keys).most_common(1) or [("", 1)]
        if count > 1:
            shown = "sha256" if what == "tenant" else what
            raise ValueError(f"--api-keys-file: {path}: {count} keys have the {shown} {value!r}")
    return tuple(keys)


class KeysFile:
    """A file of keys that is read again when it changes. Raises ValueError where it cannot be read
    at first."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._state = self._stat()
        self.keys = read_keys(path)

    def changed(self) -> bool:
        """Whether `keys` are new ones. A file that cannot be read changes nothing, and is
        logged."""
        state = self._stat()
        if state == self._state:
            return False
        self._state = state
        try:
            keys = read_keys(self._path)
        except ValueError as error:
            log.error("%s; the keys stay as they were", error)
            return False
        if keys == self.keys:
            return False
        self.keys = keys
        log.info("%d keys of %s", len(keys), self._path)
        return True

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = Path(self._path).stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino
