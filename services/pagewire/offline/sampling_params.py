"""SamplingParams and BeamSearchParams: how a program says what it wants generated, with vLLM's
names, defaults and order, past and present.

Values are checked when the object is made, so that a mistake is an error at its own line and not an
answer from a service. wire.py translates them for the services.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

from pagewire_protocol.sampling import (
    GREEDY_BELOW,
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)

from ..requests.beam_search import MAX_WIDTH

MAX_N = 16_384
LOWEST_TEMPERATURE = 0.01
MAX_ALLOWED = 65_536
MAX_BAD_WORD_LENGTH = 256
MAX_BIAS_VALUE = 100
INT32 = 2**31 - 1
UNSUPPORTED = ("logits_processors", "structured_outputs", "guided_decoding", "extra_args")
"""Known elsewhere, not here: refused by name unless they are None or empty."""
BEAM_NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "stop": [],
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
}
"""What beam search, which follows the model's own log-probabilities, could only ignore."""


@dataclass
class SamplingParams:
    """Raises ValueError naming the field, its value and its bounds."""

    n: int = 1
    best_of: int | None = None
    """So many are generated and the `n` with the highest cumulative log-probability returned, best
    first. With beam search the width."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 and 0 are off."""
    min_p: float = 0.0
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as the context holds."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    seed: int | None = None
    """None and -1: drawn from the engine's seed, so a program that is run again gets the same."""
    min_tokens: int = 0
    detokenize: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    """Keep the last so many tokens of the prompt; -1: as many as the context holds beside
    max_tokens."""
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[Any] | None = None
    structured_outputs: Any = None
    guided_decoding: Any = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r:.80} is not supported in this version"
                )
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(self.stop_token_ids or ())
        self.seed = None if self.seed == -1 else self.seed
        self._check_numbers()
        self._check_stops()
        self._check_tokens()
        if self.use_beam_search:
            self._check_beams()
        else:
            self._check_draws()
        if GREEDY_BELOW <= self.temperature < LOWEST_TEMPERATURE:
            self.temperature = LOWEST_TEMPERATURE

    @property
    def width(self) -> int:
        """How many continuations are generated to return `n` of them."""
        return self.best_of or self.n

    def clone(self) -> "SamplingParams":
        return copy.deepcopy(self)

    def _check_numbers(self) -> None:
        _whole("n", self.n, 1, MAX_N)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _real("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        _real("temperature", self.temperature, 0, 100)
        _real("top_p", self.top_p, 0, 1, open_below=True)
        _whole("top_k", self.top_k, -1, INT32)
        _real("min_p", self.min_p, 0, 1)
        _whole("min_tokens", self.min_tokens, 0, INT32)
        for name, low, high in (
            ("seed", -(2**63), 2**63 - 1),
            ("max_tokens", 1, INT32),
            ("best_of", 1, MAX_N),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("truncate_prompt_tokens", -1, INT32),
        ):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), low, high)
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be -1 or at least 1, got 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(
                f"best_of must be greater than or equal to n, got n={self.n} and best_of={self.best_of}."
            )

    def _check_stops(self) -> None:
        stop, ids = self.stop or [], self.stop_token_ids or []
        if len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
        for text in stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise ValueError(
                    f"stop strings must have 1 to {MAX_STOP_LENGTH} characters, got {text!r:.80}"
                )
        if stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; without text, use stop_token_ids")
        if len(ids) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids takes at most {MAX_STOP_TOKENS} ids, got {len(ids)}")
        for token in ids:
            _whole("stop_token_ids", token, 0, INT32)

    def _check_tokens(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if len(bias) > MAX_BIAS:
            raise ValueError(f"logit_bias takes at most {MAX_BIAS} token ids, got {len(bias)}")
        for token, value in bias.items():
            _whole("a token id in logit_bias", _as_id(token), 0, INT32)
            _real(f"logit_bias of token {token}", value, -MAX_BIAS_VALUE, MAX_BIAS_VALUE)
        self.logit_bias = {int(token): float(value) for token, value in bias.items()} or None
        if self.allowed_token_ids is not None:
            if not 1 <= len(self.allowed_token_ids) <= MAX_ALLOWED:
                raise ValueError(
                    f"allowed_token_ids takes 1 to {MAX_ALLOWED} ids, got {len(self.allowed_token_ids)}"
                )
            for token in self.allowed_token_ids:
                _whole("allowed_token_ids", token, 0, INT32)
        words = self.bad_words = list(self.bad_words or ()) or None
        if words is not None and len(words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words takes at most {MAX_BAD_WORDS} words, got {len(words)}")
        for word in words or ():
            if not isinstance(word, str) or not 1 <= len(word) <= MAX_BAD_WORD_LENGTH:
                raise ValueError(
                    f"bad_words must have 1 to {MAX_BAD_WORD_LENGTH} characters, got {word!r:.80}"
                )

    def _check_draws(self) -> None:
        """What is wrong only without beam search."""
        if self.early_stopping is not False:
            raise ValueError(
                "early_stopping is not effective and must be False when not using beam search."
            )
        if self.length_penalty != 1.0:
            raise ValueError(
                "length_penalty is not effective and must be the default value of 1.0 when not using beam search."
            )
        if self.temperature < GREEDY_BELOW:
            if self.best_of is not None and self.best_of > 1:
                raise ValueError(
                    f"best_of must be 1 when using greedy sampling.Got {self.best_of}."
                )
            if self.n > 1:
                raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}")

    def _check_beams(self) -> None:
        if self.width == 1:
            raise ValueError(
                f"best_of must be greater than 1 when using beam search. Got {self.width}."
            )
        if self.temperature >= GREEDY_BELOW:
            raise ValueError("temperature must be 0 when using beam search.")
        if self.top_p != 1.0:
            raise ValueError("top_p must be 1 when using beam search.")
        if self.top_k not in (-1, 0):
            raise ValueError("top_k must be -1 when using beam search.")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping must be True, False, or 'never', got {self.early_stopping}."
            )
        _real("length_penalty", self.length_penalty, -100, 100)
        _whole("best_of", self.width, 2, MAX_WIDTH)
        for name, neutral in BEAM_NEUTRAL.items():
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} has no effect on beam search and must be left out, got {getattr(self, name)!r:.80}"
                )


@dataclass
class BeamSearchParams:
    """Of `LLM.beam_search`. Raises ValueError naming the field, its value and its bounds."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | Literal["never"] = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _whole("beam_width", self.beam_width, 1, MAX_WIDTH)
        _whole("max_tokens", self.max_tokens, 1, INT32)
        _real("length_penalty", self.length_penalty, -100, 100)
        if self.temperature >= GREEDY_BELOW:
            raise ValueError(
                f"temperature={self.temperature}: beams follow the model's own log-probabilities, so only 0 is supported"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping must be True, False, or 'never', got {self.early_stopping}."
            )


def _as_id(token: Any) -> Any:
    """JSON's keys are strings."""
    return int(token) if isinstance(token, str) and token.lstrip("-").isdecimal() else token


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _real(name: str, value: Any, low: float, high: float, open_below: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (open_below and value == low):
        raise ValueError(
            f"{name} must be {'above' if open_below else 'from'} {low}{', at most' if open_below else ' to'} {high}, got {value}"
        )
