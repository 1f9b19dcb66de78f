"""What a message of a conversation, or a part of its content, may hold beside what reaches the chat
template. HTTP requests and `LLM.chat` go by it."""

from typing import Any, Final

LABELS: Final = frozenset(
    {
        "annotations",
        "cache_control",
        "created",
        "createdAt",
        "created_at",
        "date",
        "id",
        "index",
        "message_id",
        "metadata",
        "providerOptions",
        "provider_options",
        "status",
        "timestamp",
        "uuid",
        "weight",
    }
)
"""What programs note about a message. No chat template reads these, so any value passes."""
SWITCHES: Final = frozenset({"partial", "prefix"})
"""Those of other servers that make a message the beginning of the answer."""
TEXT_PARTS: Final = ("text", "input_text", "output_text")
"""Types of parts that have a `text`: of chats, and of the Responses API, whose messages programs
pass on."""


def is_unread(name: str, value: Any) -> bool:
    """Whether a further field changes nothing: a label, or anything empty. Content would be lost
    without a word."""
    if name in LABELS or value is None:
        return True
    return (name in SWITCHES and value is False) or value in ("", [], {})


def text_of_part(part_type: Any, text: Any, refusal: Any) -> Any:
    """What a part says, None where it is no text: a refusal of an earlier answer says that."""
    if part_type == "refusal":
        return refusal
    return text if part_type in TEXT_PARTS else None
