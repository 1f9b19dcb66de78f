"""SamplingParams: how a program says what it wants generated, with vLLM's names and defaults, and its translation for the wire.

Values are checked when the object is made, so that a mistake is an error at its own line and not an answer from a service.
"""

import math
from dataclasses import dataclass
from typing import Any

from pagewire_protocol.sampling import (
    GREEDY_BELOW,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    Sampling,
    TextOptions,
)

MAX_N = 16_384
LOWEST_TEMPERATURE = 0.01
INT32 = 2**31 - 1
NOT_YET = {
    "best_of": None,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "logits_processors": None,
    "structured_outputs": None,
    "guided_decoding": None,
    "extra_args": None,
}
"""Known elsewhere, not here: taken with the value that changes nothing, refused by name with any other."""


@dataclass
class SamplingParams:
    """Raises ValueError naming the field, its value and its bounds."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 and 0 are off."""
    min_p: float = 0.0
    seed: int | None = None
    """None: drawn from the engine's seed, so a program that is run again gets the same."""
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as the context holds."""
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[Any] | None = None
    structured_outputs: Any = None
    guided_decoding: Any = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, neutral in NOT_YET.items():
            value = getattr(self, name)
            if value != neutral and value is not None and not (name == "best_of" and value == self.n):
                raise ValueError(f"{name}={value!r} is not supported in this version")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(self.stop_token_ids or ())
        self._check_numbers()
        self._check_stops()
        if GREEDY_BELOW <= self.temperature < LOWEST_TEMPERATURE:
            self.temperature = LOWEST_TEMPERATURE

    def _check_numbers(self) -> None:
        _whole("n", self.n, 1, MAX_N)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _real("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        _real("temperature", self.temperature, 0, 100)
        _real("top_p", self.top_p, 0, 1, open_below=True)
        _whole("top_k", self.top_k, -1, INT32)
        _real("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, INT32)
        _whole("min_tokens", self.min_tokens, 0, INT32)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.n > 1 and self.temperature < GREEDY_BELOW:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}")

    def _check_stops(self) -> None:
        stop, ids = self.stop or [], self.stop_token_ids or []
        if len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
        for text in stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise ValueError(f"stop strings must have 1 to {MAX_STOP_LENGTH} characters, got {text!r:.80}")
        if stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; without text, use stop_token_ids")
        if len(ids) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids takes at most {MAX_STOP_TOKENS} ids, got {len(ids)}")
        for token in ids:
            _whole("stop_token_ids", token, 0, INT32)

    def sampling(self, seed: int) -> Sampling:
        """The worker's and scheduler's part; `seed` is used unless these parameters bring their own."""
        return Sampling(
            seed=seed if self.seed is None else self.seed & (2**63 - 1),
            max_tokens=self.max_tokens or 1,
            min_tokens=self.min_tokens,
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=max(0, self.top_k),
            min_p=float(self.min_p),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            repetition_penalty=float(self.repetition_penalty),
            logprobs=-1 if self.logprobs is None else self.logprobs,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )

    def text_options(self, has_text: bool) -> TextOptions:
        """The tokenizer's part."""
        return TextOptions(
            stop=tuple(self.stop or ()),
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            detokenize=self.detokenize and has_text,
            return_prompt_ids=True,
        )


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
