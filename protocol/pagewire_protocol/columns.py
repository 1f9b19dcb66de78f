"""The scalar types of the wire, their bounds, and columns: `bytes` fields that are little-endian
arrays with one entry a row.

`pack` and `unpack` convert columns without numpy, since the frontend imports none.
"""

from array import array
from collections.abc import Iterable
from typing import Annotated, Final

from msgspec import Meta

MAX_ROWS: Final = 65_536
MAX_TOKENS: Final = 4_194_304
MAX_TEXT: Final = 16_777_216
MAX_CACHE_SALT: Final = 128
"""Characters."""

Rid = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""A request, chosen at random by the frontend that owns it; the same over all attempts."""
Attempt = Annotated[int, Meta(ge=1, le=2**32 - 1)]
"""Grows with every resubmission of a request."""
Handle = Annotated[int, Meta(ge=0, le=2**32 - 1)]
"""The receiver's own short name for a request, never reused within an incarnation."""
Execution = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""One placement of one attempt on one worker: epoch (20 bits), then a counter (43 bits). Unique
over schedulers."""
Epoch = Annotated[int, Meta(ge=1, le=2**20 - 1)]
"""A scheduler's reign, counted in its lock file."""
Incarnation = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""One life of one process."""
Count = Annotated[int, Meta(ge=0, le=2**62)]
Name = Annotated[str, Meta(max_length=256)]
Inbox = Annotated[str, Meta(min_length=1, max_length=256)]
ShortText = Annotated[str, Meta(max_length=4096)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
CacheSalt = Annotated[str, Meta(max_length=MAX_CACHE_SALT)]
"""Requests of different salts share no cached blocks."""

RowsI32 = Annotated[bytes, Meta(max_length=4 * MAX_ROWS)]
RowsU32 = Annotated[bytes, Meta(max_length=4 * MAX_ROWS)]
RowsU64 = Annotated[bytes, Meta(max_length=8 * MAX_ROWS)]
RowsU8 = Annotated[bytes, Meta(max_length=MAX_ROWS)]
TokensI32 = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
TokensF32 = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
TokenBytes = Annotated[bytes, Meta(max_length=4096)]


def pack(code: str, values: Iterable[int] | Iterable[float]) -> bytes:
    """A column of `values` as bytes. `code` is an `array` type code: i (int32), I (uint32), Q
    (uint64), f (float32)."""
    return array(code, values).tobytes()


def unpack(code: str, column: bytes) -> memoryview:
    """The inverse of `pack`, without a copy. Raises TypeError when the length is no multiple of the
    item size."""
    return memoryview(column).cast(code)  # type: ignore[call-overload]
