"""POST /tokenize, /detokenize and .../render, as vLLM has them: a tokenizer's work without the
model's."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial, wraps
from typing import Any, Final

from aiohttp import web
from msgspec import Raw
from pagewire_protocol.columns import unpack
from pagewire_protocol.messages import Detokenize, Tokenize

from ..requests.errors import invalid
from .errors import JSON
from .generate import TENANT, read_plan
from .params import Plan
from .reading import BodyType, DetokenizePlan, TokenizePlan
from .sse import encode
from .state import STATE
from .tokenizer_queries import query
from .turns import Turn

Handler = Callable[[web.Request], Awaitable[web.Response]]
PIECE: Final = 16_384
"""Items of a list that are encoded at a time."""


def _limited(handler: Handler) -> Handler:
    """The handler, within what the request's key may use."""

    @wraps(handler)
    async def limited(request: web.Request) -> web.Response:
        state = request.app[STATE]
        with state.key_limits.leased(request.get(TENANT, ""), state.clock()):
            return await handler(request)

    return limited


@_limited
async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: {"prompt"} or {"messages"} -> {"count", "max_model_len", "tokens",
    "token_strs"}."""
    state = request.app[STATE]
    plan: TokenizePlan = await read_plan(request, state, "tokenize")
    make = partial(
        Tokenize,
        prompt=plan.prompt,
        add_special_tokens=plan.add_special_tokens,
        with_texts=plan.with_texts,
    )
    answer = await query(state, make)
    body = {
        "count": len(answer.ids) // 4,
        "max_model_len": state.stack.model().max_model_len,
        "tokens": await _json_list(unpack("i", answer.ids)),
        "token_strs": await _json_list(answer.texts) if plan.with_texts else None,
    }
    return web.Response(body=encode(body), content_type=JSON)


@_limited
async def count_tokens(request: web.Request) -> web.Response:
    """POST /v1/messages/count_tokens: {"input_tokens"}."""
    (rendered,) = await _columns(request, "count")
    return web.Response(body=encode({"input_tokens": len(rendered) // 4}), content_type=JSON)


async def tokenizer_info(request: web.Request) -> web.Response:
    """GET /tokenizer_info: what is known of the tokenizer and of how answers are written."""
    state = request.app[STATE]
    state.check_ready()
    model = state.stack.model()
    body = {
        "tokenizer": state.tokenizer_path,
        "has_text": model.has_text,
        "has_chat_template": model.has_chat_template,
        "vocab_size": model.vocab_size,
        "max_model_len": model.max_model_len,
        "eos_token_ids": list(model.eos_token_ids),
        "tool_call_parser": model.tool_format,
        "has_reasoning": model.has_reasoning,
    }
    return web.Response(body=encode(body), content_type=JSON)


@_limited
async def render_chat(request: web.Request) -> web.Response:
    """POST /v1/chat/completions/render: a request for an answer -> {"model", "token_ids"} of its
    prompt. vLLM's router goes by the token ids."""
    (rendered,) = await _rendered(request, "chat")
    return web.Response(body=encode(rendered), content_type=JSON)


@_limited
async def render_completion(request: web.Request) -> web.Response:
    """POST /v1/completions/render: the same for each prompt, as a list."""
    return web.Response(body=encode(await _rendered(request, "completion")), content_type=JSON)


async def _rendered(request: web.Request, body_type: BodyType) -> list[dict[str, Any]]:
    """For each prompt. Raises RequestError."""
    name = request.app[STATE].names[0]
    return [
        {"model": name, "token_ids": await _json_list(unpack("i", column))}
        for column in await _columns(request, body_type)
    ]


async def _columns(request: web.Request, body_type: BodyType) -> list[bytes]:
    """The token ids of each prompt, as columns. Raises RequestError."""
    state = request.app[STATE]
    plan: Plan = await read_plan(request, state, body_type)
    if plan.template.text.truncate_prompt:
        raise invalid(
            "`truncate_prompt_tokens` is not supported here; send the request for an answer.",
            "truncate_prompt_tokens",
        )
    columns: list[bytes] = []
    for prompt in plan.prompts:
        column = prompt.ids
        if column is None:
            special = plan.add_special_tokens
            make = partial(Tokenize, prompt=prompt, add_special_tokens=special, with_texts=False)
            column = (await query(state, make)).ids
        columns.append(column)
    return columns


@_limited
async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: {"tokens"} -> {"prompt"}."""
    state = request.app[STATE]
    plan: DetokenizePlan = await read_plan(request, state, "detokenize")
    make = partial(Detokenize, ids=plan.ids, skip_special_tokens=False)
    answer = await query(state, make)
    return web.Response(body=encode({"prompt": answer.text}), content_type=JSON)


async def _json_list(items: Sequence[Any] | memoryview) -> Raw:
    """A long list as JSON, encoded a piece at a time."""
    pieces: list[bytes] = []
    turn = Turn()
    for start in range(0, len(items), PIECE):
        pieces.append(encode(list(items[start : start + PIECE]))[1:-1])
        if turn.is_over():
            await turn.next()
    return Raw(b"[%b]" % b",".join(pieces))
