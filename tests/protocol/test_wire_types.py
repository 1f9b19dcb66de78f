"""Every type that can arrive from another process is strict and bounded, and comes out of a decoder
as it went in."""

from collections.abc import Iterator
from typing import Annotated, Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Meta, Struct
from msgspec import inspect as wire
from pagewire_protocol import messages
from pagewire_protocol.channels import DECODE_ERRORS, TOPOLOGY

UNIONS = {role.name.lower(): union for role, (union, _) in TOPOLOGY.items()}
MESSAGES = sorted(
    {kind for union in UNIONS.values() for kind in get_args(union)}, key=lambda kind: kind.__name__
)
SIZED = (
    wire.StrType,
    wire.BytesType,
    wire.ByteArrayType,
    wire.MemoryViewType,
    wire.VarTupleType,
    wire.ListType,
    wire.DictType,
)
REFUSED = (
    wire.AnyType,
    wire.RawType,
    wire.ExtType,
    wire.CustomType,
    wire.SetType,
    wire.FrozenSetType,
    wire.ByteArrayType,
    wire.MemoryViewType,
)


def children(info: wire.Type) -> Iterator[tuple[str, wire.Type]]:
    if isinstance(info, wire.StructType):
        yield from ((f".{field.name}", field.type) for field in info.fields)
    elif isinstance(info, wire.UnionType):
        yield from (("", inner) for inner in info.types)
    elif isinstance(info, wire.TupleType):
        yield from ((f"[{i}]", inner) for i, inner in enumerate(info.item_types))
    elif isinstance(info, wire.VarTupleType | wire.ListType):
        yield "[]", info.item_type
    elif isinstance(info, wire.DictType):
        yield "{key}", info.key_type
        yield "{value}", info.value_type
    elif isinstance(info, wire.Metadata):
        yield "", info.type


def faults(info: wire.Type, path: str) -> Iterator[str]:
    """What is wrong with a type and everything inside it, by path."""
    if isinstance(info, REFUSED):
        yield f"{path}: {type(info).__name__} is not allowed on the wire"
    if isinstance(info, SIZED) and info.max_length is None:
        yield f"{path}: unbounded {type(info).__name__}"
    if isinstance(info, wire.StructType) and not (
        info.array_like and info.forbid_unknown_fields and info.cls.__struct_config__.frozen
    ):
        yield f"{path}: {info.cls.__name__} must be frozen, array_like and forbid unknown fields"
    if type(info).__module__ != "msgspec.inspect" or isinstance(
        info, wire.DataclassType | wire.TypedDictType | wire.NamedTupleType
    ):
        yield f"{path}: {type(info).__name__} is not a wire type"
    for step, inner in children(info):
        yield from faults(inner, path + step)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_strict_and_bounded(kind: type[Struct]) -> None:
    assert not (found := list(faults(wire.type_info(kind), kind.__name__))), found


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_tagged_with_its_own_name(kind: type[Struct]) -> None:
    assert issubclass(kind, messages.Message)
    info = wire.type_info(kind)
    assert isinstance(info, wire.StructType) and info.tag == kind.__name__


def test_every_message_of_the_module_is_received_by_someone() -> None:
    defined = {
        v
        for v in vars(messages).values()
        if isinstance(v, type) and issubclass(v, messages.Message) and v is not messages.Message
    }
    assert defined == set(MESSAGES)


class _Loose(Struct):
    field: Any


class _Unbounded(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    text: str
    rows: tuple[Annotated[bytes, Meta(max_length=1)], ...]
    table: dict[Annotated[str, Meta(max_length=1)], int]
    items: Annotated[list[str], Meta(max_length=2)]


def test_the_walk_catches() -> None:
    assert len(list(faults(wire.type_info(_Loose), "_Loose"))) == 2
    paths = {fault.partition(":")[0] for fault in faults(wire.type_info(_Unbounded), "x")}
    assert paths == {"x.text", "x.rows", "x.table", "x.items[]"}


def values(info: wire.Type) -> st.SearchStrategy[Any]:
    """Values of a wire type, within its bounds but small enough to be many."""
    match info:
        case wire.Metadata():
            return values(info.type)
        case wire.UnionType():
            return st.one_of(*map(values, info.types))
        case wire.NoneType():
            return st.none()
        case wire.BoolType():
            return st.booleans()
        case wire.IntType():
            return st.integers(info.ge, info.le)
        case wire.FloatType():
            low, high = (
                info.gt if info.ge is None else info.ge,
                info.le if info.lt is None else info.lt,
            )
            return st.floats(low, high, allow_nan=False, exclude_min=info.gt is not None)
        case wire.StrType(pattern=str() as pattern):
            return st.from_regex(pattern, fullmatch=True).filter(lambda text: len(text) <= 256)
        case wire.StrType():
            return st.text(min_size=info.min_length or 0, max_size=min(info.max_length or 0, 24))
        case wire.BytesType():
            return st.binary(min_size=info.min_length or 0, max_size=min(info.max_length or 0, 32))
        case wire.EnumType():
            return st.sampled_from(list(info.cls))
        case wire.TupleType():
            return st.tuples(*map(values, info.item_types))
        case wire.VarTupleType():
            low, high = info.min_length or 0, min(info.max_length or 0, (info.min_length or 0) + 3)
            return st.lists(values(info.item_type), min_size=low, max_size=high).map(tuple)
        case wire.DictType():
            return st.dictionaries(values(info.key_type), values(info.value_type), max_size=3)
        case wire.StructType():
            return st.builds(info.cls, *(values(field.type) for field in info.fields))
        case _:
            raise AssertionError(f"no strategy for {info}")


def receivers(kind: type[Struct]) -> list[Any]:
    return [union for union in UNIONS.values() if kind in get_args(union)]


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[Struct]) -> None:
    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(values(wire.type_info(kind)))
    def check(message: Struct) -> None:
        frame = msgspec.msgpack.encode(message)
        for union in receivers(kind):
            assert msgspec.msgpack.decode(frame, type=union) == message
        for union in UNIONS.values():
            if kind not in get_args(union):
                with pytest.raises(msgspec.ValidationError):
                    msgspec.msgpack.decode(frame, type=union)

    check()


def decode_or_refuse(frame: bytes) -> int:
    """How many of the four decoders take `frame`. Anything but a refusal by one of DECODE_ERRORS
    fails the test."""
    taken = 0
    for union in UNIONS.values():
        try:
            msgspec.msgpack.decode(frame, type=union)
        except DECODE_ERRORS:
            continue
        taken += 1
    return taken


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(frame: bytes) -> None:
    assert decode_or_refuse(frame) == 0


ANY_MESSAGE = st.one_of(*(values(wire.type_info(kind)) for kind in MESSAGES))


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(ANY_MESSAGE, st.data())
def test_mutated_messages_never_raise_anything_else(message: Struct, data: st.DataObject) -> None:
    frame = bytearray(msgspec.msgpack.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip":
                frame[at] = data.draw(st.integers(0, 255))
            case "cut":
                del frame[at + 1 :]
            case "insert":
                frame[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case _:
                frame[at:at] = frame[at : at + 16]
    decode_or_refuse(bytes(frame))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x92\xa4Step\xdb\xff\xff\xff\xff",
        b"\x92\xa7Goodbye\xa1\xff",
        msgspec.msgpack.encode(["Goodbye", 5, "one field too many"]),
        msgspec.msgpack.encode(["Goodbye", 0]),
        msgspec.msgpack.encode(["Goodbye", 2**63]),
        msgspec.msgpack.encode(["Goodbye"]),
        msgspec.msgpack.encode(["Goodbye", 5]) + b"\x00",
        msgspec.msgpack.encode({"t": "Goodbye", "incarnation": 5}),
        msgspec.msgpack.encode(["NoSuchMessage"]),
    ],
    ids=[
        "empty",
        "deep",
        "huge-array",
        "huge-text",
        "utf8",
        "extra",
        "below",
        "above",
        "missing",
        "trailing",
        "map",
        "unknown",
    ],
)
def test_hostile_frames(frame: bytes) -> None:
    assert decode_or_refuse(frame) == 0
    assert msgspec.msgpack.decode(
        msgspec.msgpack.encode(["Goodbye", 5]), type=messages.ToScheduler
    ) == messages.Goodbye(5)
