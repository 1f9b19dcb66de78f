"""What a body may hold without asking for anything: the values of each parameter that mean the same
as leaving it out. Knows names and values, nothing of what a request does.

Clients and routers send their whole list of parameters with its defaults: vLLM's and SGLang's
routers decode a body into their own types and encode it again. What asks for nothing is dropped;
what would change the answer is refused by name.
"""

from collections.abc import Container, Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw

from ..requests.errors import invalid
from ..requests.messages import is_unread
from .openai import MessageIn, Part, StreamOptions

Values = tuple[Any, ...]
Table = Mapping[str, Values]

NEUTRAL: Final[Table] = {
    # --- of prompts and conversations
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "input_ids": (),
    "prompt_embeds": (),
    "return_prompt_text": (False,),
    "suffix": ("",),
    "truncation_side": ("left",),
    # --- of how long an answer may be, and where it stops
    "max_completion_tokens": (),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "no_stop_trim": (False,),
    "stop_regex": ("", []),
    # --- of how a token is chosen
    "custom_logit_processor": (),
    "custom_params": ({},),
    "do_sample": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "repeat_penalty": (1,),
    "repetition_detection": (),
    "sampling_seed": (),
    "tfs_z": (1,),
    "thinking_token_budget": (),
    "top_a": (0,),
    "typical_p": (1,),
    "watermark": (False,),
    "watermarking": (),
    "xtc_probability": (0,),
    # --- of formats
    "guided_decoding_backend": ("auto", "guidance", "lm-format-enforcer", "outlines", "xgrammar"),
    "prediction": (),
    # --- of tools and reasoning
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # --- of what comes back
    "detokenize": (True,),
    "logprob_start_len": (-1,),
    "logprob_token_ids": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_logprob": (False,),
    "return_meta_info": (False,),
    "return_routed_experts": (False,),
    "return_token_offsets": (False,),
    "stream_interval": (1,),
    "top_logprobs": (0,),
    # --- of images, sound and video
    "audio": (),
    "media_io_kwargs": ({},),
    "mm_payload": ("tensors",),
    "mm_processor_kwargs": ({},),
    "return_mm_kwargs": (False,),
    "use_audio_in_video": (False,),
    # --- of where a request runs, and with what
    "background": (False,),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "cache_prompt": (True,),
    "data_parallel_rank": (),
    "ec_transfer_params": (),
    "extra_key": (),
    "kv_transfer_params": (),
    "lora_path": (),
    "moderation": (),
    "prompt_cache_options": (),
    "rid": (),
    "routed_experts_prompt_start": (0,),
    "session_id": (),
    "session_params": ({},),
    "vllm_xargs": ({},),
}
"""Parameters of requests that are known but not supported (by an endpoint), with the values besides
null that mean the same as leaving them out. An unknown one may be null and nothing else."""

OF_CHATS: Final = frozenset(
    {
        "include_reasoning",
        "parallel_tool_calls",
        "reasoning_effort",
        "thinking_token_budget",
        "tool_choice",
        "tools",
    }
)
"""Those that chats have, where each value means something."""

_read_fields: Final = msgspec.json.Decoder(dict[str, Raw])
_read_objects: Final = msgspec.json.Decoder(list[dict[str, Raw]])
_read_parts: Final = msgspec.json.Decoder(list[dict[str, Raw] | str])


def without_neutral(known: Container[str], body: bytes) -> bytes:
    """The body of a request less everything in it that asks for nothing. `known`: the parameters
    that the request has. Raises RequestError for the first unknown one that asks for something, and
    msgspec's errors where the body is no JSON object."""
    fields = _read_fields.decode(body)
    _drop(fields, known, NEUTRAL)
    if "messages" in fields and "messages" in known:
        fields["messages"] = _messages(fields["messages"])
    if "stream_options" in fields and bytes(fields["stream_options"]).startswith(b"{"):
        options = _read_fields.decode(fields["stream_options"])
        _drop(options, StreamOptions.__struct_fields__, {}, "stream_options.")
        fields["stream_options"] = Raw(msgspec.json.encode(options))
    return msgspec.json.encode(fields)


def _drop(fields: dict[str, Raw], known: Container[str], neutral: Table, where: str = "") -> None:
    """Remove from `fields` what asks for nothing. `where`: the place of these fields in the body."""
    for name, encoded in list(fields.items()):
        if name in known and (name not in neutral or name in OF_CHATS):
            continue
        if _means_nothing(encoded, neutral.get(name, ())):
            del fields[name]
        elif name not in known:
            path = where + name[:64]
            raise invalid(f"The parameter `{path}` is not supported.", path)


def _means_nothing(encoded: Raw, values: Values) -> bool:
    if bytes(encoded) == b"null":
        return True
    if not values:
        return False
    value = msgspec.json.decode(encoded)
    return any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool)
        for neutral in values
    )


def _messages(encoded: Raw) -> Raw:
    """The messages of a conversation without what says nothing to the model. A list of anything
    else is left as it is, for the typed decoder to explain."""
    try:
        messages = _read_objects.decode(encoded)
    except msgspec.ValidationError:
        return encoded
    for index, message in enumerate(messages):
        where = f"messages[{index}]."
        _drop_unread(message, MessageIn.__struct_fields__, where)
        if bytes(message.get("content", b"")).startswith(b"["):
            message["content"] = _parts(message["content"], f"{where}content")
    return Raw(msgspec.json.encode(messages))


def _parts(encoded: Raw, where: str) -> Raw:
    try:
        parts = _read_parts.decode(encoded)
    except msgspec.ValidationError:
        return encoded
    for index, part in enumerate(parts):
        if not isinstance(part, str):
            _drop_unread(part, Part.__struct_fields__, f"{where}[{index}].")
    return Raw(msgspec.json.encode(parts))


def _drop_unread(fields: dict[str, Raw], known: Container[str], where: str) -> None:
    """Remove what a message or a part has beside what reaches the chat template."""
    for name, encoded in list(fields.items()):
        if name in known:
            continue
        if not is_unread(name, msgspec.json.decode(encoded)):
            path = where + name[:64]
            raise invalid(f"The parameter `{path}` is not supported.", path)
        del fields[name]
