"""What a handler needs of a tokenizer while it waits: the ids of a prompt, the text of ids, what is
to be echoed. Knows no HTTP."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final

from msgspec.structs import replace
from pagewire_protocol.columns import unpack
from pagewire_protocol.messages import Detokenize, Tokenize, Tokenized
from pagewire_protocol.prompt_checks import kept_prompt_tokens, truncated_ids
from pagewire_protocol.structs import Prompt

from ..requests.errors import RequestError, invalid
from ..requests.queries import Answer, MakeQuery
from .logprobs import token_text
from .params import Plan
from .prompts import query_text
from .reply import Echo
from .state import State

QUERIES: Final = 16
"""Prompts of one HTTP request that are resolved at a time."""


async def query(state: State, make: MakeQuery) -> Tokenized:
    """The answer to a query. Raises RequestError where there is none."""
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def on_answer(answer: Answer) -> None:
        if not future.done():
            future.set_result(answer)

    pending = state.owner.query(make, on_answer)
    try:
        answer = await future
    finally:
        state.owner.queries.discard(pending)
    if isinstance(answer, RequestError):
        raise answer
    return answer


async def resolve(state: State, plan: Plan) -> tuple[Plan, Sequence[Echo]]:
    """The plan, and what is shown of each prompt. Where that needs a prompt's ids, the plan gets
    them too. Raises RequestError."""
    if plan.rendering.chat or not plan.rendering.echo:
        return plan, [Echo()] * len(plan.prompts)
    places = asyncio.Semaphore(QUERIES)

    async def one(prompt: Prompt) -> tuple[Echo, bytes | None]:
        async with places:
            return await _resolve_prompt(state, plan, prompt)

    resolved = await asyncio.gather(*map(one, plan.prompts))
    echoes = [echo for echo, _ in resolved]
    if all(ids is None for _, ids in resolved):
        return plan, echoes
    prompts = [
        prompt if ids is None else Prompt(ids=ids)
        for prompt, (_, ids) in zip(plan.prompts, resolved, strict=True)
    ]
    # What was to be cut off is.
    text = replace(plan.template.text, truncate_prompt=0)
    return replace(plan, prompts=prompts, template=replace(plan.template, text=text)), echoes


async def _resolve_prompt(state: State, plan: Plan, prompt: Prompt) -> tuple[Echo, bytes | None]:
    """What is shown of a prompt, and the ids that it was resolved to, if it was."""
    text, rendering = prompt.text, plan.rendering
    is_cut = bool(plan.template.text.truncate_prompt)
    if text is not None and not rendering.scores_echo and not is_cut:
        return Echo(text), None
    model = state.stack.model()
    if not model.has_text:
        ids = _truncated(plan, prompt.ids or b"", model.max_model_len)
        first = token_text(b"", unpack("i", ids)[0])
        return Echo("", first, (0,) * (len(ids) // 4)), ids
    if text is not None:
        query_text(text, model)
    encode = partial(
        Tokenize,
        prompt=prompt,
        add_special_tokens=plan.add_special_tokens,
        with_offsets=rendering.scores_echo,
    )
    answer = await query(state, encode)
    ids = _truncated(plan, answer.ids, model.max_model_len)
    if not ids:
        raise invalid("The prompt has no tokens.", "prompt")
    if text is None or is_cut:
        decode = partial(Detokenize, ids=ids, with_offsets=rendering.scores_echo)
        answer = await query(state, decode)
        text = answer.text
    first = token_text(answer.first, unpack("i", ids)[0], rendering.ids_as_text)
    return Echo(text, first, tuple(unpack("i", answer.offsets).tolist())), ids


def _truncated(plan: Plan, ids: bytes, max_model_len: int) -> bytes:
    template = plan.template
    completion = 1 if template.max_tokens_is_rest else template.sampling.max_tokens
    return truncated_ids(
        ids, kept_prompt_tokens(template.text.truncate_prompt, max_model_len, completion)
    )
