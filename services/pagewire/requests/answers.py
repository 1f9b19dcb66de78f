"""What an answer is made of: content, reasoning and tool calls, as the owner of a request gets
them. Knows no HTTP, no JSON and no model.

The tokenizer takes the text of a chat apart, since it sees the tokens (tokenizer/answers); the
parts come in columns of `Deltas`. Of any other request all text is content, and comes as bare text.
"""

from msgspec import Struct
from pagewire_protocol.columns import unpack
from pagewire_protocol.messages import Deltas
from pagewire_protocol.structs import PartKind


class ContentDelta(Struct, frozen=True):
    """More of the text that is meant for the user."""

    text: str


class ReasoningDelta(Struct, frozen=True):
    """More of the model's reasoning, which precedes the content."""

    text: str


class ToolCallDelta(Struct, frozen=True):
    """More of one tool call.

    Calls may be parallel: `index` says which one grows. The first delta of a call has its
    `call_id` and the function's `name`; the JSON text of the arguments follows in pieces.
    """

    index: int
    """Of the call within its answer, from 0."""
    call_id: str = ""
    name: str = ""
    arguments: str = ""


Delta = ContentDelta | ReasoningDelta | ToolCallDelta
Output = str | tuple[Delta, ...]
"""What a row brings: text that is content; or the parts of an answer that was taken apart."""


def outputs_of(deltas: Deltas) -> list[Output]:
    """What each row of a message with parts brings. Raises ValueError where the columns do not fit
    each other."""
    rows = unpack("i", deltas.part_rows)
    calls = unpack("i", deltas.part_calls)
    outputs: list[Output] = list(deltas.texts)
    by_row: dict[int, list[Delta]] = {}
    columns = zip(rows, deltas.part_kinds, calls, deltas.part_texts, strict=True)
    call_id = ""
    for row, kind, call, text in columns:
        if not 0 <= row < len(outputs):
            raise ValueError(f"a part of row {row} of {len(outputs)}")
        if kind == PartKind.CALL_ID:
            call_id = text
        else:
            by_row.setdefault(row, []).append(_delta(PartKind(kind), call, text, call_id))
    for row, parts in by_row.items():
        outputs[row] = tuple(parts)
    return outputs


def _delta(kind: PartKind, call: int, text: str, call_id: str) -> Delta:
    match kind:
        case PartKind.REASONING:
            return ReasoningDelta(text)
        case PartKind.CALL_NAME:
            return ToolCallDelta(call, call_id, text)
        case PartKind.ARGUMENTS:
            return ToolCallDelta(call, arguments=text)
        case _:
            return ContentDelta(text)
