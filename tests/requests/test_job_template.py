"""The jobs of a request's choices: seeds, scores of the prompt, ranking, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from pagewire.requests.choices import Choices, choices_of
from pagewire.requests.errors import RequestError
from pagewire.requests.job_template import JobTemplate, job_template
from pagewire.requests.model_facts import ModelFacts
from pagewire.requests.request import Job
from pagewire.requests.seeds import choice_seed
from pagewire_protocol.structs import Prompt

MODEL = ModelFacts(max_model_len=100, vocab_size=50)
PROMPT = Prompt(text="hi")


def template(
    max_tokens: int | None = 16,
    logprobs: int = -1,
    prompt_logprobs: int = -1,
    score_each: bool = False,
    model: ModelFacts = MODEL,
    **parameters: Any,
) -> JobTemplate:
    source = SimpleNamespace(**parameters)
    return job_template(
        source,
        choices_of(source),
        model,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_prompt_ids=False,
        score_each=score_each,
    )


def jobs(made: JobTemplate, drawn: int = 77) -> list[Job]:
    return made.jobs(PROMPT, lambda bits: drawn, add_special_tokens=True)


def seeds(made: JobTemplate) -> list[int]:
    return [job.sampling.seed for job in jobs(made)]


def test_the_first_choice_has_the_seed_and_the_others_derive_theirs() -> None:
    assert seeds(template(seed=7, n=3)) == [7, choice_seed(7, 1), choice_seed(7, 2)]
    assert seeds(template(seed=7)) == seeds(template(seed=7, n=3))[:1]
    assert seeds(template(n=2)) == [77, choice_seed(77, 1)]
    assert seeds(template(n=2, seed=-1)) == seeds(template(n=2))


def test_each_prompt_without_a_seed_draws_its_own() -> None:
    made, draws = template(), iter((1, 2))
    drawn = [
        made.jobs(PROMPT, lambda bits: next(draws), add_special_tokens=True)[0].sampling.seed
        for _ in range(2)
    ]
    assert drawn == [1, 2]


def test_a_prompt_is_scored_once_but_for_streams() -> None:
    def scored(made: JobTemplate) -> list[int]:
        return [job.sampling.prompt_logprobs for job in jobs(made)]

    assert scored(template(n=3, prompt_logprobs=2)) == [2, -1, -1]
    assert scored(template(n=3, prompt_logprobs=2, score_each=True)) == [2, 2, 2]


def test_ranking_needs_log_probabilities() -> None:
    assert [job.sampling.logprobs for job in jobs(template(best_of=2))] == [0, 0]
    assert [job.sampling.logprobs for job in jobs(template(best_of=2, logprobs=3))] == [3, 3]
    assert [job.sampling.logprobs for job in jobs(template(n=2))] == [-1, -1]


def test_a_beam_search_is_one_job() -> None:
    made = template(use_beam_search=True, n=2, best_of=4, temperature=0)
    assert made.choices.beams is not None and made.choices.executions == 4
    assert (made.choices.n, made.choices.per_prompt, len(jobs(made))) == (2, 2, 1)


def test_without_max_tokens_the_answer_takes_the_rest() -> None:
    made = template(max_tokens=None)
    assert made.max_tokens_is_rest and made.sampling.max_tokens == MODEL.max_model_len
    assert all(job.max_tokens_is_rest for job in jobs(made))
    assert template(max_tokens=None, model=ModelFacts()).sampling.max_tokens == 2**31 - 1


def test_text_that_nobody_makes_is_not_asked_for() -> None:
    assert template().text.detokenize
    assert not template(model=ModelFacts(has_text=False)).text.detokenize
    assert not template(detokenize=False).text.detokenize


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"n": 0}, "n"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"logit_bias": {5: 1, True: 1}}, "logit_bias"),
        ({"allowed_token_ids": [50]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["5"]}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"stop": ["x"], "detokenize": False}, "stop"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_the_refusal_names_the_parameter(parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        template(**parameters)
    assert caught.value.param == param and param in caught.value.message


def test_choices_say_how_many_run_at_a_time() -> None:
    assert choices_of(SimpleNamespace()) == Choices(1, 1)
    assert choices_of(SimpleNamespace(n=3)).executions == 3
    best = choices_of(SimpleNamespace(n=2, best_of=5))
    assert (best.executions, best.ranked) == (5, True)
