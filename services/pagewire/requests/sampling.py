"""A request's parameters as the protocol's Sampling and TextOptions. Knows the table of parameters;
knows no prompt and no stack.

Everything is counted before it is copied, and every refusal names the parameter.
"""

from collections.abc import Mapping
from typing import Any, Final

from pagewire_protocol.columns import pack
from pagewire_protocol.sampling import AnswerOptions, Sampling, SamplingDefaults, TextOptions

from .choices import choices_of
from .errors import invalid
from .parameters import (
    MAX_INT32,
    PARAMETERS,
    ActsIn,
    Parameter,
    check_count,
    check_min_tokens,
    check_value,
    checked,
    checked_items,
    checked_logprobs,
    checked_max_tokens,
    checked_truncation,
    shown,
)

_ON_WIRE: Final = [row for row in PARAMETERS.values() if row.wire]
_SAMPLING_ROWS: Final = [row for row in _ON_WIRE if row.acts_in is not ActsIn.TOKENIZER]
_TEXT_ROWS: Final = [row for row in _ON_WIRE if row.acts_in is ActsIn.TOKENIZER]
_DEFAULTS: Final = {
    row.wire: row.to_wire(row.default) if row.to_wire else row.default for row in _ON_WIRE
}
_NO_DEFAULTS: Final = SamplingDefaults()
_ID_DIGITS: Final = 10
"""Of the largest token id that a message holds."""


def sampling_of(
    source: object,
    *,
    seed: int = 0,
    max_tokens: int,
    logprobs: int,
    prompt_logprobs: int,
    vocab_size: int,
    defaults: SamplingDefaults = _NO_DEFAULTS,
) -> Sampling:
    """The protocol's Sampling, from the attributes of `source` that are named as the parameters;
    one that is missing counts as None.

    `logprobs` and `prompt_logprobs` are numbers of candidates, -1 for none. `vocab_size` 0: not
    known yet. `defaults`: the model's, for what `source` does not say. Raises RequestError.
    """
    fields = _wire_fields(_SAMPLING_ROWS, source, defaults)
    check_min_tokens(fields["min_tokens"], max_tokens)
    bias_ids, bias_values = _bias(getattr(source, "logit_bias", None), vocab_size)
    return Sampling(
        seed=seed,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        bias_ids=bias_ids,
        bias_values=bias_values,
        allowed_ids=_allowed(getattr(source, "allowed_token_ids", None), vocab_size),
        **fields,
    )


def text_options_of(
    source: object,
    *,
    return_prompt_ids: bool,
    has_text: bool,
    answer: AnswerOptions | None = None,
) -> TextOptions:
    """The protocol's TextOptions, from the same attributes. `has_text`: the stack has a tokenizer.
    `answer`: of a chat whose answers have parts. Raises RequestError."""
    fields = _wire_fields(_TEXT_ROWS, source)
    if fields["stop"] and not fields["detokenize"]:
        raise invalid(
            "`stop` strings need detokenize=True; without text, use `stop_token_ids`.", "stop"
        )
    fields["detokenize"] = fields["detokenize"] and has_text
    return TextOptions(
        return_prompt_ids=return_prompt_ids,
        truncate_prompt=checked_truncation(getattr(source, "truncate_prompt_tokens", None)),
        answer=answer,
        **fields,
    )


def check_parameters(source: object) -> None:
    """Everything that can be said of parameters before a model is known. Raises RequestError."""
    for name in ("logprobs", "prompt_logprobs"):
        checked_logprobs(name, getattr(source, name, None))
    max_tokens = checked_max_tokens(
        getattr(source, "max_tokens", None),
        scores_prompt=getattr(source, "prompt_logprobs", None) is not None,
    )
    checked(PARAMETERS["seed"], getattr(source, "seed", None))
    text_options_of(source, return_prompt_ids=False, has_text=True)
    sampling_of(
        source,
        max_tokens=MAX_INT32 if max_tokens is None else max_tokens,
        logprobs=-1,
        prompt_logprobs=-1,
        vocab_size=0,
    )
    choices_of(source)


def _wire_fields(
    rows: list[Parameter], source: object, defaults: SamplingDefaults = _NO_DEFAULTS
) -> dict[str, Any]:
    """Of the rows, by their names on the wire. Most requests give few parameters, so what is not
    given takes no check."""
    fields: dict[str, Any] = {}
    has_defaults = defaults != _NO_DEFAULTS
    for row in rows:
        value: Any = getattr(source, row.name, None)
        if value is None and has_defaults:
            value = getattr(defaults, row.name, None)
        fields[row.wire] = _DEFAULTS[row.wire] if value is None else _wire_value(row, value)
    return fields


def _wire_value(parameter: Parameter, value: Any) -> Any:
    if parameter.max_items is None:
        value = checked(parameter, value)
    else:
        value = checked_items(parameter, [value] if isinstance(value, str) else value)
    return parameter.to_wire(value) if parameter.to_wire else value


def _bias(bias: Mapping[Any, Any] | None, vocab_size: int) -> tuple[bytes, bytes]:
    """Columns of token ids and of what is added to their logits. JSON has strings for keys."""
    if not bias:
        return b"", b""
    row = PARAMETERS["logit_bias"]
    check_count(row, bias)
    ids = [_bias_id(key, vocab_size) for key in bias]
    for value in bias.values():
        check_value(row, value)
    return pack("i", ids), pack("f", bias.values())


def _bias_id(key: Any, vocab_size: int) -> int:
    if isinstance(key, str):
        if not (key.isascii() and key.isdecimal() and len(key) <= _ID_DIGITS):
            raise invalid(
                f"`logit_bias` has the key {key[:32]!r}; its keys are token ids.", "logit_bias"
            )
        key = int(key)
    return _in_vocabulary("logit_bias", key, vocab_size)


def _allowed(tokens: list[int] | None, vocab_size: int) -> bytes:
    if tokens is None:
        return b""
    row = PARAMETERS["allowed_token_ids"]
    check_count(row, tokens)
    return pack("i", [_in_vocabulary(row.name, token, vocab_size) for token in tokens])


def _in_vocabulary(name: str, token: Any, vocab_size: int) -> int:
    if type(token) is not int:
        raise invalid(f"`{name}` has {shown(token)} where a token id belongs.", name)
    top = vocab_size - 1 if vocab_size else MAX_INT32
    if not 0 <= token <= top:
        raise invalid(
            f"`{name}` has the token id {shown(token)}, which is not between 0 and {top}.", name
        )
    return token
