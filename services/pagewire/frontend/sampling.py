"""How tokens are chosen: a request's knobs as the protocol's Sampling and TextOptions. Knows
ranges; knows no prompt and no stack.

Everything is counted before it is copied, and every refusal names the parameter.
"""

import secrets
from typing import Final

import msgspec
from pagewire_protocol.columns import pack
from pagewire_protocol.sampling import (
    GREEDY_BELOW,
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    Sampling,
    TextOptions,
)

from ..requests.errors import bad
from .limits import I31, above_zero, at_most, short, within
from .openai import Request

MAX_BIAS_VALUE: Final = 100.0
MAX_BAD_WORD: Final = 256
MAX_ALLOWED: Final = 65_536
LOWEST_TEMPERATURE: Final = 0.01
"""A temperature between greedy and this becomes this: below, the logits' quotients overflow."""
_SEED: Final = 2**63
_GOLDEN: Final = 0x9E3779B97F4A7C15
_U64: Final = 2**64 - 1


def sampling_of(
    request: Request, max_tokens: int, logprobs: int, scored: int, vocab_size: int
) -> Sampling:
    """`scored`: candidates to report for each prompt token, -1 for none. `vocab_size` 0: not
    known."""
    minimum = within("min_tokens", request.min_tokens, 0, I31, 0)
    if minimum > max_tokens:
        raise bad(
            f"`min_tokens` is {minimum} but at most {max_tokens} tokens are asked for.",
            "min_tokens",
        )
    stops = request.stop_token_ids or []
    at_most("stop_token_ids", len(stops), MAX_STOP_TOKENS, "ids")
    top_p, repetition = (
        above_zero("top_p", request.top_p, 1.0),
        above_zero("repetition_penalty", request.repetition_penalty, 100.0),
    )
    bias_ids, bias_values = _bias(request.logit_bias, vocab_size)
    return Sampling(
        seed=_seed(request.seed),
        max_tokens=max_tokens,
        min_tokens=minimum,
        temperature=_temperature(request.temperature),
        top_p=top_p,
        top_k=max(0, within("top_k", request.top_k, -1, I31, 0)),
        min_p=within("min_p", request.min_p, 0.0, 1.0, 0.0),
        presence_penalty=within("presence_penalty", request.presence_penalty, -2.0, 2.0, 0.0),
        frequency_penalty=within("frequency_penalty", request.frequency_penalty, -2.0, 2.0, 0.0),
        repetition_penalty=repetition,
        logprobs=logprobs,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(within("stop_token_ids", token, 0, I31, 0) for token in stops),
        bias_ids=bias_ids,
        bias_values=bias_values,
        allowed_ids=_allowed(request.allowed_token_ids, vocab_size),
        prompt_logprobs=scored,
    )


def candidates(name: str, asked: int | None) -> int:
    """How many candidates a parameter of the log-probability kind asks for; -1: none at all."""
    return -1 if asked is None else within(name, asked, 0, MAX_LOGPROBS, 0)


def is_greedy(request: Request) -> bool:
    return request.temperature is not None and request.temperature < GREEDY_BELOW


def _temperature(given: float | None) -> float:
    value = within("temperature", given, 0.0, 100.0, 1.0)
    return LOWEST_TEMPERATURE if GREEDY_BELOW <= value < LOWEST_TEMPERATURE else value


def _bias(given: dict[str, float] | None, vocab_size: int) -> tuple[bytes, bytes]:
    if not given:
        return b"", b""
    at_most("logit_bias", len(given), MAX_BIAS, "tokens")
    ids: list[int] = []
    for name, value in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 10):
            raise bad(
                f"`logit_bias` has the key {name[:32]!r}; its keys are token ids.", "logit_bias"
            )
        ids.append(_in_vocabulary("logit_bias", int(name), vocab_size))
        within("logit_bias", value, -MAX_BIAS_VALUE, MAX_BIAS_VALUE, 0.0)
    return pack("i", ids), pack("f", given.values())


def _allowed(given: list[int] | None, vocab_size: int) -> bytes:
    if given is None:
        return b""
    if not given:
        raise bad(
            "`allowed_token_ids` is empty: it must hold at least 1 token id.", "allowed_token_ids"
        )
    at_most("allowed_token_ids", len(given), MAX_ALLOWED, "token ids")
    return pack("i", [_in_vocabulary("allowed_token_ids", token, vocab_size) for token in given])


def _in_vocabulary(name: str, token: int, vocab_size: int) -> int:
    top = vocab_size - 1 if vocab_size else I31
    if not 0 <= token <= top:
        raise bad(
            f"`{name}` has the token id {short(token)}, which is not between 0 and {top}.", name
        )
    return token


def text_options(request: Request) -> TextOptions:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    at_most("stop", len(stop), MAX_STOP_STRINGS, "strings")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise bad(
                f"A string in `stop` must have 1 to {MAX_STOP_LENGTH} characters, got {len(text)}.",
                "stop",
            )
    words = request.bad_words or []
    at_most("bad_words", len(words), MAX_BAD_WORDS, "strings")
    for word in words:
        if not 1 <= len(word) <= MAX_BAD_WORD:
            raise bad(
                f"A string in `bad_words` must have 1 to {MAX_BAD_WORD} characters, got {len(word)}.",
                "bad_words",
            )
    truncate = within("truncate_prompt_tokens", request.truncate_prompt_tokens, -1, I31, 0)
    if request.truncate_prompt_tokens == 0:
        raise bad(
            "`truncate_prompt_tokens` must be -1 (what the context holds) or at least 1, got 0.",
            "truncate_prompt_tokens",
        )
    return TextOptions(
        stop=tuple(stop),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        return_prompt_ids=bool(request.return_token_ids),
        bad_words=tuple(words),
        truncate_prompt=truncate,
    )


# --- seeds ---


def _seed(given: int | None) -> int:
    if given is None:
        return secrets.randbits(63)
    if not -_SEED <= given < 2 * _SEED:
        raise bad(f"`seed` must be a 64-bit integer, got {short(given)}.", "seed")
    return given % _SEED


def with_seed(sampling: Sampling, choice: int) -> Sampling:
    """Choice 0 keeps the seed; the others get one mixed from it by SplitMix64's finaliser, so that
    choices are unlike each other."""
    if choice == 0:
        return sampling
    mixed = (sampling.seed + choice * _GOLDEN) & _U64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _U64
    return msgspec.structs.replace(sampling, seed=(mixed ^ (mixed >> 31)) % _SEED)
