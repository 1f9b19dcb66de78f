"""HTTP, `LLM` and `pagewire run-batch` are asked the same, and say the same: tokens, texts and the
words of refusals."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
from pagewire import LLM, SamplingParams
from pagewire.requests.parameters import MAX_N, PARAMETERS, Parameter
from pagewire.worker.fake import chain

VOCAB = 1000
CONTEXT = 512
MODEL = "served"
PROMPT = [5, 6, 7]
FAKE = {
    "device": "fake",
    "fake_vocab_size": VOCAB,
    "max_model_len": CONTEXT,
    "served_model_name": MODEL,
}
"""A hash for a model, behind the demo model's tokenizer."""
BEAMS = {"use_beam_search": True, "n": 2, "temperature": 0, "max_tokens": 4}
OF_THE_PROMPT = ("priority", "cache_salt")
"""What `LLM` takes beside the sampling parameters."""


class Answer(NamedTuple):
    """What was said: a refusal's words, or the tokens and the text of each choice."""

    refusal: str = ""
    choices: tuple[tuple[tuple[int, ...], str], ...] = ()


# --- the three ways in ---


class Http:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)

    def close(self) -> None:
        self._client.close()

    def ask(self, prompt: Any, **parameters: Any) -> Answer:
        answer = self._client.post("/completions", json=body_of(prompt, parameters))
        return answer_of(answer.json())


class Program:
    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def ask(self, prompt: Any, **parameters: Any) -> Answer:
        entry = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
        entry |= {"cache_salt": parameters.pop("cache_salt", None)}
        priority = parameters.pop("priority", None)
        try:
            (output,) = self.llm.generate(
                entry,
                SamplingParams(**parameters),
                use_tqdm=False,
                priority=None if priority is None else [priority],
            )
        except ValueError as error:
            return Answer(refusal=str(error).removeprefix("prompt 0: "))
        choices = ((tuple(one.token_ids), one.text) for one in output.outputs)
        return Answer(choices=tuple(choices))


def run_batch(directory: Path, requests: dict[str, dict[str, Any]], *flags: str) -> dict[str, Any]:
    """The answers to the requests of one file, by their names."""
    source, target = directory / "in.jsonl", directory / "out.jsonl"
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
        for name, body in requests.items()
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "pagewire", "run-batch", "-i", str(source), "-o", str(target)]
    result = subprocess.run(
        [*command, *flags, "--no-progress"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    has_errors = any(row["response"]["status_code"] != 200 for row in rows)
    assert result.returncode == int(has_errors), result.stderr
    return {row["custom_id"]: answer_of(row["response"]["body"]) for row in rows}


def body_of(prompt: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt, "return_token_ids": True, **parameters}


def answer_of(body: dict[str, Any]) -> Answer:
    if "error" in body:
        return Answer(refusal=body["error"]["message"])
    return Answer(choices=tuple((tuple(one["token_ids"]), one["text"]) for one in body["choices"]))


def flags_of(settings: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    )


# --- what they are asked ---


def at_bounds(row: Parameter) -> Iterator[tuple[str, dict[str, Any]]]:
    """A value at each bound and one just beyond, with what makes the parameter effective."""
    beside: dict[str, Any] = {"max_tokens": 2}
    if row.name == "length_penalty":
        beside = dict(BEAMS)
    elif row.name == "max_tokens":
        beside = {}
    step = 1 if row.type is int else 0.5
    for value in (row.low - step, row.low, row.high, row.high + step):
        yield f"{row.name}={value}", {**beside, row.name: value}


GREEDY = chain(PROMPT, 1, VOCAB)[0]
NUMBERS = [row for row in PARAMETERS.values() if row.type in (int, float) and row.max_items is None]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "nothing": (PROMPT, {}),
    "text": ("Once upon a time", {"max_tokens": 6}),
    "n too large": (PROMPT, {"n": MAX_N + 1}),
    "n=200": (PROMPT, {"n": 200, "max_tokens": 2}),
    "seed=2**63": (PROMPT, {"seed": 2**63}),
    "seed below": (PROMPT, {"seed": -(2**63) - 1}),
    "greedy n": (PROMPT, {"n": 2, "temperature": 0}),
    "greedy best_of": (PROMPT, {"best_of": 2, "temperature": 0}),
    "best_of below n": (PROMPT, {"best_of": 2, "n": 3}),
    "min_tokens above max_tokens": (PROMPT, {"min_tokens": 17}),
    "beams": (PROMPT, BEAMS),
    "beams of a text": ("Once upon a time", BEAMS),
    # What a beam's text begins with may hang on the prompt's last tokens, however many there are.
    "beams of a long text": ("Once upon a time there was a river. " * 6, BEAMS),
    "beams after half a character": (list(range(200, 240)), BEAMS),
    "beams with an end": (PROMPT, {**BEAMS, "stop_token_ids": [GREEDY]}),
    "beams with log-probabilities": (PROMPT, {**BEAMS, "logprobs": 5}),
    "beams with prompt_logprobs": (PROMPT, {**BEAMS, "prompt_logprobs": 0}),
    "beams with min_p": (PROMPT, {**BEAMS, "min_p": 0.1}),
    "beams with a stop string": (PROMPT, {**BEAMS, "stop": "x"}),
    "beams with a temperature": (PROMPT, {**BEAMS, "temperature": 0.5}),
    "beams with early_stopping": (PROMPT, {**BEAMS, "early_stopping": "soon"}),
    "one beam": (PROMPT, {**BEAMS, "n": 1}),
    "too many beams": (PROMPT, {**BEAMS, "best_of": 17}),
    "beams that do not fit": (PROMPT, {**BEAMS, "max_tokens": CONTEXT}),
    "beams of what is left": ([1] * 100, {**BEAMS, "truncate_prompt_tokens": 10}),
    # Twenty candidates a beam, of which min_tokens forbids ten: fewer than sixteen are left.
    "fewer hypotheses than n": (
        PROMPT,
        {
            **BEAMS,
            "n": 16,
            "max_tokens": 1,
            "min_tokens": 1,
            "stop_token_ids": [(GREEDY + i) % VOCAB for i in range(1, 11)],
        },
    ),
    "length_penalty without beams": (PROMPT, {"length_penalty": 2.0}),
    "early_stopping without beams": (PROMPT, {"early_stopping": True}),
    "truncation": (list(range(100)), {"truncate_prompt_tokens": 7, "max_tokens": 3}),
    "truncation to the context": ([3] * 600, {"truncate_prompt_tokens": -1, "max_tokens": 3}),
    "truncation to nothing": (PROMPT, {"truncate_prompt_tokens": -1, "max_tokens": CONTEXT}),
    "truncation by 0": (PROMPT, {"truncate_prompt_tokens": 0}),
    "a prompt that is too long": ([1] * (CONTEXT + 1), {"max_tokens": 9}),
    "a prompt that leaves too little": ([1] * CONTEXT, {"max_tokens": 9}),
    "a prompt outside": ([1, VOCAB], {}),
    "a prompt below": ([-1, 1], {}),
    "a bias of nothing": (PROMPT, {"logit_bias": {"x": 1}}),
    "a bias too large": (PROMPT, {"logit_bias": {"5": 101}}),
    "a bias outside": (PROMPT, {"logit_bias": {str(VOCAB): 1}}),
    "allowed outside": (PROMPT, {"allowed_token_ids": [VOCAB]}),
    "nothing allowed": (PROMPT, {"allowed_token_ids": []}),
    "too many stop strings": (PROMPT, {"stop": ["x"] * 17}),
    "an empty stop string": (PROMPT, {"stop": [""]}),
    "a bad word too long": (PROMPT, {"bad_words": ["x" * 257]}),
    "a long salt": (PROMPT, {"cache_salt": "x" * 129}),
} | {name: (PROMPT, case) for row in NUMBERS for name, case in at_bounds(row)}
REFUSED = {
    "n too large": f"`n` must be between 1 and {MAX_N}, got {MAX_N + 1}.",
    "seed=2**63": f"`seed` must be between {-(2**63)} and {2**63 - 1}, got {2**63}.",
    "beams with prompt_logprobs": "`prompt_logprobs` is not supported together with beam search.",
    "fewer hypotheses than n": "There are only 10 continuations, fewer than n=16.",
    "truncation to nothing": f"This model's maximum context length is {CONTEXT} tokens. However, you "
    f"requested {CONTEXT + 3} tokens (3 in the prompt, {CONTEXT} for the completion). "
    "Reduce the prompt or max_tokens.",
}
"""Words of some refusals: all three could agree on a wrong answer."""


@pytest.fixture(scope="module")
def http(start_stack: Callable[..., Any]) -> Iterator[Http]:
    stack = start_stack(*flags_of(FAKE)).wait_ready()
    with contextlib.closing(Http(stack.url)) as http:
        yield http
    stack.end()


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    settings = {name: value for name, value in FAKE.items() if name != "served_model_name"}
    with LLM(**settings) as llm:
        yield Program(llm)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    requests = {name: body_of(prompt, parameters) for name, (prompt, parameters) in CASES.items()}
    return run_batch(tmp_path_factory.mktemp("batch"), requests, *flags_of(FAKE))


@pytest.mark.parametrize("name", CASES)
def test_all_three_say_the_same(
    name: str, http: Http, program: Program, batch: dict[str, Answer]
) -> None:
    prompt, parameters = CASES[name]
    answers = {
        "HTTP": http.ask(prompt, **parameters),
        "LLM": program.ask(prompt, **parameters),
        "run-batch": batch[name],
    }
    assert answers["LLM"] == answers["HTTP"] == answers["run-batch"]
    said = answers["HTTP"]
    assert bool(said.refusal) != bool(said.choices)
    if name in REFUSED:
        assert said.refusal == REFUSED[name]


def test_no_case_is_refused_that_should_not_be(batch: dict[str, Answer]) -> None:
    """Bounds themselves are inside, but for those that the context or another parameter refuses."""
    refused_elsewhere = {"max_tokens", "min_tokens"}
    for row in NUMBERS:
        (below, low, high, above) = (batch[name] for name, _ in at_bounds(row))
        assert below.refusal and above.refusal and bool(low.refusal) == row.above_low, row.name
        assert not high.refusal or row.name in refused_elsewhere, row.name


# --- seeds: only a model that draws tells them apart ---

DRAWN = {"max_tokens": 8, "n": 3, "temperature": 1.2}
DEMO = {"max_model_len": 512, "max_num_seqs": 1}
"""One request at a time: how logits round depends on what else a step holds, and a draw on them."""
SEEDS = {f"seed={seed}": {**DRAWN, "seed": seed} for seed in (7, 0, -5, 2**63 - 1)}


@pytest.fixture(scope="module")
def demo_answers(
    start_stack: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Answer]]:
    prompt = "My favourite animal is"
    requests = {name: body_of(prompt, case) for name, case in SEEDS.items()}
    answers = {"run-batch": run_batch(tmp_path_factory.mktemp("seeds"), requests, *flags_of(DEMO))}
    with LLM(**DEMO) as llm:
        program = Program(llm)
        answers["LLM"] = {name: program.ask(prompt, **case) for name, case in SEEDS.items()}
    stack = start_stack(*flags_of(DEMO)).wait_ready()
    with contextlib.closing(Http(stack.url)) as http:
        answers["HTTP"] = {name: http.ask(prompt, **case) for name, case in SEEDS.items()}
    stack.end()
    return answers


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_of_several_choices(name: str, demo_answers: dict[str, dict[str, Answer]]) -> None:
    said = {door: answers[name] for door, answers in demo_answers.items()}
    assert said["LLM"] == said["HTTP"] == said["run-batch"]
    assert len({tokens for tokens, _ in said["LLM"].choices}) == 3
