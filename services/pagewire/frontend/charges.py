"""What a request costs before anything is done for it: choices, copies, scores. Each has a limit of
its own, and a refusal with numbers."""

from typing import Final

from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import Prompt

from ..requests.errors import bad
from .choices import Choices
from .limits import I31
from .prompts import Model

MAX_CHOICES: Final = 1024
MAX_COPIED: Final = 128 << 20
"""Bytes of prompts and parameters that one HTTP request may put into messages: each choice carries
its own."""
MAX_SCORED: Final = 4_194_304
"""Candidates that one HTTP request may be told of for the tokens of its prompts."""


def charge(
    prompts: list[Prompt], choices: Choices, sampling: Sampling, text: TextOptions, model: Model
) -> None:
    count = choices.cost * len(prompts)
    each = f"best_of={choices.cost}" if choices.cost > choices.n else f"n={choices.n}"
    if count > MAX_CHOICES:
        raise bad(
            f"{len(prompts)} prompts with {each} are {count} choices; at most {MAX_CHOICES} are allowed.",
            "prompt",
        )
    copied = choices.cost * sum(map(_bytes, prompts)) + count * _parameters(sampling, text)
    if copied > MAX_COPIED:
        raise bad(
            f"{len(prompts)} prompts with {each} take {copied >> 20} MiB; at most {MAX_COPIED >> 20} are allowed.",
            "prompt",
        )
    longest = model.max_model_len or I31
    scored = (sampling.prompt_logprobs + 1) * sum(
        min(_tokens(prompt), longest) for prompt in prompts
    )
    if scored > MAX_SCORED:
        raise bad(
            f"Scoring these prompts takes up to {scored} log-probabilities; at most {MAX_SCORED} are allowed. Send fewer at once.",
            "prompt",
        )


def _bytes(prompt: Prompt) -> int:
    """In messages, with ASCII for text."""
    return _characters(prompt) if prompt.ids is None else len(prompt.ids)


def _tokens(prompt: Prompt) -> int:
    """No less than the prompt can have, but for those of a chat template."""
    return _characters(prompt) if prompt.ids is None else len(prompt.ids) // 4


def _characters(prompt: Prompt) -> int:
    return (
        sum(len(message.content) for message in prompt.chat.messages)
        if prompt.chat
        else len(prompt.text or "")
    )


def _parameters(sampling: Sampling, text: TextOptions) -> int:
    return (
        len(sampling.allowed_ids)
        + 2 * len(sampling.bias_ids)
        + sum(map(len, text.stop))
        + sum(map(len, text.bad_words))
    )
