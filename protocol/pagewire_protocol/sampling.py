"""How the next token is chosen: the part of a request that the worker needs, and the part that only
the tokenizer needs.

The split keeps text out of the scheduler and the worker. Limits are stated once, here, and checked
again wherever a message is decoded.

A token is a function of logits, seed and position, the same on a CPU and on a GPU. The position is
the index, in prompt and output together, of the token whose logits are sampled from. Where the
temperature is under GREEDY_BELOW, the largest logit wins. Otherwise min-p, top-k and top-p leave
some tokens, and the one with the largest sum of logit / temperature and Gumbel noise wins, the
lowest id among equals. The noise of token v is -log(-log(1 - u)) with u = (word + 0.5) / 2^32,
where word is number v mod 4 of the four that Philox4x32-10 gives for the key (seed mod 2^32, seed
div 2^32) and the counter (v div 4, position mod 2^32, position div 2^32, 0). The arithmetic is
float32's; `pagewire_kernels.sampling_map.sample` is this text as code, and two back ends may differ
only where float32 cannot tell two tokens apart, or at the edge of what top-p keeps.
"""

from enum import IntEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from .columns import MAX_ROWS, RowsI32

MAX_LOGPROBS: Final = 20
MAX_BIAS: Final = 1024
"""Token ids that one request may bias."""
MAX_BIAS_VALUE: Final = 100.0
"""A bias lies between this and its negative."""
MAX_ALLOWED_IDS: Final = MAX_ROWS
"""Token ids of an `allowed_ids` column."""
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_LENGTH: Final = 256
"""Characters of one bad word."""
MAX_BAD_WORD_TOKENS: Final = 64
MAX_STOP_STRINGS: Final = 16
MAX_STOP_LENGTH: Final = 1024
MAX_STOP_TOKENS: Final = 128
GREEDY_BELOW: Final = 1e-5
"""A temperature under this is greedy, as in vLLM."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
BadWord = Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]


class Sampling(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the scheduler and the worker need. Defaults are neutral: they leave the model's
    distribution as it is.

    `seed` is always set by the owner: a token is a function of logits, seed and position (see the
    top of this file), so a resumed request continues the same random draw.
    """

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    """0: prefill only. The request ends when its prompt is computed, and no token is sampled."""
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """0 is off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    """Most likely tokens to report beside the sampled one; -1 reports none at all, 0 only the
    sampled one."""
    ignore_eos: bool = False
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKENS)] = ()
    bias_ids: Annotated[bytes, Meta(max_length=4 * MAX_BIAS)] = b""
    """Token ids (int32 column) whose logits `bias_values` (float32 column) is added to."""
    bias_values: Annotated[bytes, Meta(max_length=4 * MAX_BIAS)] = b""
    allowed_ids: RowsI32 = b""
    """When not empty, no other token is sampled (int32 column)."""
    bad_words: Annotated[
        tuple[Annotated[bytes, Meta(max_length=4 * MAX_BAD_WORD_TOKENS)], ...],
        Meta(max_length=2 * MAX_BAD_WORDS),
    ] = ()
    """Sequences of token ids (int32 columns) whose last token is not sampled after the others. The
    tokenizer fills this in."""
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    """As `logprobs`, for each prompt token but the first. The prompt is then computed whole,
    whatever the prefix cache holds."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a random draw."""
        return self.temperature < GREEDY_BELOW


class SamplingDefaults(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What requests get that do not say it themselves, by the model's own recommendation. None: as
    without one."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """-1 and 0 are off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Of answers in conversations; at most what the context leaves."""


class ToolChoice(IntEnum):
    """Whether an answer may or must call tools."""

    NONE = 0
    AUTO = 1
    REQUIRED = 2
    """At least one call, of any tool."""
    NAMED = 3
    """A call of one function."""


class AnswerOptions(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the answer of a chat is taken apart into reasoning, content and tool calls, and what must
    be in it. The tools are in the Chat."""

    tool_choice: ToolChoice = ToolChoice.NONE
    tool_name: Annotated[str, Meta(max_length=256)] = ""
    """The function of NAMED."""
    parallel_tool_calls: bool = True
    """More than one call."""
    thinking_budget: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    """Tokens of reasoning after which it is ended; -1: any number."""


class TextOptions(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the tokenizer needs to turn token ids into the text the client asked for."""

    stop: Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    return_prompt_ids: bool = False
    bad_words: Annotated[tuple[BadWord, ...], Meta(max_length=MAX_BAD_WORDS)] = ()
    truncate_prompt: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0
    """Keep the last so many prompt tokens; -1: as many as the context holds beside max_tokens; 0:
    all."""
    answer: AnswerOptions | None = None
    """None: all text is content."""
