"""POST /tokenize and /detokenize, as vLLM has them: a tokenizer's work without the model's."""

from functools import partial

from aiohttp import web
from pagewire_protocol.columns import MAX_TOKENS, unpack
from pagewire_protocol.messages import Detokenize, Tokenize
from pagewire_protocol.structs import Prompt

from ..requests.errors import invalid
from ..requests.model_facts import ModelFacts
from .body import read_body
from .errors import JSON
from .openai import DetokenizeRequest, TokenizeRequest
from .parsing import parse
from .prompts import at_most, chat_of, text_prompt, token_column
from .sse import encode
from .state import STATE
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
