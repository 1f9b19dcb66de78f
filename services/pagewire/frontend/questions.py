"""What a handler asks a tokenizer while it waits: the ids of a prompt, the text of ids, what is to
be echoed. Knows no HTTP."""

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.messages import Detokenize, Tokenize, Tokenized
from pagewire_protocol.structs import Prompt

from ..requests.errors import ApiError, bad
from ..requests.queries import Question
from ..requests.request import Job
from .params import Plan
from .reply import Echo
from .state import State


async def ask(state: State, question: Question) -> Tokenized:
    """Raises ApiError where there is no answer."""
    future: asyncio.Future[Tokenized | ApiError] = asyncio.get_running_loop().create_future()

    def answered(answer: Tokenized | ApiError) -> None:
        if not future.done():
            future.set_result(answer)

    asked = state.owner.ask(question, answered)
    try:
        answer = await future
    finally:
        state.owner.asks.forget(asked)
    if isinstance(answer, ApiError):
        raise answer
    return answer


async def ids_of(state: State, prompt: Prompt, add_special_tokens: bool) -> bytes:
    """An int32 column."""
    if prompt.ids is not None:
        return prompt.ids
    return (await ask(state, Tokenize(0, "-", prompt, add_special_tokens))).ids


async def text_of(state: State, ids: bytes, skip_special_tokens: bool = False) -> str:
    return (await ask(state, Detokenize(0, "-", ids, skip_special_tokens))).text


async def resolve(state: State, plan: Plan) -> tuple[list[Job], Sequence[Echo]]:
    """The plan's jobs, and what is to be shown of each prompt. Where that needs the prompt's ids,
    the jobs get them too."""
    each = 1 if plan.beams else plan.per_prompt
    if plan.chat or not plan.echo:
        return plan.jobs, [Echo()] * (len(plan.jobs) // each)
    groups = [plan.jobs[i : i + each] for i in range(0, len(plan.jobs), each)]
    echoes = await asyncio.gather(*(_echo(state, plan, group[0]) for group in groups))
    jobs = [
        job if ids is None else _with_ids(job, ids)
        for group, (_, ids) in zip(groups, echoes, strict=True)
        for job in group
    ]
    return jobs, [echo for echo, _ in echoes]


async def _echo(state: State, plan: Plan, job: Job) -> tuple[Echo, bytes | None]:
    text = job.prompt.text
    if text is not None and not plan.scores_echo and not job.text.truncate_prompt:
        return Echo(text), None
    if not state.stack.model().has_text:
        ids = truncated(job, job.prompt.ids or b"", state.stack.model().max_model_len)
        return Echo("", f"token_id:{unpack('i', ids)[0]}"), ids
    ids = truncated(
        job,
        await ids_of(state, job.prompt, job.add_special_tokens),
        state.stack.model().max_model_len,
    )
    if not ids:
        raise bad("The prompt has no tokens.", "prompt")
    if text is None or job.text.truncate_prompt:
        text = await text_of(state, ids)
    first = unpack("i", ids)[0]
    return Echo(
        text, f"token_id:{first}" if plan.ids_as_text else await text_of(state, pack("i", [first]))
    ), ids


def truncated(job: Job, ids: bytes, max_model_len: int) -> bytes:
    """The last tokens of a prompt, as many as its job says."""
    keep = job.text.truncate_prompt
    if keep < 0:
        keep = max(1, max_model_len - (1 if job.max_tokens_is_rest else job.sampling.max_tokens))
    return ids[-4 * keep :] if keep else ids


def _with_ids(job: Job, ids: bytes) -> Job:
    return replace(job, prompt=Prompt(ids=ids), text=replace(job.text, truncate_prompt=0))
