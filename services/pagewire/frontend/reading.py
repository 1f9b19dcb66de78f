"""From a body to what its route runs: everything that is done with a client's bytes. Knows no HTTP
and no stack, so that it can be done in a process of its own (body_readers.py).

What comes out is bounded: texts by the context, token ids and biases as columns, lists by the
limits of their parameters.
"""

import codecs
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct
from pagewire_protocol.structs import Prompt

from ..requests.errors import invalid
from ..requests.model_facts import ModelFacts
from .anthropic import CountRequest, MessagesRequest, plan_count, plan_messages
from .conversations import Ignored
from .errors import unknown_model
from .openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from .params import Plan, plan_chat, plan_completion
from .parsing import parse, parse_open
from .prompts import at_most, chat_of, most_query_ids, query_text, text_prompt, token_column
from .responses_api import ResponsesRequest, plan_responses
from .tools import encoded_tools

BodyType = Literal["completion", "chat", "tokenize", "detokenize", "responses", "messages", "count"]


class Served(Struct, frozen=True):
    """What a body must fit: the model, and its names."""

    model: ModelFacts
    names: tuple[str, ...]


class TokenizePlan(Struct, frozen=True):
    """POST /tokenize."""

    prompt: Prompt
    add_special_tokens: bool
    with_texts: bool


class DetokenizePlan(Struct, frozen=True):
    """POST /detokenize. ids: int32 column."""

    ids: bytes


class BodyKind(NamedTuple):
    """How one type of body is read: raises RequestError or ApiError; and what comes of it."""

    read: Callable[[bytes, Served], Any]
    plan: type[Struct]


def _completion(body: bytes, served: Served) -> Plan:
    parsed = parse(CompletionRequest, body)
    _check_name(parsed.model, served)
    return plan_completion(parsed, served.model)


def _chat(body: bytes, served: Served) -> Plan:
    parsed = parse(ChatRequest, body)
    _check_name(parsed.model, served)
    return plan_chat(parsed, served.model)


def _responses(body: bytes, served: Served) -> Plan:
    ignored = Ignored()
    parsed = parse_open(ResponsesRequest, body, ignored)
    _check_name(parsed.model, served)
    return plan_responses(parsed, body, served.model, ignored)


def _messages(body: bytes, served: Served) -> Plan:
    ignored = Ignored()
    parsed = parse_open(MessagesRequest, body, ignored)
    _check_name(parsed.model, served)
    return plan_messages(parsed, served.model, ignored)


def _count(body: bytes, served: Served) -> Plan:
    ignored = Ignored()
    parsed = parse_open(CountRequest, body, ignored)
    _check_name(parsed.model, served)
    return plan_count(parsed, served.model, ignored)


def _tokenize(body: bytes, served: Served) -> TokenizePlan:
    parsed = parse(TokenizeRequest, body)
    _check_name(parsed.model, served)
    prompt = _prompt_of(parsed, served.model)
    # A chat template writes the special tokens that its model wants.
    special = parsed.add_special_tokens
    if special is None:
        special = prompt.chat is None
    return TokenizePlan(prompt, special, bool(parsed.return_token_strs))


def _prompt_of(parsed: TokenizeRequest, model: ModelFacts) -> Prompt:
    if (parsed.prompt is None) is (parsed.messages is None):
        raise invalid("Exactly one of `prompt` and `messages` must be given.", "prompt")
    if parsed.prompt is not None:
        query_text(parsed.prompt, model)
        return text_prompt(parsed.prompt, model) if parsed.prompt else Prompt(text="")
    return Prompt(
        chat=chat_of(
            parsed.messages or [],
            parsed.add_generation_prompt,
            parsed.continue_final_message,
            parsed.chat_template_kwargs,
            model,
            encoded_tools(parsed.tools),
        )
    )


def _detokenize(body: bytes, served: Served) -> DetokenizePlan:
    parsed = parse(DetokenizeRequest, body)
    _check_name(parsed.model, served)
    at_most("tokens", len(parsed.tokens), most_query_ids(served.model), "token ids")
    return DetokenizePlan(token_column("tokens", parsed.tokens, served.model))


def _check_name(name: str | None, served: Served) -> None:
    if name and name not in served.names:  # an empty one is no name, as in vLLM
        raise unknown_model(name, served.names)


KINDS: Final[dict[BodyType, BodyKind]] = {
    "completion": BodyKind(_completion, Plan),
    "chat": BodyKind(_chat, Plan),
    "tokenize": BodyKind(_tokenize, TokenizePlan),
    "detokenize": BodyKind(_detokenize, DetokenizePlan),
    "responses": BodyKind(_responses, Plan),
    "messages": BodyKind(_messages, Plan),
    "count": BodyKind(_count, Plan),
}


def read(body_type: BodyType, body: bytes, served: Served) -> Any:
    """The plan in a body. Raises RequestError or ApiError."""
    # RFC 8259 lets readers pass over a byte order mark; editors on Windows begin files with one.
    return KINDS[body_type].read(body.removeprefix(codecs.BOM_UTF8), served)
