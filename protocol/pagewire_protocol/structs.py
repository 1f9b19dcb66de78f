"""The parts that messages are made of: who is who, how a request ends, what a request is. Each is a
strict, bounded, array-like Struct."""

from enum import IntEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from .columns import (
    MAX_ROWS,
    MAX_TOKENS,
    MAX_TOKENS_PER_ROW,
    Attempt,
    Count,
    Execution,
    Handle,
    IncarnationField,
    MaybeInbox,
    Name,
    RowsI32,
    ShortText,
    SlotField,
    Text,
    TokenBytes,
    TokensF32,
    TokensI32,
    VocabSize,
)
from .grammar import Grammar
from .sampling import Sampling, SamplingDefaults, TokenId

MAX_TEMPLATE_KWARGS: Final = 65_536
RESERVED_TEMPLATE_KWARGS: Final = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "messages",
    "tokenize",
)
"""Variables of a chat template that are parameters of their own."""
"""Bytes of JSON."""
MAX_IGNORED: Final = 512
"""Characters of a list of keywords."""
MAX_TOOLS: Final = 4_194_304
"""Bytes of the JSON of a request's tools."""
MAX_TOOL_NAME: Final = 256
"""Characters."""
MAX_MESSAGE_FIELDS: Final = 16_777_216
"""Bytes of the JSON of what a message has beside role, name and content."""
MAX_MESSAGES: Final = 4096
"""Of one conversation."""
MAX_MESSAGE_ROLE: Final = 64
MAX_MESSAGE_NAME: Final = 256
"""Characters."""
SILENCE_S: Final = 10.0
"""The scheduler and its peers each send once a second; a ready one that is silent for so long is
taken for gone."""


FAILING: Final = 3
"""Ends in a row without having worked: a service with so many `failures` is reported as failing."""
NOT_AWAITED: Final = 5
"""The same, from which on new requests do not wait for the service's next life."""


class Role(IntEnum):
    """Which of the four services a process is."""

    FRONTEND = 1
    TOKENIZER = 2
    SCHEDULER = 3
    WORKER = 4


class Finish(IntEnum):
    """Why a request ended. The first three end a generation; the others end an attempt without
    one."""

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


class RequestKind(IntEnum):
    """What a request is for."""

    GENERATE = 0
    """Tokens that follow the prompt."""


class PartKind(IntEnum):
    """What a part of an answer is, where the model's answers have a structure."""

    CONTENT = 0
    REASONING = 1
    CALL_ID = 2
    """The id of a tool call; its CALL_NAME follows."""
    CALL_NAME = 3
    """The function that is called, whole."""
    ARGUMENTS = 4
    """More of the JSON text of a call's arguments."""


class Record(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of the parts of messages."""


class ChatMessage(Record, frozen=True):
    """One message of a conversation."""

    role: Annotated[str, Meta(max_length=MAX_MESSAGE_ROLE)]
    content: Text
    name: Annotated[str, Meta(max_length=MAX_MESSAGE_NAME)] | None = None
    fields: Annotated[bytes, Meta(max_length=MAX_MESSAGE_FIELDS)] = b""
    """A JSON object with what else the message has: `tool_calls`, `tool_call_id`,
    `reasoning_content`."""


class Chat(Record, frozen=True):
    """A conversation that the tokenizer renders with the model's chat template."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Annotated[bytes, Meta(max_length=MAX_TEMPLATE_KWARGS)] = b""
    """A JSON object with further variables for the template."""
    tools: Annotated[bytes, Meta(max_length=MAX_TOOLS)] = b""
    """The tools that may be called, as OpenAI's list in JSON, each with a `function`."""


class Prompt(Record, frozen=True):
    """Exactly one of text, token ids (int32 column) or chat."""

    text: Text | None = None
    ids: TokensI32 | None = None
    chat: Chat | None = None


class End(Record, frozen=True):
    """How an attempt ended. Each attempt that a service accepted gets exactly one."""

    handle: Handle
    attempt: Attempt
    finish: Finish
    stop_reason: TokenId | Annotated[str, Meta(max_length=1024)] | None = None
    """The stop token id or stop string that was hit; None for an end-of-sequence token."""
    status: Annotated[int, Meta(ge=0, le=599)] = 0
    """The HTTP status for REFUSED and FAILED."""
    message: ShortText = ""
    param: Annotated[str, Meta(max_length=64)] | None = None
    retry_after_s: Annotated[int, Meta(ge=0, le=3600)] = 0
    worker_died: bool = False
    """The execution is lost because its worker ended while it computed this request: the request
    may be what ended it."""
    reasoning_tokens: Count = 0
    """Tokens of the whole output that were reasoning, as the tokenizer counts them."""


class Placed(Record, frozen=True):
    """An attempt got a slot on a worker; `cached_tokens` of its prompt need not be computed."""

    handle: Handle
    attempt: Attempt
    cached_tokens: Count


class Started(Record, frozen=True):
    """What the owner learns of an attempt before its first token."""

    handle: Handle
    attempt: Attempt
    prompt_tokens: Count
    cached_tokens: Count
    prompt_ids: TokensI32 | None = None
    ignored: Annotated[str, Meta(max_length=MAX_IGNORED)] = ""
    """Keywords of the request's schemas that its grammar does not hold, in printable ASCII."""


class LogprobColumns(Record, frozen=True):
    """Log-probabilities for some tokens of a message: its token `rows[i]` (an index into `tokens`,
    which is the row where each row has one token) has `counts[i]` entries in `ids` and `values`.

    Entry 0 is the sampled token, then the most likely ones in falling order. `ranks[i]` is the
    sampled token's rank from 1.
    """

    rows: RowsI32
    counts: RowsI32
    ranks: RowsI32
    ids: TokensI32
    values: TokensF32


class TokenLogprobs(Record, frozen=True):
    """Log-probabilities of one token of one delta row, with the bytes each candidate stands for."""

    row: Annotated[int, Meta(ge=0, le=MAX_ROWS)]
    index: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    """Which of the row's tokens."""
    rank: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    values: Annotated[tuple[float, ...], Meta(max_length=64)]
    texts: Annotated[tuple[TokenBytes, ...], Meta(max_length=64)]
    offset: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Where the token begins in the generated text, in characters. A token that completes a
    character begins where that character does; one without text, where the next text does."""


class PromptLogprobs(Record, frozen=True):
    """Log-probabilities of a run of prompt tokens, from position `first` (at least 1) on: token i
    has `counts[i]` entries in `ids` and `values`, its own first, then the most likely ones in
    falling order; `ranks[i]` is its own rank from 1.

    The worker names the `slot`; the scheduler and the tokenizer name the receiver's `handle`
    instead, with attempt and execution. The tokenizer adds the candidates' bytes.
    """

    slot: SlotField | None
    first: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    counts: TokensI32
    ranks: TokensI32
    ids: TokensI32
    values: TokensF32
    attempt: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    execution: Execution = 0
    texts: Annotated[tuple[TokenBytes, ...], Meta(max_length=MAX_TOKENS)] = ()
    handle: Handle | None = None


class StepCost(Record, frozen=True):
    """How long a worker's steps take, fitted to measured ones: the sum of `fixed_ms`, `token_ms`
    for each new token, `ms_per_m_prefill_pairs` for each million pairs of a prefill chunk (a pair
    is a new token and a token that it attends to, counted where a row has several new tokens), and
    `ms_per_m_kv_tokens` for each million tokens that rows of one new token attend to. Chunks are
    bound by arithmetic, single tokens by memory."""

    fixed_ms: Annotated[float, Meta(ge=0, le=1e6)]
    token_ms: Annotated[float, Meta(ge=0, le=1e6)]
    ms_per_m_prefill_pairs: Annotated[float, Meta(ge=0, le=1e6)]
    ms_per_m_kv_tokens: Annotated[float, Meta(ge=0, le=1e6)] = 0.0


class WorkerFacts(Record, frozen=True):
    """What a worker can hold; sent when it is ready."""

    num_blocks: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    block_size: Annotated[int, Meta(ge=1, le=4096)]
    max_num_seqs: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    max_model_len: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    vocab_size: VocabSize
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    device: Name
    cascade: bool = False
    """It reads blocks that rows of a step have in common once for all of them: steps may bring
    `Shared`."""
    cost: StepCost | None = None
    """None: not measured."""
    max_num_batched_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    """Most tokens of a step, for which it has reserved memory; 0: as many as the scheduler
    likes."""
    max_tokens_per_row: Annotated[int, Meta(ge=1, le=MAX_TOKENS_PER_ROW)] = 1
    """Most tokens that one row of a step may bring; above 1 for a worker that verifies guesses."""
    max_forced_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS_PER_ROW)] = 0
    """Most tokens that a row may bring beyond these, since its grammar left no choice about them.
    Steps need not count on them: the worker takes no more than the row's blocks have room for, and
    where a step in flight finds no room for its own token, its row brings none."""
    pipeline_parallel_size: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Stages through which a step passes, which compute as many steps at a time. A row whose token
    a step in flight samples would have to wait for it."""


class TokenizerFacts(Record, frozen=True):
    """What a tokenizer can do; sent when it is ready."""

    has_text: bool
    """False under --skip-tokenizer-init: token ids only."""
    has_chat_template: bool
    vocab_size: VocabSize
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    longest_token: Count = 0
    """Most characters of a text that one token can stand for; 0: any number."""
    has_reasoning: bool = False
    """Answers of chats begin with reasoning, or may."""
    tool_format: Name = ""
    """How the model's answers call tools; empty without a chat template."""


class Peer(Record, frozen=True):
    """One service as the scheduler sees it."""

    role: Role
    name: Name
    inbox: MaybeInbox
    """Empty: it has ended and is started again, and has no process yet."""
    incarnation: IncarnationField
    ready: bool
    stage: Name = ""
    """What it is doing while not ready, to be shown to users."""
    fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0
    group: Name = ""
    """Processes that run one model together share a group: they are ready, and lost, together.
    Empty: alone."""
    rank: Annotated[int, Meta(ge=0, le=1023)] = 0
    """Its number in the group. Rank 0 receives the steps and answers them."""
    group_size: Annotated[int, Meta(ge=1, le=1024)] = 1
    """How many ranks the group has."""
    failures: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """As the scheduler knows it: lives in a row that ended before this one is ready; above 0 only
    while a service is started again."""


class Shared(Record, frozen=True):
    """Groups of rows whose block tables begin with the same blocks.

    Group g consists of the rows `order[starts[g]:starts[g + 1]]`, indices into the step's
    `run_slots`, whose first `lengths[g]` tokens lie in the same blocks: a multiple of the block
    size, less than the tokens of each member. A row is in one group at most.
    """

    order: RowsI32
    starts: RowsI32
    lengths: RowsI32


class Admission(Record, frozen=True):
    """A request placed in a worker's slot, whole. `blocks` holds the first blocks of its table;
    `computed` tokens of them are filled already (prefix cache). Prompt and output are kept apart:
    penalties and seeds depend on which is which."""

    slot: SlotField
    execution: Execution
    prompt: TokensI32
    output: TokensI32
    blocks: TokensI32
    computed: Count
    sampling: Sampling
    kind: RequestKind = RequestKind.GENERATE
    model: Name = ""
    adapter: Name = ""
    grammar: Grammar | None = None
    """What the output must match; None: anything."""
