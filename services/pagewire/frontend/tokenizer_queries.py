"""What a handler needs of a tokenizer while it waits: the ids of a prompt, the text of ids, what is
to be echoed. Knows no HTTP."""

import asyncio
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace
from pagewire_protocol.columns import unpack
from pagewire_protocol.messages import Detokenize, Tokenize, Tokenized
from pagewire_protocol.prompt_checks import kept_prompt_tokens, truncated_ids
from pagewire_protocol.structs import Prompt

from ..requests.errors import RequestError, invalid
from ..requests.queries import Answer, MakeQuery
from ..requests.request import Job
from .logprobs import token_text
from .params import Plan
from .rendering import Rendering
from .reply import Echo
from .state import State


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


async def resolve(state: State, plan: Plan) -> tuple[list[Job], Sequence[Echo]]:
    """The plan's jobs, and what is shown of each prompt. Where that needs the prompt's ids, the
    jobs get them too. Raises RequestError."""
    per_prompt = plan.jobs_per_prompt
    if plan.rendering.chat or not plan.rendering.echo:
        return plan.jobs, [Echo()] * (len(plan.jobs) // per_prompt)
    groups = [plan.jobs[i : i + per_prompt] for i in range(0, len(plan.jobs), per_prompt)]
    resolved = await asyncio.gather(
        *(_resolve_prompt(state, plan.rendering, group[0]) for group in groups)
    )
    jobs = [
        job if ids is None else _with_ids(job, ids)
        for group, (_, ids) in zip(groups, resolved, strict=True)
        for job in group
    ]
    return jobs, [echo for echo, _ in resolved]


async def _resolve_prompt(
    state: State, rendering: Rendering, job: Job
) -> tuple[Echo, bytes | None]:
    """What is shown of a job's prompt, and the ids that it was resolved to, if it was."""
    text = job.prompt.text
    if text is not None and not rendering.scores_echo and not job.text.truncate_prompt:
        return Echo(text), None
    model = state.stack.model()
    if not model.has_text:
        ids = _truncated(job, job.prompt.ids or b"", model.max_model_len)
        first = token_text(b"", unpack("i", ids)[0])
        return Echo("", first, (0,) * (len(ids) // 4)), ids
    encode = partial(
        Tokenize,
        prompt=job.prompt,
        add_special_tokens=job.add_special_tokens,
        with_offsets=rendering.scores_echo,
    )
    answer = await query(state, encode)
    ids = _truncated(job, answer.ids, model.max_model_len)
    if not ids:
        raise invalid("The prompt has no tokens.", "prompt")
    if text is None or job.text.truncate_prompt:
        decode = partial(Detokenize, ids=ids, with_offsets=rendering.scores_echo)
        answer = await query(state, decode)
        text = answer.text
    first = token_text(answer.first, unpack("i", ids)[0], rendering.ids_as_text)
    return Echo(text, first, tuple(unpack("i", answer.offsets).tolist())), ids


def _truncated(job: Job, ids: bytes, max_model_len: int) -> bytes:
    completion = 1 if job.max_tokens_is_rest else job.sampling.max_tokens
    return truncated_ids(
        ids, kept_prompt_tokens(job.text.truncate_prompt, max_model_len, completion)
    )


def _with_ids(job: Job, ids: bytes) -> Job:
    return replace(job, prompt=Prompt(ids=ids), text=replace(job.text, truncate_prompt=0))
