"""POST /tokenize, /detokenize and .../render, as vLLM has them: a tokenizer's work without the
model's."""

from functools import partial
from typing import Any

from aiohttp import web
from pagewire_protocol.columns import MAX_TOKENS, unpack
from pagewire_protocol.messages import Detokenize, Tokenize
from pagewire_protocol.structs import Prompt

from ..requests.errors import invalid
from ..requests.model_facts import ModelFacts
from .body import read_body
from .errors import JSON
from .openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Request,
    TokenizeRequest,
)
from .params import Plan, plan_chat, plan_completion
from .parsing import parse
from .prompts import at_most, chat_of, text_prompt, token_column
from .sse import encode
from .state import STATE, State
from .tokenizer_queries import query


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: {"prompt"} or {"messages"} -> {"count", "max_model_len", "tokens",
    "token_strs"}."""
    state = request.app[STATE]
    parsed = parse(TokenizeRequest, await read_body(request, state.max_body))
    state.check_model(parsed.model)
    model = state.stack.model()
    prompt = _prompt(parsed, model)
    # A chat template writes the special tokens that its model wants.
    special = parsed.add_special_tokens
    if special is None:
        special = prompt.chat is None
    make = partial(
        Tokenize,
        prompt=prompt,
        add_special_tokens=special,
        with_texts=bool(parsed.return_token_strs),
    )
    answer = await query(state, make)
    ids = unpack("i", answer.ids).tolist()
    texts = list(answer.texts) if parsed.return_token_strs else None
    body = {
        "count": len(ids),
        "max_model_len": model.max_model_len,
        "tokens": ids,
        "token_strs": texts,
    }
    return web.Response(body=encode(body), content_type=JSON)


def _prompt(parsed: TokenizeRequest, model: ModelFacts) -> Prompt:
    if (parsed.prompt is None) is (parsed.messages is None):
        raise invalid("Exactly one of `prompt` and `messages` must be given.", "prompt")
    if parsed.prompt is not None:
        return text_prompt(parsed.prompt, model) if parsed.prompt else Prompt(text="")
    return Prompt(
        chat=chat_of(
            parsed.messages or [],
            parsed.add_generation_prompt,
            parsed.continue_final_message,
            parsed.chat_template_kwargs,
            model,
        )
    )


async def render_chat(request: web.Request) -> web.Response:
    """POST /v1/chat/completions/render: a request for an answer -> {"model", "token_ids"} of its
    prompt. vLLM's router goes by the token ids."""
    state = request.app[STATE]
    parsed = parse(ChatRequest, await read_body(request, state.max_body))
    state.check_model(parsed.model)
    (rendered,) = await _rendered(state, parsed, plan_chat(parsed, state.stack.model()))
    return web.Response(body=encode(rendered), content_type=JSON)


async def render_completion(request: web.Request) -> web.Response:
    """POST /v1/completions/render: the same for each prompt, as a list."""
    state = request.app[STATE]
    parsed = parse(CompletionRequest, await read_body(request, state.max_body))
    state.check_model(parsed.model)
    rendered = await _rendered(state, parsed, plan_completion(parsed, state.stack.model()))
    return web.Response(body=encode(rendered), content_type=JSON)


async def _rendered(state: State, parsed: Request, plan: Plan) -> list[dict[str, Any]]:
    """For each prompt. Raises RequestError."""
    if parsed.truncate_prompt_tokens is not None:
        raise invalid(
            "`truncate_prompt_tokens` is not supported here; send the request for an answer.",
            "truncate_prompt_tokens",
        )
    columns: list[bytes] = []
    for job in plan.jobs[:: plan.jobs_per_prompt]:
        column = job.prompt.ids
        if column is None:
            special = job.add_special_tokens
            make = partial(
                Tokenize, prompt=job.prompt, add_special_tokens=special, with_texts=False
            )
            column = (await query(state, make)).ids
        columns.append(column)
    model = state.names[0]
    return [{"model": model, "token_ids": unpack("i", column).tolist()} for column in columns]


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: {"tokens"} -> {"prompt"}."""
    state = request.app[STATE]
    parsed = parse(DetokenizeRequest, await read_body(request, state.max_body))
    state.check_model(parsed.model)
    model = state.stack.model()
    at_most("tokens", len(parsed.tokens), MAX_TOKENS, "token ids")
    column = token_column("tokens", parsed.tokens, model)
    answer = await query(state, partial(Detokenize, ids=column, skip_special_tokens=False))
    return web.Response(body=encode({"prompt": answer.text}), content_type=JSON)
