"""The forms in which a program may hand over prompts, made into one form. Knows no process and no
socket."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, NotRequired, TypedDict

import msgspec
from pagewire_protocol.columns import pack
from pagewire_protocol.structs import MAX_TEMPLATE_KWARGS, Chat, ChatMessage, Prompt

from ..frontend.openai import MessageIn, ToolIn
from ..frontend.tools import encoded_tools, message_fields
from ..requests.errors import RequestError
from ..requests.messages import is_unread, text_of_part
from ..requests.parameters import PARAMETERS, checked
from .sampling_params import SamplingParams

PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class TextPrompt(TypedDict):
    """A prompt as text; prompts of different salts share no cached blocks."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids, and its text if the program knows it."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


FIELDS: Final = ("tool_calls", "tool_call_id", "reasoning", "reasoning_content")
"""What a message may have beside role, content and name."""


class Entry(NamedTuple):
    """One prompt as it goes to the stack, and `text` as the program gave it."""

    prompt: Prompt
    text: str | None = None
    add_special_tokens: bool = True
    cache_salt: str = ""
    priority: int = 0


def as_prompts(prompts: Any, token_ids: Any = None) -> list[Entry]:
    """str, token ids, {"prompt": str}, {"prompt_token_ids": [int]} or a list of these. `token_ids`
    is the older way to give ids, one list or a list of them, beside or instead of texts. Raises
    ValueError or TypeError naming the index."""
    if token_ids is not None:
        return _with_ids(prompts, [token_ids] if _is_ids(token_ids) else token_ids)
    if isinstance(prompts, (str, Mapping)) or _is_ids(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts must be a string, token ids, a dict or a list of these, got {type(prompts).__name__}"
        )
    return [_as_entry(prompt, i) for i, prompt in enumerate(prompts)]


def _with_ids(prompts: Any, token_ids: Any) -> list[Entry]:
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, (str, bytes)):
        raise TypeError(
            f"prompt_token_ids must be a list of token ids or a list of such lists, got {type(token_ids).__name__}"
        )
    texts = [prompts] if isinstance(prompts, str) else list(prompts or [None] * len(token_ids))
    if len(texts) != len(token_ids):
        raise ValueError(
            f"{len(texts)} prompts but {len(token_ids)} prompt_token_ids; give one for each"
        )
    return [
        _as_entry(ids, i)._replace(text=text)
        for i, (text, ids) in enumerate(zip(texts, token_ids, strict=True))
    ]


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and len(value) > 0
        and all(type(t) is int for t in value)
    )


def _as_entry(prompt: Any, index: int) -> Entry:
    if isinstance(prompt, str):
        return Entry(Prompt(text=prompt), prompt)
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt, index)
    if not _is_ids(prompt):
        raise ValueError(
            f"prompt {index}: a string or a list of at least one token id is needed, got {prompt!r:.80}"
        )
    try:
        return Entry(Prompt(ids=pack("i", prompt)))
    except OverflowError:
        raise ValueError(
            f"prompt {index}: a token id is out of range: {max(prompt, key=abs)}"
        ) from None


def _from_mapping(prompt: Mapping[Any, Any], index: int) -> Entry:
    extra = {key for key, value in prompt.items() if value is not None} - PROMPT_KEYS
    if extra:
        raise ValueError(
            f"prompt {index}: {', '.join(sorted(map(str, extra)))} is not supported in this version"
        )
    ids = prompt.get("prompt_token_ids")
    text = prompt.get("prompt")
    salt = prompt.get("cache_salt")
    if isinstance(ids, Mapping) or isinstance(text, Mapping):
        raise ValueError(
            f"prompt {index}: a string or a list of at least one token id is needed, got {prompt!r:.80}"
        )
    try:
        salt = checked(PARAMETERS["cache_salt"], salt)
    except RequestError as error:
        raise ValueError(f"prompt {index}: {error.message}") from None
    entry = _as_entry(text if ids is None else ids, index)
    return entry._replace(text=text, cache_salt=salt)


def with_priority(entry: Entry, priority: int, index: int) -> Entry:
    """`index` is the prompt's among those of the call. Raises ValueError."""
    try:
        return entry._replace(priority=checked(PARAMETERS["priority"], priority))
    except RequestError as error:
        raise ValueError(f"prompt {index}: {error.message}") from None


def as_chats(
    messages: Any,
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: Mapping[str, Any] | None = None,
    render: Callable[[Chat], str] | None = None,
    tools: Any = None,
) -> list[Entry]:
    """One conversation (a list of {"role", "content"}) or a list of conversations. `render` makes
    the text here instead of leaving it to the tokenizer service. `tools`: OpenAI's list."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(
            "messages must be a list of {'role': ..., 'content': ...}, or a list of such lists"
        )
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    kwargs = _encode_kwargs(template_kwargs)
    encoded = _encode_tools(tools)
    entries: list[Entry] = []
    for index, conversation in enumerate(conversations):
        converted = tuple(_as_message(message, index) for message in conversation)
        if not converted:
            raise ValueError(
                f"conversation {index}: at least one message with a role and content is needed"
            )
        chat = Chat(converted, add_generation_prompt, continue_final_message, kwargs, encoded)
        text = render(chat) if render else None
        entries.append(
            Entry(
                Prompt(chat=chat) if text is None else Prompt(text=text),
                text,
                add_special_tokens=False,
            )
        )
    return entries


def _encode_tools(tools: Any) -> bytes:
    if not tools:
        return b""
    try:
        return encoded_tools(_as_http(tools, list[ToolIn], "tools"))
    except RequestError as error:
        raise ValueError(error.message) from None


def _as_http(value: Any, wanted: Any, name: str) -> Any:
    """What a program says as the type of HTTP requests. Raises ValueError."""
    try:
        return msgspec.json.decode(json.dumps(value), type=wanted)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _encode_kwargs(kwargs: Mapping[str, Any] | None) -> bytes:
    if not kwargs:
        return b""
    try:
        encoded = json.dumps(dict(kwargs)).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"chat_template_kwargs must be what JSON can say: {error}") from None
    if len(encoded) > MAX_TEMPLATE_KWARGS:
        raise ValueError(
            f"chat_template_kwargs has {len(encoded)} bytes as JSON, at most {MAX_TEMPLATE_KWARGS} are allowed"
        )
    return encoded


def _as_message(message: Any, index: int) -> ChatMessage:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"conversation {index}: a message needs a role and content, got {message!r:.80}"
        )
    extra = {
        key
        for key, value in message.items()
        if key not in ("role", "content", "name", *FIELDS) and not is_unread(key, value)
    }
    if extra:
        raise ValueError(
            f"conversation {index}: {', '.join(sorted(map(str, extra)))} is not supported in this version"
        )
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(
            f"conversation {index}: a message needs a role and content, got {message!r:.80}"
        )
    return ChatMessage(
        message["role"],
        _content(message.get("content"), index),
        message.get("name"),
        _fields(message, index),
    )


def _fields(message: Mapping[str, Any], index: int) -> bytes:
    """Calls, reasoning, whose result it is; as JSON."""
    fields = {name: message[name] for name in FIELDS if message.get(name)}
    if not fields:
        return b""
    read = _as_http({"role": message["role"], **fields}, MessageIn, f"conversation {index}")
    try:
        return message_fields(index, read)
    except RequestError as error:
        raise ValueError(f"conversation {index}: {error.message}") from None


def _content(content: Any, index: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping):
        raise ValueError(f"conversation {index}: content must be text, got {content!r:.80}")
    parts: list[str] = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, Mapping):
            text = text_of_part(part.get("type"), part.get("text"), part.get("refusal"))
        if not isinstance(text, str):
            raise ValueError(f"conversation {index}: content must be text, got {part!r:.80}")
        parts.append(text)
    return "\n".join(parts)


def as_params(params: Any, count: int) -> list[SamplingParams]:
    """One for all prompts, or one for each."""
    if isinstance(params, SamplingParams):
        return [params] * count
    params = list(params)
    if len(params) != count:
        raise ValueError(
            f"{count} prompts but {len(params)} sampling_params; give one for all or one for each"
        )
    return params
