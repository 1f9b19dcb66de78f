"""The table of parameters: it agrees with the wire, each bound is refused just beyond and taken just
at it, and who takes parameters takes those of the table."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import inspect as wire
from pagewire import SamplingParams
from pagewire.frontend.openai import ChatRequest, CompletionRequest, Request
from pagewire.requests.errors import ErrorKind, RequestError
from pagewire.requests.parameters import (
    LOWEST_TEMPERATURE,
    PARAMETERS,
    ActsIn,
    Parameter,
    checked,
    checked_items,
)
from pagewire.requests.sampling import check_parameters, sampling_of, text_options_of
from pagewire_protocol.messages import Generate
from pagewire_protocol.sampling import Sampling, TextOptions

NUMBERS = [row for row in PARAMETERS.values() if row.type in (int, float) and row.max_items is None]
ON_WIRE = [row for row in PARAMETERS.values() if row.wire]
NAMED = {
    # Wire fields that are not a row's own: named code translates them.
    "seed": ("seed", 0, 2**63 - 1),
    "max_tokens": ("max_tokens", 0, 2**31 - 1),
    "logprobs": ("logprobs", -1, 20),
    "prompt_logprobs": ("prompt_logprobs", -1, 20),
}
STEP = {int: 1, float: 1e-3}


def name_of(row: Parameter) -> str:
    return row.name


def struct_of(row: Parameter) -> type[msgspec.Struct]:
    return TextOptions if row.acts_in is ActsIn.TOKENIZER else Sampling


def wire_field(struct: type[msgspec.Struct], name: str) -> Any:
    info = wire.type_info(struct)
    assert isinstance(info, wire.StructType)
    return next(field for field in info.fields if field.name == name)


def refusal(row: Parameter, value: Any) -> str:
    with pytest.raises(RequestError) as caught:
        checked(row, value) if row.max_items is None else checked_items(row, value)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID, row.name)
    return caught.value.message


# --- the table and the wire ---


@pytest.mark.parametrize("row", ON_WIRE, ids=name_of)
def test_the_wire_holds_what_the_table_allows_and_no_more(row: Parameter) -> None:
    field = wire_field(struct_of(row), row.wire)
    bounds = field.type
    if row.max_items is not None:
        assert bounds.max_length == row.max_items
        bounds = bounds.item_type
    if row.type is bool:
        assert isinstance(bounds, wire.BoolType) and field.default == row.default
        return
    if row.type is str:
        assert (bounds.min_length, bounds.max_length) == (row.low, row.high)
        return
    to_wire = row.to_wire or (lambda value: value)
    low = bounds.gt if row.above_low else bounds.ge
    if row.max_items is None:
        assert field.default == to_wire(row.default), "the wire's default is as neutral"
        assert low == (0 if row.name == "top_k" else row.low)
        assert bounds.le == row.high
    else:
        assert (low, bounds.le) == (row.low, row.high)


@pytest.mark.parametrize("name", NAMED)
def test_the_wire_holds_what_named_code_translates(name: str) -> None:
    field, low, high = NAMED[name]
    bounds = wire_field(Sampling, field).type
    assert (bounds.ge, bounds.le) == (low, high)
    assert PARAMETERS[name].high == high


def test_the_wire_holds_priorities_salts_and_truncations() -> None:
    for struct, field, name in (
        (Generate, "priority", "priority"),
        (TextOptions, "truncate_prompt", "truncate_prompt_tokens"),
    ):
        bounds = wire_field(struct, field).type
        assert (bounds.ge, bounds.le) == (PARAMETERS[name].low, PARAMETERS[name].high)
    assert wire_field(Generate, "cache_salt").type.max_length == PARAMETERS["cache_salt"].high


def test_every_field_of_the_wire_has_a_parameter() -> None:
    made = {row.wire for row in ON_WIRE}
    sampling = {*made, *NAMED, "bias_ids", "bias_values", "allowed_ids", "bad_words"}
    assert set(Sampling.__struct_fields__) <= sampling
    assert set(TextOptions.__struct_fields__) <= {
        *made,
        "answer",
        "return_prompt_ids",
        "truncate_prompt",
    }


@pytest.mark.parametrize("row", NUMBERS, ids=name_of)
def test_what_is_at_a_bound_survives_the_wire(row: Parameter) -> None:
    struct = struct_of(row)
    for value in (row.low, row.high):
        if row.above_low and value == row.low:
            value += STEP[row.type]
        if not row.wire:
            continue
        source = SimpleNamespace(**{row.name: value})
        if struct is Sampling:
            made = sampling_of(
                source, max_tokens=2**31 - 1, logprobs=-1, prompt_logprobs=-1, vocab_size=0
            )
        else:
            made = text_options_of(source, return_prompt_ids=False, has_text=True)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=struct) == made


# --- values ---


@pytest.mark.parametrize("row", NUMBERS, ids=name_of)
def test_bounds(row: Parameter) -> None:
    step = STEP[row.type]
    low = row.low + step if row.above_low else row.low
    for value in (low, row.high):
        assert checked(row, value) == value
    for value in (low - step, row.high + step):
        words = refusal(row, value)
        shown = f"{value:g}" if row.type is float else str(value)
        assert f"`{row.name}`" in words and f"got {shown}" in words
    assert checked(row, None) == row.default


@pytest.mark.parametrize("row", NUMBERS, ids=name_of)
@pytest.mark.parametrize("value", ["1", True, [], float("nan"), float("inf"), 10**400])
def test_values_of_another_kind(row: Parameter, value: Any) -> None:
    words = refusal(row, value)
    assert f"`{row.name}` must be" in words and len(words) < 200


@pytest.mark.parametrize(
    "row", [row for row in PARAMETERS.values() if row.max_items and row.name != "logit_bias"],
    ids=name_of,
)  # fmt: skip
def test_lists(row: Parameter) -> None:
    assert row.max_items is not None
    item = "x" if row.type is str else 5
    assert len(checked_items(row, [item] * row.max_items)) == row.max_items
    words = refusal(row, [item] * (row.max_items + 1))
    assert str(row.max_items) in words and f"got {row.max_items + 1}" in words
    if row.type is str:
        assert checked_items(row, ["x" * row.high]) == ["x" * row.high]
        for text in ("", "x" * (row.high + 1)):
            words = refusal(row, [text])
            assert f"{row.low} to {row.high} characters, got {len(text)}" in words
        assert "holds strings" in refusal(row, [5])
    if row.min_items:
        assert "is empty" in refusal(row, [])
    assert checked_items(row, None) == row.default


def test_temperatures_too_low_to_divide_by_are_raised() -> None:
    wanted = {0.0: 0.0, 0.000001: 0.000001, 0.005: LOWEST_TEMPERATURE, 0.5: 0.5}
    for given, effective in wanted.items():
        source = SimpleNamespace(temperature=given)
        made = sampling_of(source, max_tokens=1, logprobs=-1, prompt_logprobs=-1, vocab_size=0)
        assert made.temperature == effective


# --- who takes parameters takes those of the table ---


def test_sampling_params_and_http_take_the_same() -> None:
    program = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    http = {
        *Request.__struct_fields__,
        *CompletionRequest.__struct_fields__,
        *ChatRequest.__struct_fields__,
    }
    only_http = {"priority", "cache_salt"}
    """Of `LLM` they belong to the prompt: `generate(priority=...)`, `{"cache_salt": ...}`."""
    only_program = {"detokenize"}
    """Over HTTP the answer is always text."""
    assert set(PARAMETERS) - only_http <= set(program)
    assert set(PARAMETERS) - only_program <= http
    for name, row in PARAMETERS.items():
        if name in program:
            assert (program[name] or None) == (row.default or None), name


def test_nothing_given_is_what_everybody_may_send() -> None:
    check_parameters(SimpleNamespace())
    check_parameters(SamplingParams())
