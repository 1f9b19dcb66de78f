"""What an HTTP request costs before anything is done for it: choices, copies, scores. Each has a
limit of its own, and a refusal with numbers. `LLM` has no such limits: it sends no more at a time
than the stack runs, and its memory is its own."""

from typing import Final

from pagewire_protocol.structs import Prompt

from ..requests.errors import invalid
from ..requests.job_template import JobTemplate
from ..requests.model_facts import ModelFacts
from ..requests.parameters import MAX_INT32, MAX_N

MAX_CHOICES: Final = MAX_N
"""Of all prompts of one HTTP request together: they are all sent at once."""
MAX_COPIED: Final = 16 << 20
"""Bytes of prompts and parameters that one HTTP request may put into messages: each choice carries
its own. As token ids they would fill the queue (--max-queued-tokens)."""
MAX_SCORED: Final = 1_048_576
"""Candidates for prompt tokens that the answer to one HTTP request may hold."""


def charge(prompts: list[Prompt], template: JobTemplate, model: ModelFacts) -> None:
    """Raises RequestError when the request costs too much."""
    choices = template.choices
    executions = choices.executions
    count = executions * len(prompts)
    each = f"best_of={executions}" if executions > choices.n else f"n={choices.n}"
    if count > MAX_CHOICES:
        raise invalid(
            f"{len(prompts)} prompts with {each} are {count} choices; "
            f"at most {MAX_CHOICES} are allowed.",
            "prompt",
        )
    copied = executions * sum(map(_bytes, prompts)) + count * _parameter_bytes(template)
    if copied > MAX_COPIED:
        raise invalid(
            f"{len(prompts)} prompts with {each} take {copied >> 20} MiB; "
            f"at most {MAX_COPIED >> 20} are allowed.",
            "prompt",
        )
    if template.sampling.prompt_logprobs < 0:
        return
    longest = model.max_model_len or MAX_INT32
    tokens = sum(min(_tokens(prompt), longest) for prompt in prompts)
    scored = (template.sampling.prompt_logprobs + 1) * tokens
    if scored > MAX_SCORED:
        raise invalid(
            f"Scoring these prompts takes up to {scored} log-probabilities; "
            f"at most {MAX_SCORED} are allowed. Send fewer at once.",
            "prompt",
        )


def _bytes(prompt: Prompt) -> int:
    """In messages, with ASCII for text."""
    return _characters(prompt) if prompt.ids is None else len(prompt.ids)


def _tokens(prompt: Prompt) -> int:
    """No less than the prompt can have, but for those of a chat template."""
    return _characters(prompt) if prompt.ids is None else len(prompt.ids) // 4


def _characters(prompt: Prompt) -> int:
    if prompt.chat:
        return sum(len(message.content) for message in prompt.chat.messages)
    return len(prompt.text or "")


def _parameter_bytes(template: JobTemplate) -> int:
    sampling, text = template.sampling, template.text
    return (
        len(sampling.allowed_ids)
        + 2 * len(sampling.bias_ids)
        + sum(map(len, text.stop))
        + sum(map(len, text.bad_words))
    )
