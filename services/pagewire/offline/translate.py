"""SamplingParams in the protocol's form: the worker's and scheduler's part, the tokenizer's part,
and one job for each continuation.

Ranges were checked by params.py. Knows no process and no socket.
"""

from msgspec.structs import replace
from pagewire_protocol.columns import pack
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import Prompt

from ..requests.beam_driver import BeamOptions
from ..requests.request import Job
from .sampling_params import BeamSearchParams, SamplingParams


def sampling(params: SamplingParams, seed: int) -> Sampling:
    """`seed` is used unless the parameters bring their own."""
    bias = params.logit_bias or {}
    logprobs = (
        params.logprobs
        if params.logprobs is not None
        else 0
        if params.width > params.n and not params.use_beam_search
        else -1
    )
    return Sampling(
        seed=seed if params.seed is None else params.seed & (2**63 - 1),
        max_tokens=params.max_tokens or 1,
        min_tokens=params.min_tokens,
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=max(0, params.top_k),
        min_p=float(params.min_p),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        logprobs=logprobs,
        ignore_eos=params.ignore_eos,
        stop_token_ids=tuple(params.stop_token_ids or ()),
        bias_ids=pack("i", list(bias)),
        bias_values=pack("f", list(bias.values())),
        allowed_ids=pack("i", params.allowed_token_ids or ()),
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
    )


def text_options(params: SamplingParams, has_text: bool) -> TextOptions:
    return TextOptions(
        stop=tuple(params.stop or ()),
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        detokenize=params.detokenize and has_text,
        return_prompt_ids=True,
        bad_words=tuple(params.bad_words or ()),
        truncate_prompt=params.truncate_prompt_tokens or 0,
    )


class JobTemplate:
    """What the jobs of one SamplingParams have in common, translated once: thousands of prompts
    often share one object."""

    def __init__(self, params: SamplingParams, has_text: bool) -> None:
        self._sampling, self._text = sampling(params, 0), text_options(params, has_text)
        self._seeded, self._rest = params.seed is not None, params.max_tokens is None

    def job(
        self,
        prompt: Prompt,
        index: int,
        seed: int,
        special: bool = True,
        salt: str = "",
        priority: int = 0,
    ) -> Job:
        """The job of continuation `index`, of which the first scores the prompt. `seed` is used
        unless the parameters bring their own."""
        seed = (self._sampling.seed + index) % 2**63 if self._seeded else seed
        scored = self._sampling.prompt_logprobs if not index else -1
        return Job(
            prompt,
            replace(self._sampling, seed=seed, prompt_logprobs=scored),
            self._text,
            add_special_tokens=special,
            max_tokens_is_rest=self._rest,
            priority=priority,
            cache_salt=salt,
        )


def beam_options(params: SamplingParams) -> BeamOptions | None:
    """None: no beam search."""
    if not params.use_beam_search:
        return None
    return BeamOptions(params.width, params.n, float(params.length_penalty), params.early_stopping)


def beam_search(params: BeamSearchParams) -> tuple[SamplingParams, BeamOptions]:
    """The same in the terms of `generate`: as many hypotheses as beams, with the log-probability of
    each token."""
    options = BeamOptions(
        params.beam_width, params.beam_width, float(params.length_penalty), params.early_stopping
    )
    common = SamplingParams(
        temperature=0.0,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=0,
    )
    return common, options
