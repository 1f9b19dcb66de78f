"""Writes docs/protocol.md from the wire types: `python docs/generate_protocol.py`, or with
`--check` only compares.

Bounds and defaults come from msgspec's own view of the types, words from the docstrings in the
sources, so that the page cannot say anything else than the code does. A test runs the comparison.
"""

import ast
import enum
import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import inspect as wire
from pagewire_protocol import channels, columns, grammar, messages, sampling, structs

PAGE = Path(__file__).parent / "protocol.md"
MODULES = (columns, sampling, grammar, structs, messages)
UNIONS = {
    "scheduler": messages.ToScheduler,
    "tokenizer": messages.ToTokenizer,
    "frontend": messages.ToFrontend,
    "worker": messages.ToWorker,
}
HEADER = """# The protocol

*Generated from `protocol/pagewire_protocol` by `python docs/generate_protocol.py`; edits here are overwritten.*

Every message is one MessagePack frame on a ZeroMQ PUSH/PULL pair over a Unix socket: an array whose first item is the message's name and
whose other items are its fields in the order below. Unknown fields, missing fields and values out of bounds make the frame undecodable; the
receiver counts and drops it. A field may only ever be added at the end, with a default.

A *column* is a little-endian array in one `bytes` value: `RowsI32` holds int32, `RowsU64` uint64 and so on. Entry i of each `Rows…` column
of a message belongs to row i; `Tokens…` columns hold one entry a token instead.
"""


def main() -> int:
    page = render()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.read_text() == page else 1
    PAGE.write_text(page)
    return 0


def render() -> str:
    structs = reachable()
    sent = [s for s in structs if issubclass(s, messages.Message)]
    records = [s for s in structs if not issubclass(s, messages.Message)]
    sections = [HEADER, topology(), scalars(), "## Messages\n", *map(section, sent)]
    sections += [
        "## Parts of messages\n",
        *map(section, records),
        *map(enumeration, enumerations()),
    ]
    return "\n".join(sections).rstrip() + "\n"


def reachable() -> list[type[msgspec.Struct]]:
    """Every Struct on the wire, in the order in which the unions lead to it."""
    seen: dict[type[msgspec.Struct], None] = {}
    for union in UNIONS.values():
        for info in walk(wire.type_info(union)):
            if isinstance(info, wire.StructType):
                seen.setdefault(info.cls)
    return list(seen)


def walk(info: wire.Type, inside: tuple[type, ...] = ()) -> Iterator[wire.Type]:
    """`info` and every type within it, once a path."""
    yield info
    if isinstance(info, wire.StructType):
        if info.cls in inside:
            return
        inside = (*inside, info.cls)
    for child in children(info):
        yield from walk(child, inside)


def children(info: wire.Type) -> Iterable[wire.Type]:
    if isinstance(info, wire.StructType):
        return [field.type for field in info.fields]
    if isinstance(info, wire.UnionType):
        return info.types
    if isinstance(info, wire.TupleType):
        return info.item_types
    if isinstance(info, wire.VarTupleType | wire.ListType | wire.SetType | wire.FrozenSetType):
        return [info.item_type]
    if isinstance(info, wire.DictType):
        return [info.key_type, info.value_type]
    return [info.type] if isinstance(info, wire.Metadata) else []


def topology() -> str:
    rows = [
        f"| {role.name.lower()} | {', '.join(f'`{t.__name__}`' for t in get_args(union))} | {', '.join(r.name.lower() for r in to)} |"
        for role, (union, to) in channels.TOPOLOGY.items()
    ]
    limits = (
        f"A frame has at most {channels.MAX_FRAME // 2**20} MiB; "
        f"a queue between two processes at most {channels.QUEUE_LENGTH:,} messages."
    )
    return "\n".join(
        [
            "## Who receives what\n",
            "| service | receives | sends to |",
            "|---|---|---|",
            *rows,
            "",
            limits,
            "",
        ]
    )


def scalars() -> str:
    """The named scalar types and columns with their bounds."""
    names = [
        n
        for module in (columns, sampling)
        for n in assigned_names(module)
        if hasattr(getattr(module, n), "__metadata__")
    ]
    home = {n: getattr(columns if hasattr(columns, n) else sampling, n) for n in names}
    words = documentation()
    rows = [
        f"| `{plain(name)}` | {describe(wire.type_info(kind))} | {words.get(plain(name), '')} |"
        for name, kind in home.items()
    ]
    return "\n".join(
        ["## Scalars and columns\n", "| name | what | meaning |", "|---|---|---|", *rows, ""]
    )


def plain(alias: str) -> str:
    """The name of the type that a field's alias bounds: `EpochField` is an `Epoch`."""
    return alias.removesuffix("Field")


def section(struct: type[msgspec.Struct]) -> str:
    words, annotations = documentation(), field_annotations()
    info = wire.type_info(struct)
    assert isinstance(info, wire.StructType)
    lines = [
        *title(struct.__name__, words),
        "| field | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for field in info.fields:
        key = f"{struct.__name__}.{field.name}"
        lines.append(
            f"| `{field.name}` | {shown(annotations.get(key, ''), field.type)} | {default(field)} | {words.get(key, '')} |"
        )
    return "\n".join([*lines, ""])


def title(name: str, words: dict[str, str]) -> list[str]:
    return [f"### {name}", "", *([words[name], ""] if words[name] else [])]


def shown(annotation: str, info: wire.Type) -> str:
    """The alias as written in the source where there is one, else the bounds in words."""
    name = annotation.removesuffix(" | None")
    alias = hasattr(getattr(columns, name, getattr(sampling, name, None)), "__metadata__")
    return f"`{plain(name)}`{' or null' if annotation != name else ''}" if alias else describe(info)


def describe(info: wire.Type) -> str:
    if isinstance(info, wire.Metadata):
        return describe(info.type)
    if isinstance(info, wire.UnionType):
        return " or ".join(describe(inner) for inner in info.types)
    if isinstance(info, wire.StructType | wire.EnumType):
        return f"[{info.cls.__name__}](#{info.cls.__name__.lower()})"
    if isinstance(info, wire.IntType | wire.FloatType):
        return ("int" if isinstance(info, wire.IntType) else "float") + number_range(info)
    if isinstance(info, wire.StrType | wire.BytesType):
        return ("text, " if isinstance(info, wire.StrType) else "bytes, ") + size(info)
    if isinstance(info, wire.TupleType):
        return "(" + ", ".join(describe(inner) for inner in info.item_types) + ")"
    if isinstance(info, wire.VarTupleType):
        return f"list, {size(info)}, of {describe(info.item_type)}"
    if isinstance(info, wire.DictType):
        return f"map, {size(info)}, of {describe(info.key_type)} to {describe(info.value_type)}"
    return {wire.BoolType: "bool", wire.NoneType: "null"}[type(info)]


def number_range(info: wire.IntType | wire.FloatType) -> str:
    low = (
        f"≥ {number(info.ge)}"
        if info.ge is not None
        else f"> {number(info.gt)}"
        if info.gt is not None
        else ""
    )
    high = (
        f"≤ {number(info.le)}"
        if info.le is not None
        else f"< {number(info.lt)}"
        if info.lt is not None
        else ""
    )
    return (" " + ", ".join(filter(None, (low, high)))).rstrip()


def number(value: float | None) -> str:
    """As people write it: limits near a power of two as that power."""
    if isinstance(value, int) and abs(value) > 2**15:
        for offset in (0, 1):
            if (abs(value) + offset).bit_count() == 1:
                return f"{'-' if value < 0 else ''}2^{(abs(value) + offset).bit_length() - 1}{' - 1' if offset else ''}"
    return f"{value:,}" if value is not None else ""


def size(info: Any) -> str:
    if info.min_length == info.max_length:
        return f"exactly {number(info.max_length)}"
    return (f"{number(info.min_length)} to " if info.min_length else "at most ") + number(
        info.max_length
    )


def default(field: wire.Field) -> str:
    if field.required:
        return "required"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return f"`{value!r}`"


def enumerations() -> list[type[enum.IntEnum]]:
    found: dict[type[enum.IntEnum], None] = {}
    for union in UNIONS.values():
        found.update(
            dict.fromkeys(
                i.cls
                for i in walk(wire.type_info(union))
                if isinstance(i, wire.EnumType) and issubclass(i.cls, enum.IntEnum)
            )
        )
    return list(found)


def enumeration(kind: type[enum.IntEnum]) -> str:
    words = documentation()
    rows = [
        f"| `{member.name}` | {member.value} | {words.get(f'{kind.__name__}.{member.name}', '')} |"
        for member in kind
    ]
    return "\n".join(
        [*title(kind.__name__, words), "| name | value | meaning |", "|---|---|---|", *rows, ""]
    )


def assigned_names(module: Any) -> list[str]:
    return [
        target.id
        for node in source(module).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]


def documentation() -> dict[str, str]:
    """Docstrings and the strings under assignments, by `Name` or `Class.field`."""
    found: dict[str, str] = {}
    for module in MODULES:
        tree = source(module)
        found.update(strings_after(tree.body, ""))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found.update(
                    {node.name: ast.get_docstring(node) or ""},
                    **strings_after(node.body, node.name + "."),
                )
    return {name: " ".join(text.split()) for name, text in found.items()}


def strings_after(body: list[ast.stmt], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        text = (
            following.value.value
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            else None
        )
        if isinstance(target, ast.Name) and isinstance(text, str):
            found[prefix + target.id] = text
    return found


def field_annotations() -> dict[str, str]:
    classes = [
        node for module in MODULES for node in source(module).body if isinstance(node, ast.ClassDef)
    ]
    return {
        f"{node.name}.{line.target.id}": ast.unparse(line.annotation)
        for node in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def source(module: Any) -> ast.Module:
    return ast.parse(inspect.getsource(module))


if __name__ == "__main__":
    sys.exit(main())
