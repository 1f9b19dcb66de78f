"""From a parsed request to a Plan: what to run, and how its answer is put together. Knows no HTTP
and no stack.

Sizes are charged here, before a job is copied once for each choice.
"""

from typing import Final

from msgspec import Struct
from msgspec.structs import replace
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import Prompt

from ..requests.errors import bad
from ..requests.request import Job
from .charges import charge
from .choices import Beams, Choices, choices_of
from .limits import I31, within
from .openai import ChatRequest, CompletionRequest, Request
from .prompts import Model, chat_of, prompts_of
from .request_ids import MAX_LENGTH, usable
from .sampling import candidates, sampling_of, text_options, with_seed

MAX_CACHE_SALT: Final = 128
DEFAULT_MAX_TOKENS: Final = 16


class Plan(Struct, frozen=True):
    """One HTTP request, ready to run: `jobs` holds `per_prompt` choices for each prompt, prompt by
    prompt; `n` of each are shown."""

    chat: bool
    jobs: list[Job]
    n: int
    per_prompt: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: int
    """Candidates to show for each token; -1: no log-probabilities."""
    prompt_logprobs: int
    """The same for the prompt's tokens, in vLLM's shape."""
    return_token_ids: bool
    ids_as_text: bool
    """Tokens are called `token_id:123` in log-probabilities."""
    echo: bool = False
    """The prompt comes before the text, and its log-probabilities before the text's."""
    role: str = "assistant"
    opening: str = ""
    """What a chat's answer begins with: the message that it continues, under `echo`."""
    beams: Beams | None = None
    request_id: str = ""

    @property
    def scores_echo(self) -> bool:
        return self.echo and self.logprobs >= 0


def plan_completion(request: CompletionRequest, model: Model) -> Plan:
    if request.suffix:
        raise bad(
            "`suffix` is not supported: this model cannot fill in text between a prompt and a suffix.",
            "suffix",
        )
    echo = bool(request.echo)
    if request.max_tokens == 0 and not echo:
        raise bad(
            "`max_tokens` must be at least 1, got 0; 0 is for scoring a prompt, together with `echo`.",
            "max_tokens",
        )
    logprobs, shown = (
        candidates("logprobs", request.logprobs),
        candidates("prompt_logprobs", request.prompt_logprobs),
    )
    scored = max(shown, logprobs if echo else -1)
    max_tokens = within("max_tokens", request.max_tokens, 0, I31, DEFAULT_MAX_TOKENS)
    text, choices = text_options(request), choices_of(request)
    prompts = prompts_of(request.prompt, model, bool(text.truncate_prompt))
    sampling = sampling_of(request, max_tokens, logprobs, scored, model.vocab_size)
    charge(prompts, choices, sampling, text, model)
    if choices.beams and echo and (logprobs >= 0 or request.max_tokens == 0):
        raise bad(
            "Scoring a prompt (`echo` with `logprobs`, or `max_tokens` of 0) is not supported together with beam search.",
            "echo",
        )
    plan = _plan(request, prompts, choices, sampling, text, logprobs, shown, False)
    return replace(plan, echo=echo)


def plan_chat(request: ChatRequest, model: Model) -> Plan:
    if request.top_logprobs and not request.logprobs:
        raise bad("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    asked, shown = (
        candidates("top_logprobs", request.top_logprobs),
        candidates("prompt_logprobs", request.prompt_logprobs),
    )
    logprobs = max(0, asked) if request.logprobs else -1
    limit, name = request.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, name = request.max_tokens, "max_tokens"
    text, choices = text_options(request), choices_of(request)
    chat = chat_of(
        request.messages,
        request.add_generation_prompt,
        request.continue_final_message,
        request.chat_template_kwargs,
        model,
    )
    max_tokens = within(name, limit, 1, I31, max(1, model.max_model_len))
    prompts = [Prompt(chat=chat)]
    sampling = sampling_of(request, max_tokens, logprobs, shown, model.vocab_size)
    charge(prompts, choices, sampling, text, model)
    plan = _plan(request, prompts, choices, sampling, text, logprobs, shown, True, limit is None)
    last = chat.messages[-1]
    role = "assistant" if chat.add_generation_prompt else last.role
    return replace(
        plan, role=role, opening=last.content if request.echo and last.role == role else ""
    )


def _plan(
    request: Request,
    prompts: list[Prompt],
    choices: Choices,
    sampling: Sampling,
    text: TextOptions,
    logprobs: int,
    shown: int,
    chat: bool,
    rest: bool = False,
) -> Plan:
    if request.response_format and request.response_format.type != "text":
        raise bad(
            f"`response_format` of type {request.response_format.type[:64]!r} is not supported, only 'text'.",
            "response_format",
        )
    options = request.stream_options
    if options and not request.stream:
        raise bad("Stream options can only be defined when `stream=True`.", "stream_options")
    if shown >= 0 and request.stream:
        raise bad("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    salt, priority = (
        _named("cache_salt", request.cache_salt, MAX_CACHE_SALT),
        within("priority", request.priority, -(2**31), I31, 0),
    )
    special = (not chat) if request.add_special_tokens is None else request.add_special_tokens
    samplings = _each_choice(sampling, choices, bool(request.stream))
    return Plan(
        chat=chat,
        jobs=[
            Job(prompt, one, text, special, rest, priority, salt)
            for prompt in prompts
            for one in samplings
        ],
        n=choices.n,
        per_prompt=choices.per_prompt,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        logprobs=logprobs,
        prompt_logprobs=shown,
        return_token_ids=bool(request.return_token_ids),
        ids_as_text=bool(request.return_tokens_as_token_ids),
        beams=choices.beams,
        request_id=_request_id(request.request_id),
    )


def _request_id(given: str | None) -> str:
    if given is not None and not usable(given):
        raise bad(
            f"`request_id` must have 1 to {MAX_LENGTH} printable ASCII characters.", "request_id"
        )
    return given or ""


def _named(name: str, value: str | None, limit: int) -> str:
    if value is not None and not 1 <= len(value) <= limit:
        raise bad(f"`{name}` must have 1 to {limit} characters, got {len(value)}.", name)
    return value or ""


def _each_choice(sampling: Sampling, choices: Choices, stream: bool) -> list[Sampling]:
    """Prompts are scored once, but for each choice of a stream, which waits for no other. Ranking
    needs the tokens' log-probabilities."""
    if choices.per_prompt > choices.n and sampling.logprobs < 0:
        sampling = replace(sampling, logprobs=0)
    later = sampling if stream else replace(sampling, prompt_logprobs=-1)
    return [
        with_seed(later if i else sampling, i)
        for i in range(1 if choices.beams else choices.per_prompt)
    ]
