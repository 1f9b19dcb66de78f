"""One attempt at a request as the scheduler keeps it, and the refusals that need nothing but the
request itself.

Knows tokens and sampling limits; knows no worker's state (its columns while it runs are in
`slots.py`).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NewType

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.columns import BlockId, Incarnation, Slot
from pagewire_protocol.deadlines import deadline_of
from pagewire_protocol.messages import Finish, Submit
from pagewire_protocol.sampling import Sampling
from pagewire_protocol.sampling_checks import fault

from .blocks import extend_chain, root_hash

ReplyRoute = NewType("ReplyRoute", int)
"""The scheduler's number for an inbox that results go to."""
NO_SLOT: Final = Slot(-1)
SUSPECT_DEATHS: Final = 2


class Phase(IntEnum):
    """Where a request is in its life."""

    WAITING = 0
    RUNNING = 1
    """It has a slot and blocks on a worker."""
    DRAINING = 2
    """Preempted; its slot is kept until the steps in flight have returned, since their tokens
    count."""
    ENDED = 3
    PARKED = 4
    """It waits outside the queue until its client reads again."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served: an HTTP status, a message with the numbers, and the parameter
    at fault."""

    status: int
    message: str
    param: str | None = None
    retry_after_s: int = 0


class Request:
    """One attempt at a request, from its Submit to its End.

    `prompt` and `tokens` (prompt, then output) are int32 arrays. While it runs its tokens live in
    its slot and `tokens` is stale. `reply_route` is the number of the inbox that its results go to;
    `number` counts arrivals.
    """

    __slots__ = (
        "adapter",
        "attempt",
        "blocks",
        "chain",
        "chain_block_size",
        "deadline",
        "execution",
        "grammar",
        "handle",
        "kind",
        "leaves",
        "model",
        "num_preemptions",
        "number",
        "parked",
        "phase",
        "priority",
        "prompt",
        "reply_route",
        "rid",
        "root",
        "sampling",
        "slot",
        "tokens",
        "twin",
        "worker",
        "worker_deaths",
    )

    def __init__(
        self, submit: Submit, reply_route: ReplyRoute, number: int, now: float = 0.0
    ) -> None:
        """`now`: when it arrived, in seconds on the scheduler's clock."""
        self.rid = submit.rid
        self.attempt = submit.attempt
        self.handle = submit.handle
        self.reply_route = reply_route
        self.number = number
        self.priority = submit.priority
        self.kind = submit.kind
        self.model = submit.model
        self.adapter = submit.adapter
        self.grammar = submit.grammar
        self.sampling: Sampling = submit.sampling
        self.prompt: NDArray[np.int32] = np.frombuffer(submit.prompt, np.int32)
        self.tokens: NDArray[np.int32]
        self.set_tokens(np.frombuffer(submit.prompt + submit.output, np.int32))
        self.root = root_hash(submit.cache_salt, submit.adapter)
        self.chain: list[bytes] = []
        """Hashes of its full blocks, as far as they were needed."""
        self.chain_block_size = 0
        self.twin: Request | None = None
        """An earlier request with the same prompt and root, whose chain need not be made again."""
        self.phase = Phase.WAITING
        self.deadline = deadline_of(submit.timeout_ms, now)
        """When its owner waits for it no longer."""
        self.execution = 0
        self.num_preemptions = 0
        self.parked = False
        """Its client reads nothing: it is PARKED, or will be when it has left its slot or comes up
        in the queue."""
        self.worker_deaths = submit.worker_deaths
        """Workers in a row that ended while they computed its next token."""
        self.worker: Incarnation | None = None
        """The incarnation of the worker in whose slot it is."""
        self.leaves: Incarnation | None = None
        """The worker that it was taken from so that another one has something to do."""
        self.slot = NO_SLOT
        self.blocks: list[BlockId] = []

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the lower priority number, then the earlier arrival."""
        return self.priority, self.number

    @property
    def max_len(self) -> int:
        """Tokens that it can grow to."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def output_len(self) -> int:
        """Tokens of output in `tokens`."""
        return len(self.tokens) - len(self.prompt)

    @property
    def is_suspect(self) -> bool:
        """Two workers have ended while they computed this request's next token: that one is
        computed alone."""
        return self.worker_deaths >= SUSPECT_DEATHS

    @property
    def wants_prompt_logprobs(self) -> bool:
        """The log-probabilities of its prompt are still wanted, so all of it must be computed."""
        return self.sampling.prompt_logprobs >= 0

    def set_tokens(self, tokens: NDArray[np.int32]) -> None:
        """`tokens` are all that exist. Output among them came after the log-probabilities of the
        whole prompt, which are not wanted twice."""
        self.tokens = tokens
        if self.wants_prompt_logprobs and self.output_len:
            self.sampling = replace(self.sampling, prompt_logprobs=-1)

    def extend_chain(self, block_size: int, tokens: NDArray[np.int32]) -> list[bytes]:
        """The hashes of the full blocks of `tokens`, which are this request's from its first one
        on."""
        if self.chain_block_size != block_size:
            twin = self.twin
            if twin is not None and twin.chain_block_size == block_size:
                self.chain = twin.chain[: len(self.prompt) // block_size]
            else:
                self.chain = []
            self.chain_block_size = block_size
            self.twin = None
        extend_chain(self.chain, self.root, tokens, block_size)
        return self.chain

    def finish_at(
        self, token: int, output_len: int, eos: frozenset[int]
    ) -> tuple[Finish, int | None] | None:
        """How the request ends when `token` is its `output_len`-th output token, with the stop
        token id to report; None when it goes on."""
        if output_len >= self.sampling.min_tokens:
            if token in self.sampling.stop_token_ids:
                return Finish.STOP, token
            if token in eos and not self.sampling.ignore_eos:
                return Finish.STOP, None
        return (Finish.LENGTH, None) if output_len >= self.sampling.max_tokens else None


def malformed(submit: Submit) -> Refusal | None:
    """What is wrong with a submission whoever serves it. Everything else about it is checked
    before, by its wire type."""
    if len(submit.prompt) % 4 or len(submit.output) % 4:
        return Refusal(
            400,
            "token ids must be a column of int32: its length is no multiple of 4 bytes",
            "prompt",
        )
    if not submit.prompt:
        return Refusal(400, "the prompt is empty; give at least one token", "prompt")
    wrong = fault(submit.sampling, 0)
    return None if wrong is None else Refusal(400, *wrong)


def token_outside_vocabulary(request: Request, vocab_size: int) -> Refusal | None:
    """A token, in the prompt or among those that sampling speaks of, that the model does not
    have."""
    wrong = fault(request.sampling, vocab_size)
    if wrong is not None:
        return Refusal(400, *wrong)
    low = int(request.tokens.min())
    high = int(request.tokens.max())
    if low >= 0 and high < vocab_size:
        return None
    outside = low if low < 0 else high
    return Refusal(
        400,
        f"token id {outside} is outside the model's vocabulary of {vocab_size} tokens (0 to {vocab_size - 1})",
        "prompt",
    )
