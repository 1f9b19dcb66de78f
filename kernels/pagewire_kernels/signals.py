"""How programs of collective kernels find each other's memory, tell each other that data are in
place, and wait for that, but not for ever.

A signal is the generation, stored in the receiver's pads with release semantics at the scope of the
system; waiting polls one's own pads with acquire semantics. The barrier before a signal makes the
stores of all threads part of what is released; the one after a wait makes what was acquired visible
to all threads.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Values inside a kernel have types that only Triton's compiler knows.

import triton
import triton.language as tl

from .symmetric_memory import FAILED as FAILED_AT
from .symmetric_memory import GENERATIONS as GENERATIONS_AT
from .symmetric_memory import LIMIT as LIMIT_AT

FAILED: tl.constexpr = tl.constexpr(FAILED_AT)
GENERATIONS: tl.constexpr = tl.constexpr(GENERATIONS_AT)
LIMIT: tl.constexpr = tl.constexpr(LIMIT_AT)


@triton.jit
def peer_pointer(peers, peer, offset, DTYPE: tl.constexpr):
    """To what lies `offset` bytes, a multiple of 16, into the region of rank `peer`."""
    address = tl.load(peers + peer) + offset
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def own_slots(words_at, generation, limit, SIZE: tl.constexpr):
    """The offset of a generation's packed words: of each rank, at most `limit`."""
    return words_at + (generation % 2) * SIZE * limit * 8


@triton.jit
def own_buffer(data_at, generation, limit):
    """The offset of a generation's buffer of `limit` bytes."""
    return data_at + (generation % 2) * limit


@triton.jit
def slot_pointer(peers, receiver, slots, sender, limit):
    """To the packed words of rank `sender`, at most `limit`, in the region of rank `receiver`, whose
    slots begin at the offset `slots`."""
    return peer_pointer(peers, receiver, slots + sender * limit * 8, tl.int64)


@triton.jit
def send_packed(words, peers, rank, slots, at, inside, limit, generation, SIZE: tl.constexpr):
    """Write the words at `words` + `at` into this rank's slots of all others."""
    sent = packed(tl.load(words + at, mask=inside, other=0), generation)
    for step in tl.static_range(1, SIZE):
        to = slot_pointer(peers, (rank + step) % SIZE, slots, rank, limit)
        tl.store(to + at, sent, mask=inside)


@triton.jit
def word_of(words, peers, rank, peer, slots, at, inside, limit, generation, control, report, OPERATION: tl.constexpr,
            SIZE: tl.constexpr, POLLS: tl.constexpr):  # fmt: skip
    """The words of rank `peer` at `at`: this rank's own are at `words`, those of others wherever they
    were sent."""
    if peer == rank:
        word = tl.load(words + at, mask=inside, other=0)
    else:
        slot = slot_pointer(peers, rank, slots, peer, limit)
        word = arrived(slot + at, inside, generation, peer, control, report, OPERATION, SIZE, POLLS)
    return word


@triton.jit
def next_generation(control):
    """This launch's, the same in all programs of all ranks."""
    return tl.load(control + GENERATIONS + tl.program_id(0)) + 1


@triton.jit
def end_generation(control, generation, PROGRAMS: tl.constexpr):
    """Every program of every launch ends with it, also one that had nothing to do. Those that this
    launch has not started are counted along by those it has: the next one may start more."""
    program = tl.program_id(0) + tl.arange(0, PROGRAMS) * tl.num_programs(0)
    tl.store(control + GENERATIONS + program, generation, mask=program < PROGRAMS)


@triton.jit
def now():
    """Nanoseconds."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _gives_up(since, peer, control, report, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    """Whether a wait that began at `since` must end. The first one to reach the limit says so; those
    after it don't wait again, so that what has been launched ends soon."""
    failed = tl.load(control + FAILED, volatile=True)
    late = now() - since > tl.load(control + LIMIT, volatile=True)
    if late & (failed == 0):
        code = failed + (peer + 1 + OPERATION * (SIZE + 1))
        tl.store(control + FAILED, code)
        tl.store(report, code)
    return late | (failed != 0)


@triton.jit
def _first_missing(pads, generation, SIZE: tl.constexpr, PAD: tl.constexpr):
    """The lowest rank whose signal has not come, SIZE when all have."""
    peer = tl.arange(0, PAD)
    nothing = tl.zeros((PAD,), tl.int64)
    seen = tl.atomic_add(pads + peer, nothing, mask=peer < SIZE, sem="acquire", scope="sys")
    return tl.min(tl.where((peer < SIZE) & (seen < generation), peer, SIZE), 0)


@triton.jit
def signal(peers, rank, generation, PHASE: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """Tell this program's counterparts on all ranks that what this program stored is in place."""
    tl.debug_barrier()
    peer = tl.arange(0, PAD)
    there = peer < SIZE
    pad = (PHASE * PROGRAMS + tl.program_id(0)) * SIZE + rank
    address = tl.load(peers + peer, mask=there, other=0) + pad * 8
    value = tl.zeros((PAD,), tl.int64) + generation
    tl.atomic_xchg(
        address.to(tl.pointer_type(tl.int64)), value, mask=there, sem="release", scope="sys"
    )


@triton.jit
def wait(peers, rank, generation, control, report, OPERATION: tl.constexpr, PHASE: tl.constexpr, SIZE: tl.constexpr,
         PAD: tl.constexpr, PROGRAMS: tl.constexpr, POLLS: tl.constexpr):  # fmt: skip
    """Until this program's counterparts on all ranks have signalled."""
    own = peer_pointer(peers, rank, 0, tl.int64)
    pads = own + (PHASE * PROGRAMS + tl.program_id(0)) * SIZE
    missing = _first_missing(pads, generation, SIZE, PAD)
    if missing < SIZE:
        since = now()
        polls = 0
        while missing < SIZE:
            polls += 1
            peer = missing
            missing = _first_missing(pads, generation, SIZE, PAD)
            if polls % POLLS == 0:  # noqa: SIM102  # Triton's `and` evaluates both
                if _gives_up(since, peer, control, report, OPERATION, SIZE):
                    missing = peer * 0 + SIZE
    tl.debug_barrier()


@triton.jit
def packed(word, generation):
    """int32 values with the generation beside each, as one int64 that arrives whole."""
    return (generation << 32) | (word.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _behind(value, inside, generation):
    return tl.max((inside & ((value >> 32) != ((generation << 32) >> 32))).to(tl.int32), 0)


@triton.jit
def arrived(at, inside, generation, peer, control, report, OPERATION: tl.constexpr, SIZE: tl.constexpr,
            POLLS: tl.constexpr):  # fmt: skip
    """The words of rank `peer` that are `packed` at the pointers `at`, once they are there.

    Each brings its own signal: no order among stores is needed. What a buffer held before is of the
    generation before last, or older.
    """
    value = tl.load(at, mask=inside, other=0, volatile=True)
    behind = _behind(value, inside, generation)
    if behind > 0:
        since = now()
        polls = 0
        while behind > 0:
            polls += 1
            value = tl.load(at, mask=inside, other=0, volatile=True)
            behind = _behind(value, inside, generation)
            if (polls % POLLS == 0) & (behind > 0):  # noqa: SIM102
                if _gives_up(since, peer, control, report, OPERATION, SIZE):
                    behind = behind * 0
    return value.to(tl.int32)
