"""The forms in which a program may hand over prompts, made into the protocol's one form. Knows no process and no socket."""

from collections.abc import Mapping, Sequence
from typing import Any

from pagewire_protocol.columns import pack
from pagewire_protocol.parts import Chat, ChatMessage, Prompt

from .params import SamplingParams

PROMPT_KEYS = {"prompt", "prompt_token_ids"}


def as_prompts(prompts: Any) -> list[Prompt]:
    """str, token ids, {"prompt": str}, {"prompt_token_ids": [int]} or a list of these. Raises ValueError or TypeError naming the place."""
    if isinstance(prompts, (str, Mapping)) or _is_ids(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a string, token ids, a dict or a list of these, got {type(prompts).__name__}")
    return [_as_prompt(prompt, i) for i, prompt in enumerate(prompts)]


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0 and all(type(t) is int for t in value)


def _as_prompt(prompt: Any, place: int) -> Prompt:
    if isinstance(prompt, Mapping):
        extra = {key for key, value in prompt.items() if value is not None} - PROMPT_KEYS
        if extra:
            raise ValueError(f"prompt {place}: {', '.join(sorted(map(str, extra)))} is not supported in this version")
        ids = prompt.get("prompt_token_ids")
        prompt = prompt.get("prompt") if ids is None else ids
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if not _is_ids(prompt):
        raise ValueError(f"prompt {place}: a string or a list of at least one token id is needed, got {prompt!r:.80}")
    try:
        return Prompt(ids=pack("i", prompt))
    except OverflowError:
        raise ValueError(f"prompt {place}: a token id is out of range: {max(prompt, key=abs)}") from None


def as_chats(messages: Any, add_generation_prompt: bool, continue_final_message: bool) -> list[Prompt]:
    """One conversation (a list of {"role", "content"}) or a list of conversations."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError("messages must be a list of {'role': ..., 'content': ...}, or a list of such lists")
    talks = [messages] if isinstance(messages[0], Mapping) else messages
    return [
        Prompt(chat=Chat(tuple(_as_message(message, i) for message in talk), add_generation_prompt, continue_final_message))
        for i, talk in enumerate(talks)
    ]


def _as_message(message: Any, place: int) -> ChatMessage:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"conversation {place}: a message needs a role and content, got {message!r:.80}")
    extra = {key for key, value in message.items() if value is not None} - {"role", "content", "name"}
    if extra:
        raise ValueError(f"conversation {place}: {', '.join(sorted(map(str, extra)))} is not supported in this version")
    if "content" not in message:
        raise ValueError(f"conversation {place}: a message needs a role and content, got {message!r:.80}")
    return ChatMessage(message["role"], _content(message.get("content"), place), message.get("name"))


def _content(content: Any, place: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[str] = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"conversation {place}: content must be text, got {part!r:.80}")
        parts.append(part["text"])
    return "".join(parts)


def as_params(params: Any, count: int) -> list[SamplingParams]:
    """One for all prompts, or one for each."""
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    chosen = list(params)
    if len(chosen) != count:
        raise ValueError(f"{count} prompts but {len(chosen)} sampling_params; give one for all or one for each")
    return chosen
