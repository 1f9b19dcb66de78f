"""The requests of OpenAI's API as typed Structs, and how a body becomes one. Knows names and types; params.py checks ranges.

Every accepted parameter is a field here. Any other is refused by name, except that a known one may carry a value that changes nothing
(`"tools": null`), since clients send their whole parameter list.
"""

import re
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw, Struct

from .errors import ApiError, bad

_NULL: Final = Raw(b"null")


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Struct):
    type: str


class Part(Struct, forbid_unknown_fields=True):
    """A piece of a message's content. The kinds after `text` are known so that they can be refused by name."""

    type: str
    text: str | None = None
    image_url: Raw = _NULL
    input_audio: Raw = _NULL
    audio_url: Raw = _NULL
    video_url: Raw = _NULL
    file: Raw = _NULL
    refusal: Raw = _NULL


class MessageIn(Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    tool_call_id: None = None
    reasoning: None = None
    reasoning_content: None = None


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both generation endpoints accept."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: Raw = _NULL
    store: bool | None = None


class CompletionRequest(Request, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None


class ChatRequest(Request, kw_only=True):
    messages: list[MessageIn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


R = TypeVar("R", CompletionRequest, ChatRequest)

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "length_penalty": (1.0,),
    "logit_bias": ({},),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "request_id": (),
    "return_tokens_as_token_ids": (False,),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none",),
    "tools": (),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": (),
    "web_search_options": (),
}
"""Parameters that are known but not supported, with the values besides null that ask for nothing."""

_decoders: Final[dict[type[Any], msgspec.json.Decoder[Any]]] = {
    kind: msgspec.json.Decoder(kind) for kind in (CompletionRequest, ChatRequest)
}
_fields: Final = msgspec.json.Decoder(dict[str, Raw])
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*?)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*?)`")
_AT: Final = re.compile(r" - at `\$?\.?(.*)`$", re.DOTALL)


def parse(kind: type[R], body: bytes) -> R:
    """The request in `body`. Raises ApiError 400 naming the parameter or the place that is wrong."""
    if not body.strip():
        raise bad("The request body is empty; a JSON object is needed.")
    try:
        try:
            return _decoders[kind].decode(body)
        except msgspec.ValidationError as error:
            if not _UNKNOWN.match(str(error)) or " - at `" in str(error):
                raise
            return _decoders[kind].decode(_without_neutral(kind, body))
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except msgspec.DecodeError as error:
        raise bad(f"The request body of {len(body)} bytes is no valid JSON: {error}.") from None
    except UnicodeDecodeError:
        raise bad(f"The request body of {len(body)} bytes is not UTF-8.") from None
    except RecursionError:
        raise bad("The request body is nested too deeply.") from None


def _without_neutral(kind: type[R], body: bytes) -> bytes:
    """The body less the fields that ask for nothing. Raises ApiError for the first that asks for something."""
    given, known = _fields.decode(body), kind.__struct_fields__
    for name in [name for name in given if name not in known]:
        if not _asks_nothing(name, given):
            raise bad(f"The parameter `{name[:64]}` is not supported.", name[:64])
        del given[name]
    return msgspec.json.encode(given)


def _asks_nothing(name: str, given: dict[str, Raw]) -> bool:
    if name != "best_of" and name not in NEUTRAL:
        return False
    value = msgspec.json.decode(given[name])
    if value is None:
        return True
    if name == "best_of":
        n = msgspec.json.decode(given["n"]) if "n" in given else None
        return type(value) is int and value == (1 if n is None else n)
    return any(value == neutral and isinstance(value, bool) is isinstance(neutral, bool) for neutral in NEUTRAL[name])


def _explained(text: str) -> ApiError:
    found = _AT.search(text)
    where = found.group(1) if found else ""
    reason = text[: found.start()] if found else text
    unknown = _UNKNOWN.match(reason)
    if unknown:
        name = f"{where}.{unknown.group(1)}"[:128].lstrip(".")
        return bad(f"The parameter `{name}` is not supported.", name[:64])
    if reason.startswith("Expected `null`"):
        return bad(f"The parameter `{where}` is not supported: {reason}.", where[:64])
    missing = _MISSING.match(reason)
    if missing and not where:
        return bad(f"The parameter `{missing.group(1)}` is missing.", missing.group(1))
    param = where.partition(".")[0].partition("[")[0] or None
    return bad(f"`{where}`: {reason}." if where else f"{reason}.", param)
