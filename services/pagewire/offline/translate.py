"""SamplingParams and BeamSearchParams in the terms of requests. Knows no process and no socket."""

from collections.abc import Sequence

from ..requests.choices import BeamOptions, Choices, choices_of
from ..requests.errors import RequestError
from ..requests.job_template import JobTemplate, job_template
from ..requests.model_facts import ModelFacts
from ..requests.parameters import checked_logprobs
from .sampling_params import BeamSearchParams, SamplingParams


def job_templates(params: Sequence[SamplingParams], model: ModelFacts) -> list[JobTemplate]:
    """One for each prompt. Neighbours with the very same object share its template: thousands of
    prompts often do. Raises ValueError where the model cannot serve the parameters."""
    templates: list[JobTemplate] = []
    translated: SamplingParams | None = None
    for current in params:
        if current is translated:
            templates.append(templates[-1])
        else:
            templates.append(_template(current, choices_of(current), model))
            translated = current
    return templates


def beam_template(params: BeamSearchParams, model: ModelFacts) -> JobTemplate:
    """The template of a beam search that returns up to as many hypotheses as it has beams, with the
    log-probability of each token."""
    width = params.beam_width
    beams = BeamOptions(
        width,
        width,
        float(params.length_penalty),
        params.early_stopping,
        fewer_allowed=True,
    )
    common = SamplingParams(
        temperature=0.0,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=0,
    )
    return _template(common, Choices(width, width, beams), model)


def _template(params: SamplingParams, choices: Choices, model: ModelFacts) -> JobTemplate:
    try:
        return job_template(
            params,
            choices,
            model,
            max_tokens=params.max_tokens,
            logprobs=checked_logprobs("logprobs", params.logprobs),
            prompt_logprobs=checked_logprobs("prompt_logprobs", params.prompt_logprobs),
            return_prompt_ids=True,
            grammar=params.grammar(),
        )
    except RequestError as error:
        raise ValueError(error.message) from None
