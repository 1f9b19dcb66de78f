"""How a body becomes a request. Knows no parameter's meaning, only which are known.

A parameter that is no field of the request is refused by name, except that a known one may carry a
value that changes nothing (`"tools": null`), since clients send their whole parameter list.
"""

import re
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw, Struct

from ..requests.errors import RequestError, invalid
from .openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

R = TypeVar("R", bound=Struct)

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "ec_transfer_params": (),
    "function_call": ("none",),
    "functions": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "logits_processors": (),
    "logprob_token_ids": (),
    "max_completion_tokens": (),
    "media_io_kwargs": (),
    "mm_payload": ("tensors",),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "repetition_detection": (),
    "return_mm_kwargs": (False,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": (),
    "stream_interval": (1,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none",),
    "tools": (),
    "top_logprobs": (0,),
    "truncation_side": ("left",),
    "verbosity": (),
    "vllm_xargs": (),
    "watermarking": (),
    "web_search_options": (),
}
"""Parameters that are known but not supported (by an endpoint), with the values besides null that
ask for nothing."""

_decoders: Final[dict[type[Any], msgspec.json.Decoder[Any]]] = {
    request_type: msgspec.json.Decoder(request_type)
    for request_type in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
}
_read_fields: Final = msgspec.json.Decoder(dict[str, Raw])
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*?)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*?)`")
_AT: Final = re.compile(r" - at `\$?\.?(.*)`$", re.DOTALL)


def parse(request_type: type[R], body: bytes) -> R:
    """The request in `body`. Raises RequestError naming the parameter or the place that is
    wrong."""
    if not body.strip():
        raise invalid("The request body is empty; a JSON object is needed.")
    try:
        try:
            return _decoders[request_type].decode(body)
        except msgspec.ValidationError as error:
            if not _UNKNOWN.match(str(error)) or " - at `" in str(error):
                raise
            return _decoders[request_type].decode(_without_neutral(request_type, body))
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except msgspec.DecodeError as error:
        raise invalid(f"The request body of {len(body)} bytes is no valid JSON: {error}.") from None
    except UnicodeDecodeError:
        raise invalid(f"The request body of {len(body)} bytes is not UTF-8.") from None
    except RecursionError:
        raise invalid("The request body is nested too deeply.") from None


def _without_neutral(request_type: type[R], body: bytes) -> bytes:
    """The body less the fields that ask for nothing. Raises RequestError for the first that asks for
    something."""
    fields = _read_fields.decode(body)
    for name in [name for name in fields if name not in request_type.__struct_fields__]:
        if not _asks_nothing(name, fields[name]):
            raise invalid(f"The parameter `{name[:64]}` is not supported.", name[:64])
        del fields[name]
    return msgspec.json.encode(fields)


def _asks_nothing(name: str, encoded: Raw) -> bool:
    if name not in NEUTRAL:
        return False
    value = msgspec.json.decode(encoded)
    return value is None or any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool)
        for neutral in NEUTRAL[name]
    )


def _explained(text: str) -> RequestError:
    at = _AT.search(text)
    where = at.group(1) if at else ""
    reason = text[: at.start()] if at else text
    unknown = _UNKNOWN.match(reason)
    if unknown:
        name = f"{where}.{unknown.group(1)}"[:128].lstrip(".")
        return invalid(f"The parameter `{name}` is not supported.", name[:64])
    if reason.startswith("Expected `null`"):
        return invalid(f"The parameter `{where}` is not supported: {reason}.", where[:64])
    missing = _MISSING.match(reason)
    if missing and not where:
        return invalid(f"The parameter `{missing.group(1)}` is missing.", missing.group(1))
    param = where.partition(".")[0].partition("[")[0] or None
    return invalid(f"`{where}`: {reason}." if where else f"{reason}.", param)
