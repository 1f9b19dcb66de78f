"""The parameters of a request: one table of names, types, bounds and defaults, and the words that
refuse a value.

The HTTP endpoints, `SamplingParams` and `pagewire run-batch` all check with it and translate with
it (`sampling.py`); docs/http.md shows it. A new scalar parameter is a row here.
"""

from collections.abc import Callable, Iterable, Sized
from enum import Enum
from typing import Any, Final

from msgspec import Struct
from pagewire_protocol.columns import MAX_CACHE_SALT
from pagewire_protocol.sampling import (
    GREEDY_BELOW,
    MAX_ALLOWED_IDS,
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_BIAS_VALUE,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)

from .beam_search import MAX_WIDTH
from .errors import invalid

MAX_INT32: Final = 2**31 - 1
MAX_N: Final = 1024
"""Choices of one prompt."""
LOWEST_TEMPERATURE: Final = 0.01
"""Below, the logits' quotients overflow."""


class ActsIn(Enum):
    """The service whose work a parameter changes."""

    OWNER = "frontend"
    """Whoever owns the request: the HTTP frontend or the program with `LLM`."""
    TOKENIZER = "tokenizer"
    SCHEDULER = "scheduler"
    WORKER = "worker"


class Parameter(Struct, frozen=True):
    """One row. With `max_items` the parameter is a list, and `type`, `low` and `high` are of its
    items; of strings, `low` and `high` bound the number of characters."""

    name: str
    type: type
    low: Any
    high: Any
    """None where there are no bounds."""
    default: Any
    """What None stands for."""
    acts_in: ActsIn
    above_low: bool = False
    """`low` itself is out of bounds."""
    max_items: int | None = None
    min_items: int = 0
    ignored_by_beams: bool = False
    """Beam search goes by the model's own log-probabilities and by token ids, so it could only
    ignore this: any value but the neutral one, the default, is refused beside it."""
    wire: str = ""
    """The field of `Sampling` (of `TextOptions` where it acts in the tokenizer) that the value
    goes to as it is, or by `to_wire`. Empty: no such field."""
    to_wire: Callable[[Any], Any] | None = None
    offline_only: bool = False
    """Of `SamplingParams`, and not of HTTP requests."""


def effective_temperature(value: float) -> float:
    """What a temperature between greedy and LOWEST_TEMPERATURE becomes; any other stays."""
    return LOWEST_TEMPERATURE if GREEDY_BELOW <= value < LOWEST_TEMPERATURE else value


def _top_k_to_wire(value: int) -> int:
    """-1 and 0 both mean off, which the wire calls 0."""
    return max(0, value)


OWNER, TOKENIZER, SCHEDULER, WORKER = ActsIn
# fmt: off
_ROWS: Final = (
    #         name, type, low, high, default, acts in
    # --- how many answers, and how they are found
    Parameter("n", int, 1, MAX_N, 1, OWNER),
    Parameter("best_of", int, 1, MAX_N, None, OWNER),
    Parameter("use_beam_search", bool, None, None, False, OWNER),
    Parameter("length_penalty", float, -100.0, 100.0, 1.0, OWNER),
    Parameter("early_stopping", object, None, None, False, OWNER),
    Parameter("seed", int, -(2**63), 2**63 - 1, None, WORKER),
    # --- how long an answer may be
    Parameter("max_tokens", int, 1, MAX_INT32, 16, SCHEDULER),
    Parameter("min_tokens", int, 0, MAX_INT32, 0, WORKER, wire="min_tokens"),
    Parameter("ignore_eos", bool, None, None, False, SCHEDULER, wire="ignore_eos"),
    Parameter("stop", str, 1, MAX_STOP_LENGTH, (), TOKENIZER, max_items=MAX_STOP_STRINGS, ignored_by_beams=True,
              wire="stop", to_wire=tuple),
    Parameter("stop_token_ids", int, 0, MAX_INT32, (), SCHEDULER, max_items=MAX_STOP_TOKENS, wire="stop_token_ids", to_wire=tuple),
    # --- how a token is chosen
    Parameter("temperature", float, 0.0, 100.0, 1.0, WORKER, wire="temperature", to_wire=effective_temperature),
    Parameter("top_p", float, 0.0, 1.0, 1.0, WORKER, above_low=True, wire="top_p"),
    Parameter("top_k", int, -1, MAX_INT32, -1, WORKER, wire="top_k", to_wire=_top_k_to_wire),
    Parameter("min_p", float, 0.0, 1.0, 0.0, WORKER, ignored_by_beams=True, wire="min_p"),
    Parameter("presence_penalty", float, -2.0, 2.0, 0.0, WORKER, ignored_by_beams=True, wire="presence_penalty"),
    Parameter("frequency_penalty", float, -2.0, 2.0, 0.0, WORKER, ignored_by_beams=True, wire="frequency_penalty"),
    Parameter("repetition_penalty", float, 0.0, 100.0, 1.0, WORKER, above_low=True, ignored_by_beams=True, wire="repetition_penalty"),
    Parameter("logit_bias", float, -MAX_BIAS_VALUE, MAX_BIAS_VALUE, None, WORKER, max_items=MAX_BIAS, ignored_by_beams=True),
    Parameter("allowed_token_ids", int, 0, MAX_INT32, None, WORKER, min_items=1, max_items=MAX_ALLOWED_IDS, ignored_by_beams=True),
    Parameter("bad_words", str, 1, MAX_BAD_WORD_LENGTH, (), TOKENIZER, max_items=MAX_BAD_WORDS, ignored_by_beams=True,
              wire="bad_words", to_wire=tuple),
    # --- what comes back
    Parameter("logprobs", int, 0, MAX_LOGPROBS, None, WORKER),
    Parameter("prompt_logprobs", int, 0, MAX_LOGPROBS, None, WORKER, ignored_by_beams=True),
    Parameter("include_stop_str_in_output", bool, None, None, False, TOKENIZER, wire="include_stop"),
    Parameter("detokenize", bool, None, None, True, TOKENIZER, wire="detokenize", offline_only=True),
    Parameter("skip_special_tokens", bool, None, None, True, TOKENIZER, wire="skip_special_tokens"),
    Parameter("spaces_between_special_tokens", bool, None, None, True, TOKENIZER, wire="spaces_between_special_tokens"),
    # --- the prompt, and the request's turn
    Parameter("truncate_prompt_tokens", int, -1, MAX_INT32, None, TOKENIZER),
    Parameter("priority", int, -(2**31), MAX_INT32, 0, SCHEDULER),
    Parameter("cache_salt", str, 1, MAX_CACHE_SALT, "", SCHEDULER),
)
# fmt: on
PARAMETERS: Final = {row.name: row for row in _ROWS}
HTTP_SCALARS: Final = [
    row for row in _ROWS if row.wire and row.max_items is None and not row.offline_only
]
"""Those that an HTTP request sends as one value, which goes to the wire as it is."""
BEAM_WIDTH: Final = Parameter("beam_width", int, 1, MAX_WIDTH, None, OWNER)
"""Of `LLM.beam_search`; in a request, `best_of` is the width."""


# --- one value against its row ---


def checked(parameter: Parameter, value: Any, name: str = "") -> Any:
    """The value of a parameter that is no list, or its default for None. `name` is what the sender
    calls the parameter, where that is not its name here. Raises RequestError."""
    if value is None:
        return parameter.default
    name = name or parameter.name
    if parameter.type is bool:
        return bool(value)
    if parameter.type is str:
        return _checked_name(parameter, value, name)
    _check_bounds(parameter, value, name)
    return value


def checked_items(parameter: Parameter, values: Iterable[Any] | None) -> Any:
    """The values of a list parameter, or its default for None. Raises RequestError."""
    if values is None:
        return parameter.default
    items = list(values)
    check_count(parameter, items)
    for item in items:
        if parameter.type is str:
            _check_text(parameter, item)
        else:
            _check_bounds(parameter, item, parameter.name)
    return items


def check_count(parameter: Parameter, values: Sized) -> None:
    """Counted before anything is copied. Raises RequestError."""
    count = len(values)
    name = parameter.name
    what = "strings" if parameter.type is str else "token ids"
    if parameter.max_items is not None and count > parameter.max_items:
        raise invalid(f"`{name}` may hold at most {parameter.max_items} {what}, got {count}.", name)
    if count < parameter.min_items:
        raise invalid(f"`{name}` is empty: it must hold at least 1 of {what}.", name)


def check_value(parameter: Parameter, value: Any) -> None:
    """One number of a mapping parameter. Raises RequestError."""
    _check_bounds(parameter, value, parameter.name)


def shown(value: Any) -> str:
    """A value for a refusal: no longer than a line, whatever was sent."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) >= 10**20:
            return f"{'-' if value < 0 else ''}more than 1e20"
        # JSON readers make 101 of a number parameter 101.0.
        return str(int(value)) if value == value // 1 else str(value)
    return f"{value!r:.80}"


def _check_bounds(parameter: Parameter, value: Any, name: str) -> None:
    number = int if parameter.type is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, number):
        kind = "a whole number" if parameter.type is int else "a number"
        raise invalid(f"`{name}` must be {kind}, got {shown(value)}.", name)
    low = parameter.low
    high = parameter.high
    if low <= value <= high and not (parameter.above_low and value == low):
        return
    bounds = f"above {low:g} and at most {high:g}"
    if not parameter.above_low:
        bounds = f"between {_bound(low)} and {_bound(high)}"
    raise invalid(f"`{name}` must be {bounds}, got {shown(value)}.", name)


def _bound(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_text(parameter: Parameter, text: Any) -> None:
    if not isinstance(text, str):
        raise invalid(f"`{parameter.name}` holds strings, got {shown(text)}.", parameter.name)
    if not parameter.low <= len(text) <= parameter.high:
        raise invalid(
            f"A string in `{parameter.name}` must have {parameter.low} to {parameter.high} "
            f"characters, got {len(text)}.",
            parameter.name,
        )


def _checked_name(parameter: Parameter, value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be a string, got {shown(value)}.", name)
    if not parameter.low <= len(value) <= parameter.high:
        raise invalid(
            f"`{name}` must have {parameter.low} to {parameter.high} characters, got {len(value)}.",
            name,
        )
    return value


# --- rules of single parameters ---


def checked_max_tokens(
    value: int | None, name: str = "max_tokens", *, scores_prompt: bool = False
) -> int | None:
    """None where the answer may take what the context leaves. `scores_prompt`: the request wants to
    know of its prompt, so that 0 tokens are an answer too. Raises RequestError."""
    if value == 0 and scores_prompt:
        return 0
    return None if value is None else checked(PARAMETERS["max_tokens"], value, name)


def checked_logprobs(name: str, value: int | None) -> int:
    """How many of the most likely tokens a parameter of this kind asks for, on the wire's terms: -1
    where it asks for no log-probabilities at all. Raises RequestError."""
    row = PARAMETERS["prompt_logprobs" if name == "prompt_logprobs" else "logprobs"]
    return -1 if value is None else checked(row, value, name)


def checked_truncation(value: int | None) -> int:
    """`TextOptions.truncate_prompt`: 0 keeps the prompt whole. Raises RequestError."""
    kept = checked(PARAMETERS["truncate_prompt_tokens"], value)
    if kept == 0:
        raise invalid(
            "`truncate_prompt_tokens` must be -1 (what the context holds) or at least 1, got 0.",
            "truncate_prompt_tokens",
        )
    return 0 if kept is None else kept


def check_min_tokens(min_tokens: int, max_tokens: int | None) -> None:
    """`max_tokens` None: no limit of its own. Raises RequestError."""
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid(
            f"`min_tokens` is {min_tokens} but at most {max_tokens} tokens are asked for.",
            "min_tokens",
        )
