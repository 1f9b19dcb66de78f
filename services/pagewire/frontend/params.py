"""From a parsed request to a Plan: the ranges of all values, their defaults, and the jobs to run. Knows no HTTP and no stack.

Every refusal names the parameter, its limit and what was given.
"""

import secrets
from typing import Final, TypeVar

import msgspec
from msgspec import Struct
from pagewire_protocol.columns import MAX_TOKENS, pack
from pagewire_protocol.parts import Chat, ChatMessage, Prompt
from pagewire_protocol.sampling import MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOP_STRINGS, MAX_STOP_TOKENS, Sampling, TextOptions

from .errors import bad
from .openai import ChatRequest, CompletionRequest, MessageIn, Part, Request
from .stream import Job

MAX_N: Final = 128
MAX_CHOICES: Final = 1024
MAX_MESSAGES: Final = 4096
MAX_CACHE_SALT: Final = 128
DEFAULT_MAX_TOKENS: Final = 16
_I31: Final = 2**31 - 1
_SEED: Final = 2**63
_GOLDEN: Final = 0x9E3779B97F4A7C15
_U64: Final = 2**64 - 1

V = TypeVar("V", int, float)


class Model(Struct, frozen=True):
    """What a request must fit: the context in tokens (0: not known), the vocabulary, and whether there is text at all."""

    max_model_len: int = 0
    vocab_size: int = 0
    has_text: bool = True
    has_chat_template: bool = True


class Plan(Struct, frozen=True):
    """One HTTP request, ready to run: `jobs` holds `n` choices for each prompt, prompt by prompt."""

    chat: bool
    jobs: list[Job]
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: bool
    return_token_ids: bool


def plan_completion(request: CompletionRequest, model: Model) -> Plan:
    logprobs = -1 if request.logprobs is None else _within("logprobs", request.logprobs, 0, MAX_LOGPROBS, 0)
    max_tokens = _within("max_tokens", request.max_tokens, 1, _I31, DEFAULT_MAX_TOKENS)
    return _plan(request, _prompts(request.prompt, model), _sampling(request, max_tokens, logprobs), False, False)


def plan_chat(request: ChatRequest, model: Model) -> Plan:
    if request.top_logprobs and not request.logprobs:
        raise bad("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    logprobs = _within("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS, 0) if request.logprobs else -1
    limit, name = request.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, name = request.max_tokens, "max_tokens"
    rest = limit is None
    chat = _chat(request, model)
    max_tokens = _within(name, limit, 1, _I31, max(1, model.max_model_len))
    return _plan(request, [Prompt(chat=chat)], _sampling(request, max_tokens, logprobs), rest, True)


def _plan(request: Request, prompts: list[Prompt], sampling: Sampling, rest: bool, chat: bool) -> Plan:
    n = _within("n", request.n, 1, MAX_N, 1)
    if n * len(prompts) > MAX_CHOICES:
        raise bad(f"{len(prompts)} prompts with n={n} are {n * len(prompts)} choices; at most {MAX_CHOICES} are allowed.", "prompt")
    if request.response_format and request.response_format.type != "text":
        raise bad(f"`response_format` of type {request.response_format.type[:64]!r} is not supported, only 'text'.", "response_format")
    text, options = _text_options(request), request.stream_options
    if options and not request.stream:
        raise bad("Stream options can only be defined when `stream=True`.", "stream_options")
    salt = request.cache_salt or ""
    if len(salt) > MAX_CACHE_SALT or request.cache_salt == "":
        raise bad(f"`cache_salt` must have 1 to {MAX_CACHE_SALT} characters, got {len(salt)}.", "cache_salt")
    special = (not chat) if request.add_special_tokens is None else request.add_special_tokens
    priority = _within("priority", request.priority, -(2**31), _I31, 0)
    choices = [_with_seed(sampling, i) for i in range(n)]
    jobs = [Job(prompt, choice, text, special, rest, priority, salt) for prompt in prompts for choice in choices]
    return Plan(
        chat=chat,
        jobs=jobs,
        n=n,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        logprobs=sampling.logprobs >= 0,
        return_token_ids=bool(request.return_token_ids),
    )


def _sampling(request: Request, max_tokens: int, logprobs: int) -> Sampling:
    minimum = _within("min_tokens", request.min_tokens, 0, _I31, 0)
    if minimum > max_tokens:
        raise bad(f"`min_tokens` is {minimum} but at most {max_tokens} tokens are asked for.", "min_tokens")
    stops = request.stop_token_ids or []
    if len(stops) > MAX_STOP_TOKENS:
        raise bad(f"`stop_token_ids` may hold at most {MAX_STOP_TOKENS} ids, got {len(stops)}.", "stop_token_ids")
    top_p = _within("top_p", request.top_p, 0.0, 1.0, 1.0)
    if top_p == 0:
        raise bad("`top_p` must be above 0 and at most 1, got 0.", "top_p")
    repetition = _within("repetition_penalty", request.repetition_penalty, 0.0, 100.0, 1.0)
    if repetition == 0:
        raise bad("`repetition_penalty` must be above 0 and at most 100, got 0.", "repetition_penalty")
    return Sampling(
        seed=_seed(request.seed),
        max_tokens=max_tokens,
        min_tokens=minimum,
        temperature=_within("temperature", request.temperature, 0.0, 100.0, 1.0),
        top_p=top_p,
        top_k=max(0, _within("top_k", request.top_k, -1, _I31, 0)),
        min_p=_within("min_p", request.min_p, 0.0, 1.0, 0.0),
        presence_penalty=_within("presence_penalty", request.presence_penalty, -2.0, 2.0, 0.0),
        frequency_penalty=_within("frequency_penalty", request.frequency_penalty, -2.0, 2.0, 0.0),
        repetition_penalty=repetition,
        logprobs=logprobs,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(_within("stop_token_ids", token, 0, _I31, 0) for token in stops),
    )


def _text_options(request: Request) -> TextOptions:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MAX_STOP_STRINGS:
        raise bad(f"`stop` may hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}.", "stop")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise bad(f"A string in `stop` must have 1 to {MAX_STOP_LENGTH} characters, got {len(text)}.", "stop")
    return TextOptions(
        stop=tuple(stop),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        return_prompt_ids=bool(request.return_token_ids),
    )


def _within(name: str, value: V | None, low: V, high: V, default: V) -> V:
    if value is None:
        return default
    if not low <= value <= high:
        raise bad(f"`{name}` must be between {low} and {high}, got {_short(value)}.", name)
    return value


def _short(value: float) -> str:
    return str(value) if abs(value) < 10**20 else f"{'-' if value < 0 else ''}more than 1e20"


def _seed(given: int | None) -> int:
    if given is None:
        return secrets.randbits(63)
    if not -_SEED <= given < 2 * _SEED:
        raise bad(f"`seed` must be a 64-bit integer, got {_short(given)}.", "seed")
    return given % _SEED


def _with_seed(sampling: Sampling, choice: int) -> Sampling:
    """Choice 0 keeps the seed; the others get one mixed from it by SplitMix64's finaliser, so that choices are unlike each other."""
    if choice == 0:
        return sampling
    mixed = (sampling.seed + choice * _GOLDEN) & _U64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _U64
    return msgspec.structs.replace(sampling, seed=(mixed ^ (mixed >> 31)) % _SEED)


# --- prompts ---


def _prompts(prompt: str | list[str | int | list[int]], model: Model) -> list[Prompt]:
    if isinstance(prompt, str):
        return [_text_prompt(prompt, model)]
    if not prompt:
        raise bad("`prompt` is an empty list; give at least one prompt.", "prompt")
    if isinstance(prompt[0], int):
        return [_id_prompt(prompt, model)]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise bad("`prompt` mixes kinds; give a string, strings, token ids, or lists of token ids.", "prompt")
    if len(prompt) > MAX_CHOICES:
        raise bad(f"`prompt` may hold at most {MAX_CHOICES} prompts, got {len(prompt)}.", "prompt")
    return [_text_prompt(item, model) if isinstance(item, str) else _id_prompt(item, model) for item in prompt]


def _text_prompt(text: str, model: Model) -> Prompt:
    if not text:
        raise bad("The prompt is empty: it must have at least 1 character.", "prompt")
    if not model.has_text:
        raise bad("This server runs without a tokenizer (--skip-tokenizer-init); give the prompt as token ids.", "prompt")
    return Prompt(text=text)


def _id_prompt(ids: object, model: Model) -> Prompt:
    if not isinstance(ids, list) or not ids:
        raise bad("The prompt is empty: it must have at least 1 token.", "prompt")
    limit = model.max_model_len or MAX_TOKENS
    if len(ids) > limit:  # type: ignore[arg-type]
        raise bad(f"The prompt has {len(ids)} tokens, the context holds {limit}.", "prompt")  # type: ignore[arg-type]
    top = model.vocab_size - 1 if model.vocab_size else _I31
    for token in ids:  # type: ignore[misc]
        if not isinstance(token, int):
            raise bad("`prompt` mixes kinds; give a string, strings, token ids, or lists of token ids.", "prompt")
        if not 0 <= token <= top:
            raise bad(f"Token id {_short(token)} in `prompt` is not between 0 and {top}.", "prompt")
    return Prompt(ids=pack("i", ids))  # type: ignore[arg-type]


def _chat(request: ChatRequest, model: Model) -> Chat:
    if not 1 <= len(request.messages) <= MAX_MESSAGES:
        raise bad(f"`messages` must hold 1 to {MAX_MESSAGES} messages, got {len(request.messages)}.", "messages")
    if not model.has_text:
        raise bad("This server runs without a tokenizer (--skip-tokenizer-init); use /v1/completions with token ids.", "messages")
    if not model.has_chat_template:
        raise bad("This model has no chat template; start the server with --chat-template, or use /v1/completions.", "messages")
    proceed = bool(request.continue_final_message)
    add = (not proceed) if request.add_generation_prompt is None else request.add_generation_prompt
    if proceed and add:
        raise bad("`continue_final_message` and `add_generation_prompt` cannot both be true.", "continue_final_message")
    return Chat(tuple(_message(index, message) for index, message in enumerate(request.messages)), add, proceed)


def _message(index: int, message: MessageIn) -> ChatMessage:
    if not 1 <= len(message.role) <= 64:
        raise bad(f"`messages[{index}].role` must have 1 to 64 characters, got {len(message.role)}.", "messages")
    if message.name is not None and len(message.name) > 256:
        raise bad(f"`messages[{index}].name` may have at most 256 characters, got {len(message.name)}.", "messages")
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise bad(f"`messages[{index}].content` is missing.", "messages")
        content = ""
    if not isinstance(content, str):
        content = "\n".join(_part(index, part) for part in content)
    return ChatMessage(message.role, content, message.name)


def _part(index: int, part: Part) -> str:
    if part.type != "text" or part.text is None:
        raise bad(
            f"`messages[{index}].content` has a part of type {part.type[:64]!r}; only parts of type 'text' are supported.", "messages"
        )
    return part.text
