"""From the parameters of a request to the jobs of its choices: what they have in common is checked
and translated once, since thousands of prompts often share one set of parameters."""

from collections.abc import Callable

from msgspec import Struct
from pagewire_protocol.grammar import Grammar
from pagewire_protocol.sampling import AnswerOptions, Sampling, SamplingDefaults, TextOptions
from pagewire_protocol.structs import Prompt

from .choices import Choices, samplings_of
from .errors import invalid
from .model_facts import ModelFacts
from .parameters import MAX_INT32, PARAMETERS, checked
from .request import Job
from .sampling import sampling_of, text_options_of
from .seeds import base_seed


class JobTemplate(Struct, frozen=True):
    """What the choices of a request have in common; made by `job_template`."""

    choices: Choices
    text: TextOptions
    sampling: Sampling
    max_tokens_is_rest: bool
    """The answer may take what the context leaves."""
    seed: int | None
    """The client's; None: each prompt draws one."""
    score_each: bool
    """Every choice scores the prompt, not the first alone."""
    grammar: Grammar | None = None
    """What the answer must match."""

    def jobs(
        self,
        prompt: Prompt,
        draw_bits: Callable[[int], int],
        *,
        add_special_tokens: bool,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[Job]:
        """One job for each choice of `prompt`; a beam search is one job. `draw_bits(k)` draws k
        random bits, for a request without a seed."""
        base = base_seed(self.seed, draw_bits)
        samplings = samplings_of(self.sampling, self.choices, base, score_each=self.score_each)
        return [
            Job(
                prompt,
                sampling,
                self.text,
                add_special_tokens,
                self.max_tokens_is_rest,
                priority,
                cache_salt,
                self.grammar,
            )
            for sampling in samplings
        ]


def job_template(
    source: object,
    choices: Choices,
    model: ModelFacts,
    *,
    max_tokens: int | None,
    logprobs: int,
    prompt_logprobs: int,
    return_prompt_ids: bool,
    score_each: bool = False,
    grammar: Grammar | None = None,
    answer: AnswerOptions | None = None,
) -> JobTemplate:
    """The template for the attributes of `source` that are named as the parameters; one that is
    missing counts as None.

    max_tokens: None where the answer may take what the context leaves. logprobs, prompt_logprobs:
    numbers of candidates, -1 for none. grammar: what the answer must match. answer: of a chat
    whose answers have parts. Raises RequestError naming the parameter that is at fault.
    """
    if grammar is not None and choices.beams:
        raise invalid(
            f"`{grammar.param}` is not supported together with beam search.", grammar.param
        )
    defaults = model.sampling_defaults
    text = text_options_of(
        source,
        return_prompt_ids=return_prompt_ids,
        has_text=model.has_text,
        answer=answer,
    )
    most = max_tokens
    if most is None:
        most = defaults.max_tokens or model.max_model_len or MAX_INT32
    sampling = sampling_of(
        source,
        max_tokens=most,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        vocab_size=model.vocab_size,
        # Beam search goes by the model's own log-probabilities.
        defaults=SamplingDefaults() if choices.beams else defaults,
    )
    seed: int | None = checked(PARAMETERS["seed"], getattr(source, "seed", None))
    return JobTemplate(choices, text, sampling, max_tokens is None, seed, score_each, grammar)
