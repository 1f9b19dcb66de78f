"""From the parameters of a request to the jobs of its choices: what they have in common is checked
and translated once, since thousands of prompts often share one set of parameters."""

from collections.abc import Callable

from pagewire_protocol.sampling import Sampling, SamplingDefaults, TextOptions
from pagewire_protocol.structs import Prompt

from .choices import Choices, samplings_of
from .model_facts import ModelFacts
from .parameters import MAX_INT32, PARAMETERS, checked
from .request import Job
from .sampling import sampling_of, text_options_of
from .seeds import base_seed


class JobTemplate:
    """Made from an object whose attributes are named as the parameters; one that is missing counts
    as None.

    max_tokens: None where the answer may take what the context leaves. logprobs, prompt_logprobs:
    numbers of candidates, -1 for none. score_each: every choice scores the prompt, not the first
    alone. Raises RequestError naming the parameter that is at fault.
    """

    def __init__(
        self,
        source: object,
        choices: Choices,
        model: ModelFacts,
        *,
        max_tokens: int | None,
        logprobs: int,
        prompt_logprobs: int,
        return_prompt_ids: bool,
        score_each: bool = False,
    ) -> None:
        self.choices = choices
        self.text: TextOptions = text_options_of(
            source, return_prompt_ids=return_prompt_ids, has_text=model.has_text
        )
        self.max_tokens_is_rest = max_tokens is None
        defaults = model.sampling_defaults
        if max_tokens is None:
            max_tokens = defaults.max_tokens or model.max_model_len or MAX_INT32
        self.sampling: Sampling = sampling_of(
            source,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            vocab_size=model.vocab_size,
            # Beam search goes by the model's own log-probabilities.
            defaults=SamplingDefaults() if choices.beams else defaults,
        )
        self._seed: int | None = checked(PARAMETERS["seed"], getattr(source, "seed", None))
        self._score_each = score_each

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
        base = base_seed(self._seed, draw_bits)
        samplings = samplings_of(self.sampling, self.choices, base, score_each=self._score_each)
        return [
            Job(
                prompt,
                sampling,
                self.text,
                add_special_tokens,
                self.max_tokens_is_rest,
                priority,
                cache_salt,
            )
            for sampling in samplings
        ]
