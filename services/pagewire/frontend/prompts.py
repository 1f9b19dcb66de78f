"""Prompts and conversations of a request as the protocol's. Knows what a model can take; knows no
text's tokens."""

from typing import Final

import msgspec
from msgspec import Raw, Struct
from pagewire_protocol.columns import MAX_TOKENS, pack
from pagewire_protocol.structs import Chat, ChatMessage, Prompt

from ..requests.errors import bad
from .limits import I31, at_most, short
from .openai import MessageIn, Part

MAX_PROMPTS: Final = 1024
MAX_MESSAGES: Final = 4096
MAX_TEMPLATE_KWARGS: Final = 65_536
RESERVED: Final = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "messages",
    "tokenize",
)
"""Variables of a chat template that are parameters of their own."""
_NO_TEXT: Final = "This server runs without a tokenizer (--skip-tokenizer-init)"


class Model(Struct, frozen=True):
    """What a request must fit: the context in tokens (0: not known), the vocabulary, and whether
    there is text at all."""

    max_model_len: int = 0
    vocab_size: int = 0
    has_text: bool = True
    has_chat_template: bool = True
    eos_token_ids: tuple[int, ...] = ()


def prompts_of(
    prompt: str | list[str | int | list[int]], model: Model, truncated: bool
) -> list[Prompt]:
    """`truncated`: a prompt may be longer than the context."""
    if isinstance(prompt, str):
        return [text_prompt(prompt, model)]
    if not prompt:
        raise bad("`prompt` is an empty list; give at least one prompt.", "prompt")
    if isinstance(prompt[0], int):
        return [id_prompt(prompt, model, truncated)]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise bad(
            "`prompt` mixes kinds; give a string, strings, token ids, or lists of token ids.",
            "prompt",
        )
    at_most("prompt", len(prompt), MAX_PROMPTS, "prompts")
    return [
        text_prompt(item, model) if isinstance(item, str) else id_prompt(item, model, truncated)
        for item in prompt
    ]


def text_prompt(text: str, model: Model) -> Prompt:
    if not text:
        raise bad("The prompt is empty: it must have at least 1 character.", "prompt")
    if not model.has_text:
        raise bad(f"{_NO_TEXT}; give the prompt as token ids.", "prompt")
    return Prompt(text=text)


def id_prompt(ids: object, model: Model, truncated: bool = False) -> Prompt:
    if not isinstance(ids, list) or not ids:
        raise bad("The prompt is empty: it must have at least 1 token.", "prompt")
    count: int = len(ids)  # type: ignore[arg-type]
    limit = MAX_TOKENS if truncated else model.max_model_len or MAX_TOKENS
    if count > limit:
        raise bad(f"The prompt has {count} tokens, the context holds {limit}.", "prompt")
    return Prompt(ids=token_column("prompt", ids, model))  # type: ignore[arg-type]


def token_column(name: str, ids: list[int], model: Model) -> bytes:
    top = model.vocab_size - 1 if model.vocab_size else I31
    for token in ids:
        if type(token) is not int:
            raise bad(
                f"`{name}` mixes kinds; give a string, strings, token ids, or lists of token ids.",
                name,
            )
        if not 0 <= token <= top:
            raise bad(f"Token id {short(token)} in `{name}` is not between 0 and {top}.", name)
    return pack("i", ids)


def chat_of(
    messages: list[MessageIn],
    add: bool | None,
    proceed: bool | None,
    kwargs: dict[str, Raw] | None,
    model: Model,
) -> Chat:
    """`add`: add_generation_prompt, true by default unless `proceed`: continue_final_message."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise bad(
            f"`messages` must hold 1 to {MAX_MESSAGES} messages, got {len(messages)}.", "messages"
        )
    if not model.has_text:
        raise bad(f"{_NO_TEXT}; use /v1/completions with token ids.", "messages")
    if not model.has_chat_template:
        raise bad(
            "This model has no chat template; start the server with --chat-template, or use /v1/completions.",
            "messages",
        )
    if proceed and add:
        raise bad(
            "`continue_final_message` and `add_generation_prompt` cannot both be true.",
            "continue_final_message",
        )
    converted = tuple(_message(index, message) for index, message in enumerate(messages))
    return Chat(
        converted, (not proceed) if add is None else add, bool(proceed), _template_kwargs(kwargs)
    )


def _template_kwargs(kwargs: dict[str, Raw] | None) -> bytes:
    if not kwargs:
        return b""
    for name in RESERVED:
        if name in kwargs:
            raise bad(f"`chat_template_kwargs` must not hold `{name}`.", "chat_template_kwargs")
    data = msgspec.json.encode(kwargs)
    if len(data) > MAX_TEMPLATE_KWARGS:
        raise bad(
            f"`chat_template_kwargs` may have at most {MAX_TEMPLATE_KWARGS} bytes of JSON, got {len(data)}.",
            "chat_template_kwargs",
        )
    return data


def _message(index: int, message: MessageIn) -> ChatMessage:
    if not 1 <= len(message.role) <= 64:
        raise bad(
            f"`messages[{index}].role` must have 1 to 64 characters, got {len(message.role)}.",
            "messages",
        )
    if message.name is not None and len(message.name) > 256:
        raise bad(
            f"`messages[{index}].name` may have at most 256 characters, got {len(message.name)}.",
            "messages",
        )
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise bad(f"`messages[{index}].content` is missing.", "messages")
        content = ""
    if not isinstance(content, str):
        content = "\n".join(_part(index, part) for part in content)
    return ChatMessage(message.role, content, message.name)


def _part(index: int, part: Part) -> str:
    if part.type != "text" or part.text is None:
        raise bad(
            f"`messages[{index}].content` has a part of type {part.type[:64]!r}; only parts of type 'text' are supported.",
            "messages",
        )
    return part.text
