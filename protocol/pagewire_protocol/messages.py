"""Every message that crosses a process border, grouped by the service that receives it.

A request travels right (frontend, tokenizer, scheduler, worker) once and whole; tokens travel left as *columns*: one message a
step for each receiver, whose `bytes` fields are little-endian arrays with one entry a row. `pack` and `unpack` convert without numpy,
since the frontend imports none.

All types are tagged, array-like, strict (`forbid_unknown_fields`) and bounded: `tests/protocol` walks them and fails on an
unbounded field. Adding a message is one Struct, one entry in its receiver's union and one `match` arm in that service.
"""

from array import array
from collections.abc import Iterable
from enum import IntEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from .sampling import Sampling, TextOptions, TokenId

MAX_ROWS: Final = 65_536
MAX_TOKENS: Final = 4_194_304
MAX_TEXT: Final = 16_777_216

Rid = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""A request, chosen at random by the frontend that owns it; the same over all attempts."""
Attempt = Annotated[int, Meta(ge=1, le=2**32 - 1)]
"""Grows with every resubmission of a request."""
Handle = Annotated[int, Meta(ge=0, le=2**32 - 1)]
"""The receiver's own short name for a request, never reused within an incarnation."""
Execution = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""One placement of one attempt on one worker: epoch (20 bits), then a counter (43 bits). Unique over schedulers."""
Epoch = Annotated[int, Meta(ge=1, le=2**20 - 1)]
"""A scheduler's reign, counted in its lock file."""
Incarnation = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""One life of one process."""
Count = Annotated[int, Meta(ge=0, le=2**62)]
Name = Annotated[str, Meta(max_length=256)]
Inbox = Annotated[str, Meta(min_length=1, max_length=256)]
ShortText = Annotated[str, Meta(max_length=4096)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]

RowsI32 = Annotated[bytes, Meta(max_length=4 * MAX_ROWS)]
RowsU32 = Annotated[bytes, Meta(max_length=4 * MAX_ROWS)]
RowsU64 = Annotated[bytes, Meta(max_length=8 * MAX_ROWS)]
RowsU8 = Annotated[bytes, Meta(max_length=MAX_ROWS)]
TokensI32 = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
TokensF32 = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
TokenBytes = Annotated[bytes, Meta(max_length=4096)]


def pack(code: str, values: Iterable[int] | Iterable[float]) -> bytes:
    """A column of `values` as bytes. `code` is an `array` type code: i (int32), I (uint32), Q (uint64), f (float32)."""
    return array(code, values).tobytes()


def unpack(code: str, column: bytes) -> memoryview:
    """The inverse of `pack`, without a copy. Raises TypeError when the length is no multiple of the item size."""
    return memoryview(column).cast(code)  # type: ignore[call-overload]


class Role(IntEnum):
    FRONTEND = 1
    TOKENIZER = 2
    SCHEDULER = 3
    WORKER = 4


class Finish(IntEnum):
    """Why a request ended. The first three end a generation; the others end an attempt without one."""

    STOP = 1
    """An end-of-sequence token, a stop token id or a stop string."""
    LENGTH = 2
    CANCELLED = 3
    REFUSED = 4
    """The request is at fault or the server is full: `status`, `message` and `param` say which."""
    FAILED = 5
    """The server is at fault and resubmission would not help."""
    LOST = 6
    """The execution is gone (worker death, drained service): the owner resubmits."""


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="t", gc=False):
    """Base of all messages; the tag is the class's name."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)


class Record(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of the parts of messages."""


# --- parts ------------------------------------------------------------------------------------------------------------


class ChatMessage(Record):
    role: Annotated[str, Meta(max_length=64)]
    content: Text
    name: Annotated[str, Meta(max_length=256)] | None = None


class Chat(Record):
    """A conversation that the tokenizer renders with the model's chat template."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=4096)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class Prompt(Record):
    """Exactly one of text, token ids (int32 column) or chat."""

    text: Text | None = None
    ids: TokensI32 | None = None
    chat: Chat | None = None


class End(Record):
    """The terminal word on an attempt. Each attempt that a service accepted gets exactly one."""

    handle: Handle
    attempt: Attempt
    finish: Finish
    stop_reason: TokenId | Annotated[str, Meta(max_length=1024)] | None = None
    """The stop token id or stop string that was met; None for an end-of-sequence token."""
    status: Annotated[int, Meta(ge=0, le=599)] = 0
    """The HTTP status for REFUSED and FAILED."""
    message: ShortText = ""
    param: Annotated[str, Meta(max_length=64)] | None = None
    retry_after_s: Annotated[int, Meta(ge=0, le=3600)] = 0


class Placed(Record):
    """An attempt got a place on a worker."""

    handle: Handle
    attempt: Attempt
    cached_tokens: Count


class Started(Record):
    """What the owner learns of an attempt before its first token."""

    handle: Handle
    attempt: Attempt
    prompt_tokens: Count
    cached_tokens: Count
    prompt_ids: TokensI32 | None = None


class LogprobColumns(Record):
    """Log-probabilities for some rows of a step: row `rows[i]` has `counts[i]` entries in `ids` and `values`.

    Entry 0 is the sampled token, then the most likely ones in falling order. `ranks[i]` is the sampled token's rank from 1.
    """

    rows: RowsI32
    counts: RowsI32
    ranks: RowsI32
    ids: TokensI32
    values: TokensF32


class TokenLogprobs(Record):
    """Log-probabilities of one token of one delta row, with the bytes each candidate stands for."""

    row: Annotated[int, Meta(ge=0, le=MAX_ROWS)]
    index: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    """Which of the row's tokens."""
    rank: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    values: Annotated[tuple[float, ...], Meta(max_length=64)]
    texts: Annotated[tuple[TokenBytes, ...], Meta(max_length=64)]


class WorkerFacts(Record):
    """What a worker can hold; sent when it is ready."""

    num_blocks: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    block_size: Annotated[int, Meta(ge=1, le=4096)]
    max_num_seqs: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    max_model_len: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    vocab_size: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    device: Name


class TokenizerFacts(Record):
    has_text: bool
    """False under --skip-tokenizer-init: token ids only."""
    has_chat_template: bool
    vocab_size: Count


class Peer(Record):
    """One live process as the scheduler sees it."""

    role: Role
    name: Name
    inbox: Inbox
    incarnation: Incarnation
    ready: bool
    stage: Name = ""
    """What it is doing while not ready, for people."""
    fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Admission(Record):
    """A request placed in a worker's slot, whole. `blocks` holds the first blocks of its table; `computed` tokens of them are filled
    already (prefix cache). Prompt and output are kept apart: penalties and seeds depend on which is which."""

    slot: Annotated[int, Meta(ge=0, le=MAX_ROWS)]
    execution: Execution
    prompt: TokensI32
    output: TokensI32
    blocks: TokensI32
    computed: Count
    sampling: Sampling


# --- to the scheduler -------------------------------------------------------------------------------------------------


class Hello(Message, tag=True):
    """Sent on start, again when the facts are known, and whenever a Roster shows a new epoch. Idempotent."""

    peer: Peer
    worker: WorkerFacts | None = None
    tokenizer: TokenizerFacts | None = None


class Heartbeat(Message, tag=True):
    """Sent every second. `progress` counts work done; it stands still in a hung process. An unknown incarnation is answered with a
    Roster, whose new epoch makes the sender say Hello again."""

    inbox: Inbox
    incarnation: Incarnation
    progress: Count
    busy: bool
    stage: Name = ""
    fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Goodbye(Message, tag=True):
    """An orderly exit: no more work for this incarnation."""

    incarnation: Incarnation


class Submit(Message, tag=True):
    """One attempt at a request, from the tokenizer. `handle` is the tokenizer's; results go to the inbox `reply_to`."""

    rid: Rid
    attempt: Attempt
    handle: Handle
    reply_to: Inbox
    prompt: TokensI32
    output: TokensI32
    sampling: Sampling
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[str, Meta(max_length=128)] = ""


class Cancel(Message, tag=True):
    """The owner no longer wants these attempts (or any earlier one of the same request)."""

    requests: Annotated[tuple[tuple[Rid, Attempt], ...], Meta(max_length=MAX_ROWS)]


class StepResult(Message, tag=True):
    """What a step sampled: one row a slot that reached its last known token. `flags` is 1 where the logits were not finite: the token is
    then meaningless."""

    epoch: Epoch
    incarnation: Incarnation
    n: Count
    slots: RowsI32
    tokens: RowsI32
    flags: RowsU8
    logprobs: LogprobColumns | None = None


ToScheduler = Hello | Heartbeat | Goodbye | Submit | Cancel | StepResult


# --- to the tokenizer -------------------------------------------------------------------------------------------------


class Generate(Message, tag=True):
    """One attempt at a request, from its owner. `output` holds the tokens accepted so far, `handle` is the owner's."""

    rid: Rid
    attempt: Attempt
    handle: Handle
    reply_to: Inbox
    prompt: Prompt
    output: TokensI32
    sampling: Sampling
    text: TextOptions
    add_special_tokens: bool = True
    max_tokens_is_rest: bool = False
    """max_tokens was not given: it becomes what the context leaves after the prompt."""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[str, Meta(max_length=128)] = ""


class Tokens(Message, tag=True):
    """One step's tokens for the requests of one tokenizer: a row is one token. `handles` are the tokenizer's. `ended` is read after the
    rows, `placed` before them."""

    handles: RowsU32
    attempts: RowsU32
    executions: RowsU64
    positions: RowsI32
    tokens: RowsI32
    placed: Annotated[tuple[Placed, ...], Meta(max_length=MAX_ROWS)] = ()
    ended: Annotated[tuple[End, ...], Meta(max_length=MAX_ROWS)] = ()
    logprobs: LogprobColumns | None = None


# --- to the frontend --------------------------------------------------------------------------------------------------


class Deltas(Message, tag=True):
    """New output for the requests of one frontend: row i brings `counts[i]` tokens, from output position `positions[i]` on, and the text that
    they complete (possibly none: an unfinished character or stop string is held back). `started` is read before the rows, `ended` after."""

    handles: RowsU32
    attempts: RowsU32
    executions: RowsU64
    positions: RowsI32
    counts: RowsI32
    tokens: TokensI32
    texts: Annotated[tuple[Text, ...], Meta(max_length=MAX_ROWS)]
    started: Annotated[tuple[Started, ...], Meta(max_length=MAX_ROWS)] = ()
    ended: Annotated[tuple[End, ...], Meta(max_length=MAX_ROWS)] = ()
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=MAX_TOKENS)] = ()


# --- to the worker ----------------------------------------------------------------------------------------------------


class Step(Message, tag=True):
    """One forward pass. Applied in this order: retire, admit, grow, run.

    `run_slots[i]` computes its next `run_counts[i]` tokens; a row that reaches the slot's last known token samples one more, which
    the worker appends to the slot itself. `repeat` runs the previous step's slots again with one token each, columns left empty.
    An `epoch` above the worker's own clears all its slots first; one below is ignored.
    """

    epoch: Epoch
    n: Count
    retire: RowsI32 = b""
    admit: Annotated[tuple[Admission, ...], Meta(max_length=MAX_ROWS)] = ()
    grow_slots: RowsI32 = b""
    grow_blocks: RowsI32 = b""
    run_slots: RowsI32 = b""
    run_counts: RowsI32 = b""
    repeat: bool = False


# --- to everyone ------------------------------------------------------------------------------------------------------


class Roster(Message, tag=True):
    """The stack as the scheduler sees it, sent to every process when it changes."""

    epoch: Epoch
    peers: Annotated[tuple[Peer, ...], Meta(max_length=1024)]
    max_model_len: Count
    """0 until a worker is ready."""
    vocab_size: Count
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    has_text: bool
    has_chat_template: bool
    stats: Annotated[dict[Annotated[str, Meta(max_length=64)], float], Meta(max_length=64)] = {}
    """Gauges and counters of the scheduler for /metrics, by metric name without prefix; refreshed once a second."""


ToTokenizer = Generate | Cancel | Tokens | Roster
ToFrontend = Deltas | Roster
ToWorker = Step | Roster
