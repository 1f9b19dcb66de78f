"""From a parsed request to a Plan: what to run, and how its answer is shown. Knows no HTTP and no
stack.

Sizes are charged here, before a job is copied once for each choice.
"""

import secrets

from msgspec import Struct
from pagewire_protocol.prompt_checks import kept_prompt_tokens, truncated_ids
from pagewire_protocol.sampling import ToolChoice
from pagewire_protocol.structs import Prompt

from ..requests.choices import Choices, choices_of
from ..requests.errors import invalid
from ..requests.job_template import JobTemplate, job_template
from ..requests.model_facts import ModelFacts
from ..requests.parameters import PARAMETERS, checked, checked_logprobs, checked_max_tokens
from ..requests.request import Job
from .charges import charge
from .grammars import grammar_of
from .openai import (
    MAX_REQUEST_ID,
    ChatRequest,
    CompletionRequest,
    Request,
    StreamOptions,
    is_request_id,
)
from .prompts import chat_of, prompts_of
from .rendering import Rendering
from .tools import answer_options, encoded_tools, shown_tools, template_kwargs


class Plan(Struct, frozen=True):
    """One HTTP request, ready to run. The bytes of this are bounded, and there are no jobs yet:
    those of one prompt are made when they are sent."""

    prompts: list[Prompt]
    template: JobTemplate
    rendering: Rendering
    add_special_tokens: bool
    priority: int
    cache_salt: str
    request_id: str = ""
    """The client's own name for the request, if it gave one."""
    ignored: tuple[str, ...] = ()
    """What the request holds without effect, to be logged."""

    @property
    def choices(self) -> Choices:
        """How many answers each prompt gets."""
        return self.template.choices

    def jobs(self, prompt: Prompt) -> list[Job]:
        """Those of one prompt, one for each choice; a beam search is one job."""
        return self.template.jobs(
            prompt,
            secrets.randbits,
            add_special_tokens=self.add_special_tokens,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


def plan_completion(request: CompletionRequest, model: ModelFacts) -> Plan:
    """Raises RequestError naming the parameter that is at fault."""
    if request.suffix:
        raise invalid(
            "`suffix` is not supported: this model cannot fill in text between a prompt and a suffix.",
            "suffix",
        )
    echo = bool(request.echo)
    logprobs = checked_logprobs("logprobs", request.logprobs)
    prompt_logprobs = checked_logprobs("prompt_logprobs", request.prompt_logprobs)
    scores_prompt = echo or prompt_logprobs >= 0
    max_tokens = checked_max_tokens(request.max_tokens, scores_prompt=scores_prompt)
    if max_tokens is None:
        max_tokens = int(PARAMETERS["max_tokens"].default)
    choices = choices_of(request)
    if choices.beams and echo and (logprobs >= 0 or max_tokens == 0):
        raise invalid(
            "Scoring a prompt (`echo` with `logprobs`, or `max_tokens` of 0) is not supported "
            "together with beam search.",
            "echo",
        )
    template = job_template(
        request,
        choices,
        model,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=max(prompt_logprobs, logprobs if echo else -1),
        return_prompt_ids=bool(request.return_token_ids),
        score_each=bool(request.stream),
        grammar=grammar_of(request),
    )
    prompts = prompts_of(
        request.prompt, model, max_tokens, truncated=bool(template.text.truncate_prompt)
    )
    kept = kept_prompt_tokens(template.text.truncate_prompt, model.max_model_len, max_tokens)
    prompts = [
        prompt if prompt.ids is None else Prompt(ids=truncated_ids(prompt.ids, kept))
        for prompt in prompts
    ]
    rendering = _rendering(request, choices, logprobs, prompt_logprobs, chat=False, echo=echo)
    return _plan(request, prompts, template, rendering, model)


def plan_chat(request: ChatRequest, model: ModelFacts) -> Plan:
    """Raises RequestError naming the parameter that is at fault."""
    if request.top_logprobs and not request.logprobs:
        raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    top_logprobs = checked_logprobs("top_logprobs", request.top_logprobs)
    logprobs = max(0, top_logprobs) if request.logprobs else -1
    prompt_logprobs = checked_logprobs("prompt_logprobs", request.prompt_logprobs)
    scores_prompt = prompt_logprobs >= 0
    max_tokens = checked_max_tokens(
        request.max_completion_tokens, "max_completion_tokens", scores_prompt=scores_prompt
    )
    if max_tokens is None:
        max_tokens = checked_max_tokens(request.max_tokens, scores_prompt=scores_prompt)
    choices = choices_of(request)
    shown, choice = shown_tools(request)
    tools = encoded_tools(shown)
    options = answer_options(request, shown, choice, model, choices.beams is not None)
    may_call = options is not None and options.tool_choice is not ToolChoice.NONE
    chat = chat_of(
        request.messages,
        request.add_generation_prompt,
        request.continue_final_message,
        template_kwargs(request, model),
        model,
        tools if may_call else b"",
    )
    template = job_template(
        request,
        choices,
        model,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_prompt_ids=bool(request.return_token_ids),
        score_each=bool(request.stream),
        grammar=grammar_of(request),
        answer=options,
    )
    last = chat.messages[-1]
    role = "assistant" if chat.add_generation_prompt else last.role
    rendering = _rendering(
        request,
        choices,
        logprobs,
        prompt_logprobs,
        chat=True,
        role=role,
        prefix=last.content if request.echo and last.role == role else "",
        has_parts=options is not None,
        include_reasoning=request.include_reasoning is not False,
    )
    return _plan(request, [Prompt(chat=chat)], template, rendering, model)


def _plan(
    request: Request,
    prompts: list[Prompt],
    template: JobTemplate,
    rendering: Rendering,
    model: ModelFacts,
) -> Plan:
    charge(prompts, template, model)
    # A conversation's special tokens are in the chat template.
    add_special_tokens = request.add_special_tokens
    if add_special_tokens is None:
        add_special_tokens = not rendering.chat
    priority = checked(PARAMETERS["priority"], request.priority)
    cache_salt = checked(PARAMETERS["cache_salt"], request.cache_salt)
    return Plan(
        prompts,
        template,
        rendering,
        add_special_tokens,
        priority,
        cache_salt,
        _request_id(request.request_id),
    )


def _rendering(
    request: Request,
    choices: Choices,
    logprobs: int,
    prompt_logprobs: int,
    *,
    chat: bool,
    echo: bool = False,
    role: str = "assistant",
    prefix: str = "",
    has_parts: bool = False,
    include_reasoning: bool = True,
) -> Rendering:
    stream, options = bool(request.stream), request.stream_options
    if options not in (None, StreamOptions()) and not stream:
        raise invalid("Stream options can only be defined when `stream=True`.", "stream_options")
    if prompt_logprobs >= 0 and stream:
        raise invalid("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if choices.ranked and stream:
        raise invalid(
            f"`best_of`={choices.per_prompt} cannot be streamed with n={choices.n}: "
            "the best are known only at the end.",
            "best_of",
        )
    return Rendering(
        chat=chat,
        n=choices.n,
        per_prompt=choices.per_prompt,
        stream=stream,
        include_usage=bool(options and options.include_usage),
        continuous_usage_stats=bool(options and options.continuous_usage_stats),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_token_ids=bool(request.return_token_ids),
        ids_as_text=bool(request.return_tokens_as_token_ids),
        echo=echo,
        role=role,
        has_parts=has_parts,
        include_reasoning=include_reasoning,
        prefix=prefix,
    )


def _request_id(request_id: str | None) -> str:
    if request_id is not None and not is_request_id(request_id):
        raise invalid(
            f"`request_id` must have 1 to {MAX_REQUEST_ID} printable ASCII characters.",
            "request_id",
        )
    return request_id or ""
