"""Every message that crosses a process border, grouped by the service that receives it.

A request travels right (frontend, tokenizer, scheduler, worker) once and whole; tokens travel left
as *columns*: one message a step for each receiver, whose `bytes` fields are little-endian arrays
with one entry a row.

All types are tagged, array-like, strict (`forbid_unknown_fields`) and bounded: `tests/protocol`
walks them and fails on an unbounded field. Adding a message is one Struct, one entry in its
receiver's union and one `match` arm in that service.
"""

from typing import Annotated

from msgspec import Meta, Struct

from .columns import (
    MAX_ROWS,
    MAX_TEXT,
    MAX_TOKENS,
    Attempt,
    CacheSalt,
    Count,
    Epoch,
    EpochField,
    Execution,
    Handle,
    Inbox,
    Incarnation,
    IncarnationField,
    Name,
    Rid,
    RowsI32,
    RowsU8,
    RowsU32,
    RowsU64,
    ShortText,
    Text,
    TimeoutMs,
    TokenBytes,
    TokensI32,
    VocabSize,
    pack,
    unpack,
)
from .grammar import Grammar
from .sampling import Sampling, SamplingDefaults, TextOptions, TokenId
from .structs import (
    Admission,
    Chat,
    ChatMessage,
    End,
    Finish,
    LogprobColumns,
    PartKind,
    Peer,
    Placed,
    Prompt,
    PromptLogprobs,
    RequestKind,
    Role,
    Shared,
    Started,
    StepCost,
    TokenizerFacts,
    TokenLogprobs,
    WorkerFacts,
)

# fmt: off
__all__ = [
    "MAX_ROWS", "MAX_TEXT", "MAX_TOKENS", "Admission", "Attempt", "Cancel", "CancelQuery", "Chat", "ChatMessage", "Death", "Deltas",
    "Detokenize", "End", "Epoch", "Execution", "Finish", "Generate", "Goodbye", "Grammar", "Handle", "Heartbeat", "Hello", "Inbox",
    "Incarnation", "LogprobColumns", "Message", "Park", "PartKind", "Peer", "Placed", "Prompt", "PromptLogprobs", "RequestKind", "Rid",
    "Role", "Roster", "Shared", "Shutdown", "Started", "Step", "StepCost", "StepResult", "Submit", "ToFrontend", "ToScheduler",
    "ToTokenizer", "ToWorker", "TokenLogprobs", "Tokenize", "Tokenized", "TokenizerFacts", "Tokens", "WorkerFacts", "pack",
    "unpack",
]
# fmt: on


class Message(
    Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="t", gc=False
):
    """Base of all messages; the tag is the class's name."""


# --- to the scheduler ---


class Hello(Message, tag=True, frozen=True):
    """Sent on start, again when the facts are known, and whenever a Roster shows a new epoch.
    Idempotent."""

    peer: Peer
    worker: WorkerFacts | None = None
    tokenizer: TokenizerFacts | None = None


class Heartbeat(Message, tag=True, frozen=True):
    """Sent every second. `progress` counts work done; it stands still in a hung process. A sender
    that the scheduler does not know is answered with a Roster that does not list it, which makes
    it say Hello again."""

    inbox: Inbox
    incarnation: IncarnationField
    progress: Count
    busy: bool
    stage: Name = ""
    fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Goodbye(Message, tag=True, frozen=True):
    """No more work for this incarnation: it ends. `failed`: not in order, so that the work may be
    what ended it."""

    incarnation: IncarnationField
    failed: bool = False


class Death(Message, tag=True, frozen=True):
    """From whoever started a service: it has ended, and will be started again under the same
    name."""

    role: Role
    name: Name
    incarnation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    """0: it never said Hello."""
    cause: ShortText
    failures: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    """Ends in a row, this one included, before which it did not work for long; 0: it has ended in
    order, and may not have a next life."""
    restart_in_s: Annotated[float, Meta(ge=0, le=86400)]


class Submit(Message, tag=True, frozen=True):
    """One attempt at a request, from the tokenizer. `handle` is the tokenizer's; results go to the
    inbox `reply_to`."""

    rid: Rid
    attempt: Attempt
    handle: Handle
    reply_to: Inbox
    prompt: TokensI32
    output: TokensI32
    sampling: Sampling
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: CacheSalt = ""
    kind: RequestKind = RequestKind.GENERATE
    model: Name = ""
    """Which model, by its served name; empty: the one that there is."""
    adapter: Name = ""
    """Which LoRA adapter; empty: none."""
    grammar: Grammar | None = None
    """What the output must match; None: anything."""
    worker_deaths: Count = 0
    """As in Generate."""
    timeout_ms: TimeoutMs = 0
    """As in Generate."""


class Cancel(Message, tag=True, frozen=True):
    """The owner no longer wants these attempts (or any earlier one of the same request)."""

    requests: Annotated[tuple[tuple[Rid, Attempt], ...], Meta(max_length=MAX_ROWS)]


class Park(Message, tag=True, frozen=True):
    """The client of these attempts reads nothing: `parked`, they get no further tokens, and wait
    outside the queue with what they have. Not `parked`: it reads again, and they go on. Repeated
    until the attempt ends: one that is not known yet is left as it is."""

    requests: Annotated[tuple[tuple[Rid, Attempt], ...], Meta(max_length=MAX_ROWS)]
    parked: bool


class StepResult(Message, tag=True, frozen=True):
    """What a step sampled: one row for each slot whose last token the step computed, unless its
    request wants no token (`max_tokens` is 0).

    Row i brings `counts[i]` tokens, which follow each other in `tokens`: 0 to the worker's
    `max_tokens_per_row` and `max_forced_tokens` together. Empty `counts`: one token a row. A row
    without a token has not moved: the next step that runs its slot computes the slot's last token
    again. `flags` is 1 where the logits were not finite, 2 where the request's grammar cannot be
    held any further: the row's tokens are then meaningless.

    `starved`: the worker's device had nothing left to compute when it got this step.
    """

    epoch: EpochField
    incarnation: IncarnationField
    n: Count
    slots: RowsI32
    tokens: TokensI32
    flags: RowsU8
    logprobs: LogprobColumns | None = None
    prompt_logprobs: Annotated[tuple[PromptLogprobs, ...], Meta(max_length=MAX_ROWS)] = ()
    counts: RowsI32 = b""
    starved: bool = False


ToScheduler = Hello | Heartbeat | Goodbye | Death | Submit | Cancel | Park | StepResult


# --- to the tokenizer ---


class Generate(Message, tag=True, frozen=True):
    """One attempt at a request, from its owner. `output` holds the tokens accepted so far, `handle`
    is the owner's."""

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
    """The client gave no max_tokens: what the context leaves after the prompt, and no more than
    `sampling` has there."""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: CacheSalt = ""
    kind: RequestKind = RequestKind.GENERATE
    model: Name = ""
    """Which model, by its served name; empty: the one that there is."""
    adapter: Name = ""
    """Which LoRA adapter; empty: none."""
    grammar: Grammar | None = None
    """What the output must match; None: anything."""
    worker_deaths: Count = 0
    """Workers in a row that ended while they computed this request's next token: from two on it
    runs alone."""
    timeout_ms: TimeoutMs = 0
    """Milliseconds that are left for the whole answer as the message is sent; 0: no limit. Each hop
    counts them on its own clock: clocks of several processes are not compared."""


class Tokens(Message, tag=True, frozen=True):
    """The tokens of one step or more for the requests of one tokenizer.

    Row i brings `counts[i]` tokens, which follow each other in `tokens`, from output position
    `positions[i]` on. Empty `counts`: one token a row. `handles` are the tokenizer's. `placed` is
    read before the rows, `ended` after them.
    """

    handles: RowsU32
    attempts: RowsU32
    executions: RowsU64
    positions: RowsI32
    tokens: TokensI32
    placed: Annotated[tuple[Placed, ...], Meta(max_length=MAX_ROWS)] = ()
    ended: Annotated[tuple[End, ...], Meta(max_length=MAX_ROWS)] = ()
    logprobs: LogprobColumns | None = None
    prompt_logprobs: Annotated[tuple[PromptLogprobs, ...], Meta(max_length=MAX_ROWS)] = ()
    """Read after `placed` and before the rows."""
    counts: RowsI32 = b""


class Tokenize(Message, tag=True, frozen=True):
    """What are the ids of this prompt? Answered by a Tokenized with the same handle."""

    handle: Handle
    reply_to: Inbox
    prompt: Prompt
    add_special_tokens: bool = True
    with_texts: bool = False
    with_offsets: bool = False


class Detokenize(Message, tag=True, frozen=True):
    """What text do these ids stand for? Answered by a Tokenized with the same handle."""

    handle: Handle
    reply_to: Inbox
    ids: TokensI32
    skip_special_tokens: bool = False
    with_offsets: bool = False


class CancelQuery(Message, tag=True, frozen=True):
    """Nobody wants the answer to this Tokenize or Detokenize any more."""

    handle: Handle
    reply_to: Inbox


# --- to the frontend ---


class Deltas(Message, tag=True, frozen=True):
    """New output for the requests of one frontend: row i brings `counts[i]` tokens, from output
    position `positions[i]` on, and the text that they complete (possibly none: an unfinished
    character or stop string is held back). `started` is read before the rows, `ended` after
    them."""

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
    prompt_logprobs: Annotated[tuple[PromptLogprobs, ...], Meta(max_length=MAX_ROWS)] = ()
    """Read after `started` and before the rows."""
    part_rows: RowsI32 = b""
    """Of answers that have a structure: part j, in order, belongs to the row `part_rows[j]`, whose
    own text is empty; it is of the kind `part_kinds[j]` (PartKind) and, where it belongs to a tool
    call, of the answer's call number `part_calls[j]`."""
    part_kinds: RowsU8 = b""
    part_calls: RowsI32 = b""
    part_texts: Annotated[tuple[Text, ...], Meta(max_length=MAX_ROWS)] = ()


class Tokenized(Message, tag=True, frozen=True):
    """The answer to a Tokenize (`ids`, and `texts` when asked) or a Detokenize (`text`), with
    `offsets` and `first` when asked; with a `status`, why there is none."""

    handle: Handle
    ids: TokensI32 = b""
    texts: Annotated[tuple[Text, ...], Meta(max_length=MAX_TOKENS)] = ()
    text: Text = ""
    status: Annotated[int, Meta(ge=0, le=599)] = 0
    message: ShortText = ""
    param: Annotated[str, Meta(max_length=64)] | None = None
    offsets: TokensI32 = b""
    """Where each token begins in the text, in characters (int32 column)."""
    first: TokenBytes = b""
    """With offsets: the bytes that the first token stands for."""


# --- to the worker ---


class Step(Message, tag=True, frozen=True):
    """One forward pass. Applied in this order: retire, admit, grow, run.

    `run_slots[i]` computes its next `run_counts[i]` tokens. A row that computes the last token of
    its slot samples, and the worker appends what it samples to the slot itself; a request whose
    `max_tokens` is 0 samples nothing. A worker writes no further than the slot's block table
    reaches. `repeat` runs the previous step's slots again with one token each, columns left empty.
    Rows of one token that go on decoding come first. `shared` names some of those, and saves work
    without changing results; its groups last while steps repeat: tables only grow at their ends
    meanwhile. An `epoch` above the worker's own clears all its slots first; one below is ignored.
    So is an `n` that is no higher than an earlier one of the epoch.
    """

    epoch: EpochField
    n: Count
    retire: RowsI32 = b""
    admit: Annotated[tuple[Admission, ...], Meta(max_length=MAX_ROWS)] = ()
    grow_slots: RowsI32 = b""
    grow_blocks: RowsI32 = b""
    run_slots: RowsI32 = b""
    run_counts: RowsI32 = b""
    repeat: bool = False
    shared: Shared | None = None
    clear: bool = False
    """All slots are cleared first. So says the first step to a worker: it may have been given up and
    have come back, and it is not known which of the steps before it has taken."""


class Shutdown(Message, tag=True, frozen=True):
    """The scheduler can use this worker no longer: it ends, to be started anew."""

    epoch: EpochField
    reason: ShortText


# --- to everyone ---


class Roster(Message, tag=True, frozen=True):
    """The stack as the scheduler sees it, sent to every process when it changes."""

    epoch: EpochField
    peers: Annotated[tuple[Peer, ...], Meta(max_length=1024)]
    max_model_len: Count
    """0 until a worker is ready."""
    vocab_size: VocabSize
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    has_text: bool
    has_chat_template: bool
    stats: Annotated[dict[Annotated[str, Meta(max_length=64)], float], Meta(max_length=64)] = {}
    """Gauges and counters of the scheduler for /metrics, by metric name without prefix; refreshed
    once a second."""
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    longest_token: Count = 0
    """Most characters of a text that one token can stand for; 0: any number."""
    has_reasoning: bool = False
    """As in TokenizerFacts."""
    tool_format: Name = ""


ToTokenizer = Generate | Cancel | Park | Tokens | Tokenize | Detokenize | CancelQuery | Roster
ToFrontend = Deltas | Tokenized | Roster
ToWorker = Step | Shutdown | Roster
