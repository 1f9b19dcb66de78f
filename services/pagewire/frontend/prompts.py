"""Prompts and conversations of a request as the protocol's. Knows what a model can take; knows no
text's tokens."""

from typing import Final

import msgspec
from msgspec import Raw
from pagewire_protocol.columns import MAX_TEXT, MAX_TOKENS, pack
from pagewire_protocol.prompt_checks import outside_vocabulary, too_long, too_many_characters
from pagewire_protocol.structs import (
    MAX_MESSAGE_NAME,
    MAX_MESSAGE_ROLE,
    MAX_MESSAGES,
    MAX_TEMPLATE_KWARGS,
    RESERVED_TEMPLATE_KWARGS,
    Chat,
    ChatMessage,
    Prompt,
)

from ..requests.errors import invalid
from ..requests.messages import text_of_part
from ..requests.model_facts import ModelFacts
from ..requests.parameters import MAX_INT32, shown
from .openai import MessageIn, Part
from .tools import message_fields

MAX_PROMPTS: Final = 1024
"""Of one request."""
QUERY_CHARACTERS: Final = 1 << 20
QUERY_IDS: Final = 1 << 18
"""A text to tokenize, and token ids to detokenize, may be as long as the context, and so long in any
case."""
_NO_TEXT: Final = "This server runs without a tokenizer (--skip-tokenizer-init)"


def prompts_of(
    prompt: str | list[str | int | list[int]],
    model: ModelFacts,
    max_tokens: int,
    *,
    truncated: bool,
) -> list[Prompt]:
    """The prompts of a completion. `truncated`: one may be longer than the context. Raises
    RequestError."""
    if isinstance(prompt, str):
        return [text_prompt(prompt, model, truncated=truncated)]
    if not prompt:
        raise invalid("`prompt` is an empty list; give at least one prompt.", "prompt")
    if isinstance(prompt[0], int):
        return [id_prompt(prompt, model, max_tokens, truncated=truncated)]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise invalid(
            "`prompt` mixes kinds; give a string, strings, token ids, or lists of token ids.",
            "prompt",
        )
    at_most("prompt", len(prompt), MAX_PROMPTS, "prompts")
    return [
        text_prompt(item, model, truncated=truncated)
        if isinstance(item, str)
        else id_prompt(item, model, max_tokens, truncated=truncated)
        for item in prompt
    ]


def text_prompt(text: str, model: ModelFacts, *, truncated: bool = True) -> Prompt:
    """Raises RequestError. A text that no context holds, however long its tokens are, is refused
    here, unless it may be `truncated`. Whether a text is empty its tokens tell: a model may begin
    each with one."""
    if not model.has_text:
        raise invalid(f"{_NO_TEXT}; give the prompt as token ids.", "prompt")
    if not truncated:
        check_length(len(text), model, "prompt")
    elif len(text) > MAX_TEXT:
        raise invalid(
            f"The prompt has {len(text)} characters; at most {MAX_TEXT} are allowed.", "prompt"
        )
    return Prompt(text=text)


def check_length(characters: int, model: ModelFacts, param: str) -> None:
    """Raises RequestError for more characters than the tokens of the context can have."""
    most = min(model.max_model_len * model.longest_token or MAX_TEXT, MAX_TEXT)
    if characters > most:
        raise invalid(too_many_characters(model.max_model_len, characters, most), param)


def query_text(text: str, model: ModelFacts) -> None:
    """Raises RequestError for a text that is too long to be tokenized for its own sake."""
    most = max(QUERY_CHARACTERS, model.max_model_len * model.longest_token)
    at_most("prompt", len(text), min(most, MAX_TEXT), "characters")


def most_query_ids(model: ModelFacts) -> int:
    """Token ids whose text may be asked for at a time."""
    return min(max(QUERY_IDS, model.max_model_len), MAX_TOKENS)


def id_prompt(
    ids: object, model: ModelFacts, max_tokens: int, *, truncated: bool = False
) -> Prompt:
    """Raises RequestError. A prompt that no context holds is refused before it is copied; the
    tokenizer refuses the others that are too long."""
    if not isinstance(ids, list) or not ids:
        raise invalid("The prompt is empty: it must have at least 1 token.", "prompt")
    count: int = len(ids)  # type: ignore[arg-type]
    limit = MAX_TOKENS if truncated else model.max_model_len or MAX_TOKENS
    if count > limit:
        raise invalid(too_long(limit, count, max_tokens), "prompt")
    return Prompt(ids=token_column("prompt", ids, model))  # type: ignore[arg-type]


def token_column(name: str, ids: list[int], model: ModelFacts) -> bytes:
    """Token ids of the parameter `name` as an int32 column. Raises RequestError."""
    vocab_size = model.vocab_size or MAX_INT32 + 1
    if set(map(type, ids)) <= {int} and (not ids or 0 <= min(ids) <= max(ids) < vocab_size):
        return pack("i", ids)
    for token in ids:
        if type(token) is not int:
            raise invalid(
                f"`{name}` mixes kinds; give a string, strings, token ids, or lists of token ids.",
                name,
            )
        if not 0 <= token < vocab_size:
            raise invalid(outside_vocabulary(shown(token), vocab_size), name)
    return pack("i", ids)


def at_most(name: str, count: int, limit: int, what: str) -> None:
    """Raises RequestError when the parameter `name` holds more than `limit`."""
    if count > limit:
        raise invalid(f"`{name}` may hold at most {limit} {what}, got {count}.", name)


def chat_of(
    messages: list[MessageIn],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, Raw] | None,
    model: ModelFacts,
    tools: bytes = b"",
) -> Chat:
    """A conversation. `add_generation_prompt` is true by default, unless the final message is
    continued. Raises RequestError."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise invalid(
            f"`messages` must hold 1 to {MAX_MESSAGES} messages, got {len(messages)}.", "messages"
        )
    if not model.has_text:
        raise invalid(f"{_NO_TEXT}; use /v1/completions with token ids.", "messages")
    if not model.has_chat_template:
        raise invalid(
            "This model has no chat template; start the server with --chat-template, or use /v1/completions.",
            "messages",
        )
    if continue_final_message and add_generation_prompt:
        raise invalid(
            "`continue_final_message` and `add_generation_prompt` cannot both be true.",
            "continue_final_message",
        )
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    converted = tuple(_message(index, message) for index, message in enumerate(messages))
    characters = sum(len(message.content) for message in converted)
    check_length(characters, model, "messages")
    return Chat(
        converted,
        add_generation_prompt,
        bool(continue_final_message),
        _template_kwargs(template_kwargs),
        tools,
    )


def _template_kwargs(kwargs: dict[str, Raw] | None) -> bytes:
    if not kwargs:
        return b""
    for name in RESERVED_TEMPLATE_KWARGS:
        if name in kwargs:
            raise invalid(f"`chat_template_kwargs` must not hold `{name}`.", "chat_template_kwargs")
    data = msgspec.json.encode(kwargs)
    if len(data) > MAX_TEMPLATE_KWARGS:
        raise invalid(
            f"`chat_template_kwargs` may have at most {MAX_TEMPLATE_KWARGS} bytes of JSON, got {len(data)}.",
            "chat_template_kwargs",
        )
    return data


def _message(index: int, message: MessageIn) -> ChatMessage:
    if not 1 <= len(message.role) <= MAX_MESSAGE_ROLE:
        raise invalid(
            f"`messages[{index}].role` must have 1 to {MAX_MESSAGE_ROLE} characters, got {len(message.role)}.",
            "messages",
        )
    if message.name is not None and len(message.name) > MAX_MESSAGE_NAME:
        raise invalid(
            f"`messages[{index}].name` may have at most {MAX_MESSAGE_NAME} characters, got {len(message.name)}.",
            "messages",
        )
    content = message.content
    if content is None:
        if message.role not in ("assistant", "tool"):
            raise invalid(f"`messages[{index}].content` is missing.", "messages")
        content = ""
    if not isinstance(content, str):
        content = "\n".join(_part(index, part) for part in content)
    return ChatMessage(message.role, content, message.name, message_fields(index, message))


def _part(index: int, part: Part | str) -> str:
    if isinstance(part, str):
        return part
    text: str | None = text_of_part(part.type, part.text, part.refusal)
    if text is None:
        raise invalid(
            f"`messages[{index}].content` has a part of type {part.type[:64]!r}; only parts of type 'text' are supported.",
            "messages",
        )
    return text
