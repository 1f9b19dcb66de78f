"""The scalar types of the wire, their bounds, and columns: `bytes` fields that are little-endian
arrays with one entry a row.

`pack` and `unpack` convert columns without numpy, since the frontend imports none.
"""

from array import array
from collections.abc import Iterable
from typing import Annotated, Final, NewType

from msgspec import Meta

MAX_ROWS: Final = 65_536
MAX_TOKENS: Final = 4_194_304
MAX_TEXT: Final = 16_777_216
MAX_VOCABULARY: Final = 4_194_304
"""Tokens: processes keep tables of this length."""
MAX_CACHE_SALT: Final = 128
"""Characters."""
MAX_TOKENS_PER_ROW: Final = 16
"""Most tokens that one row of a step can bring."""

# Numbers that are easily taken for each other have types of their own; a message's field adds the
# bounds.

Rid = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""A request, chosen at random by the frontend that owns it; the same over all attempts."""
Attempt = Annotated[int, Meta(ge=1, le=2**32 - 1)]
"""Grows with every resubmission of a request."""
Handle = Annotated[int, Meta(ge=0, le=2**32 - 1)]
"""A request's number in the process that receives the message, never reused within an
incarnation."""
Execution = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""One placement of one attempt on one worker, made by `execution_id`. Unique over schedulers."""
Epoch = NewType("Epoch", int)
"""The term of one scheduler, counted in its lock file: a later scheduler has a higher one."""
Incarnation = NewType("Incarnation", int)
"""One life of one process."""
FIRST_INCARNATION: Final = Incarnation(1)
"""For a runner that is used without a process of its own."""
Slot = NewType("Slot", int)
"""A place for one running request on one worker."""
BlockId = NewType("BlockId", int)
"""A block of one worker's KV cache."""
EpochField = Annotated[Epoch, Meta(ge=1, le=2**20 - 1)]
IncarnationField = Annotated[Incarnation, Meta(ge=1, le=2**63 - 1)]
SlotField = Annotated[Slot, Meta(ge=0, le=MAX_ROWS)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
TimeoutMs = Annotated[int, Meta(ge=0, le=2**31 - 1)]
VocabSize = Annotated[int, Meta(ge=0, le=MAX_VOCABULARY)]
Name = Annotated[str, Meta(max_length=256)]
Inbox = Annotated[str, Meta(max_length=256, pattern=r"^ipc:///[^\x00]+$")]
"""Where a process is reached: no message names another kind of address."""
MaybeInbox = Annotated[str, Meta(max_length=256, pattern=r"^(ipc:///[^\x00]+)?$")]
"""The same; empty where there is no process."""
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

EXECUTION_BITS: Final = 43
"""Bits of an execution id below its epoch: how many executions one scheduler can count."""


def execution_id(epoch: Epoch, number: int) -> int:
    """The id of the `number`-th execution (from 1) that the scheduler of `epoch` starts: the epoch
    in the upper 20 bits, the number in the lower 43."""
    return epoch << EXECUTION_BITS | number


def epoch_of(execution: int) -> Epoch:
    """The epoch of the scheduler that started this execution; below 0 for the -1 that stands for no
    execution."""
    return Epoch(execution >> EXECUTION_BITS)


def pack(code: str, values: Iterable[int] | Iterable[float]) -> bytes:
    """A column of `values` as bytes. `code` is an `array` type code: i (int32), I (uint32), Q
    (uint64), f (float32)."""
    return array(code, values).tobytes()


def unpack(code: str, column: bytes) -> memoryview:
    """The inverse of `pack`, without a copy. Raises TypeError when the length is no multiple of the
    item size."""
    return memoryview(column).cast(code)  # type: ignore[call-overload]
