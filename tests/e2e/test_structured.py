"""Answers that must match something, through a whole stack: every name by which it is asked for,
what is refused, what kills change, and rows beside them."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from e2e.test_stack_fake import gauges
from pagewire import LLM, SamplingParams, StructuredOutputsParams
from pagewire.hub.huggingface import demo_gguf
from pagewire.worker.fake import chain

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "rank": {"enum": ["low", "high"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "rank", "tags"],
    "additionalProperties": False,
}
LONG = {
    "type": "array",
    "items": {"enum": ["red", "green", "blue"]},
    "minItems": 60,
    "maxItems": 60,
}
BY_OPENAI = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": SCHEMA},
}
GBNF = 'root ::= "yes" | "no" [0-9]'
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
SEQUENCE = {
    "type": "sequence",
    "elements": [
        {"type": "const_string", "value": "It is "},
        {"type": "json_schema", "json_schema": {"enum": ["good", "bad"]}},
    ],
}
VOCAB = 49152


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return not re.search(r"[ \n\t]{5}", text)


def matches(pattern: str) -> Any:
    return re.compile(pattern, re.DOTALL).fullmatch


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": BY_OPENAI}, is_person),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, is_person),
    (
        {"response_format": {"type": "structural_tag", "format": SEQUENCE}},
        matches('It is "(good|bad)"'),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, is_person),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_person),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        lambda text: is_person(text) and not re.search(r"[,:\[{]\s", text),
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
        lambda text: is_person(text) and not re.search(r"[\n\t]", text),
    ),
    ({"structured_outputs": {"regex": r"\d{3}-[a-f]{4}"}}, matches(r"[0-9]{3}-[a-f]{4}")),
    ({"structured_outputs": {"choice": ["red", "green"]}}, ["red", "green"].__contains__),
    ({"structured_outputs": {"grammar": GBNF}}, matches("yes|no[0-9]")),
    ({"structured_outputs": {"grammar": 'start: "say " /[a-c]{3}/'}}, matches("say [a-c]{3}")),
    ({"guided_json": SCHEMA}, is_person),
    ({"guided_regex": "[a-c]{5}"}, matches("[a-c]{5}")),
    ({"guided_choice": ["red", "green"]}, ["red", "green"].__contains__),
    ({"guided_grammar": GBNF}, matches("yes|no[0-9]")),
    ({"structural_tag": json.dumps({"format": SEQUENCE})}, matches('It is "(good|bad)"')),
    ({"json_schema": json.dumps(SCHEMA)}, is_person),
    ({"regex": "[a-c]{5}"}, matches("[a-c]{5}")),
    ({"ebnf": GBNF}, matches("yes|no[0-9]")),
    ({"grammar": GBNF}, matches("yes|no[0-9]")),
]


@pytest.fixture(scope="module")
def stack(start_stack) -> Any:
    """A hash for a model, with the demo model's vocabulary."""
    fake = ("--device", "fake", "--model", str(demo_gguf()), "--fake-eos-token-id", "2")
    limits = ("--fake-step-ms", "1", "--max-model-len", "4096", "--num-tokenizers", "2")
    stack = start_stack(*fake, *limits).wait_ready()
    stack.wait_serving()
    return stack


def ask(client: openai.OpenAI, fields: dict[str, Any], **options: Any) -> Any:
    names = {"response_format": fields["response_format"]} if "response_format" in fields else {}
    extra = {name: value for name, value in fields.items() if name not in names}
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.pop("content", "hello")}],
        extra_body=extra,
        max_tokens=options.pop("max_tokens", 1000),
        **names,
        **options,
    )


def streamed(client: openai.OpenAI, fields: dict[str, Any], **options: Any) -> str:
    events = ask(client, fields, stream=True, **options)
    return "".join(event.choices[0].delta.content or "" for event in events if event.choices)


@pytest.mark.parametrize(
    ("fields", "right"), FORMS, ids=lambda value: None if callable(value) else str(value)[:50]
)
def test_an_answer_matches_by_whatever_name_it_was_asked_for(stack, fields, right) -> None:
    with stack.client() as client:
        answer = ask(client, fields).choices[0]
        assert answer.finish_reason == "stop" and right(answer.message.content)
        assert streamed(client, fields) == answer.message.content
        completion = client.completions.create(
            model=client.models.list().data[0].id,
            prompt=[5, 6, 7],
            max_tokens=1000,
            extra_body=fields,
        )
        assert right(completion.choices[0].text)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_json": {"not": {}, "if": {}}}, "guided_json", '"if", "not"'),
    (
        {"response_format": {**BY_OPENAI, "json_schema": {"schema": {"uniqueItems": True}}}},
        "response_format",
        "uniqueItems",
    ),
    ({"guided_json": {"$ref": "http://a.b/c"}}, "guided_json", "never fetched"),
    ({"guided_json": {"$ref": "#"}}, "guided_json", "no text matches"),
    (
        {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        "guided_json",
        "no text matches",
    ),
    ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json", "/nowhere"),
    ({"guided_json": {"type": "strange"}}, "guided_json", "strange"),
    ({"guided_json": {"enum": list(range(20_000))}}, "guided_json", "20000"),
    ({"guided_json": {"title": "x" * 2**20}}, "guided_json", "131072"),
    ({"guided_json": json.loads('{"items":' * 400 + "{}" + "}" * 400)}, "guided_json", "64 levels"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    ({"guided_regex": "("}, "guided_regex", "unclosed"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
    ({"guided_grammar": "root ::= ((("}, "guided_grammar", "GBNF"),
    ({"guided_grammar": "start: start"}, "guided_grammar", ""),
]
BOMBS: list[dict[str, Any]] = [
    {"guided_regex": "(a{1,1000}){1,1000}"},
    {"guided_regex": "(.*a){200}"},
    {"guided_regex": "((((a{0,50}){0,50}){0,50}){0,50})x"},
    {"guided_regex": "a\x00b"},
    {"guided_json": {"enum": ["\x00", "a\x00"]}},
    {"guided_json": {"properties": {f"p{i}": {"type": "string"} for i in range(900)}}},
    {"guided_grammar": "start: a{1,1000}\na: b{1,1000}\nb: /x(y|z)*/"},
]


def test_what_cannot_be_held_is_refused_by_name_and_nobody_else_notices(stack) -> None:
    with stack.client() as client, ThreadPoolExecutor(2) as pool:
        ask(client, {"guided_regex": "a"})
        pids = {kind: stack.pid(kind) for kind in ("worker", "scheduler")}
        beside = pool.submit(streamed, client, {}, max_tokens=400)
        for fields, param, words in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, fields)
            assert caught.value.param == param and words in str(caught.value), (
                fields,
                caught.value,
            )
        for fields in BOMBS:
            try:
                ask(client, fields, max_tokens=3)
            except openai.BadRequestError as error:
                assert error.param == next(iter(fields))
        assert beside.result() == streamed(client, {}, max_tokens=400)
        assert {kind: stack.pid(kind) for kind in pids} == pids


LENIENT = {
    "type": "json_schema",
    "json_schema": {
        "name": "s",
        "strict": False,
        "schema": {"type": "object", "properties": {"a": {"not": {}, "if": {}}}},
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_keywords_that_are_not_held_are_named_in_a_header(stack, stream: bool) -> None:
    header = "x-ignored-schema-keywords"
    with stack.client() as client:
        for form, names in ((LENIENT, "if, not"), (BY_OPENAI, None)):
            answer = client.chat.completions.with_raw_response.create(
                model=client.models.list().data[0].id,
                messages=[{"role": "user", "content": "x"}],
                max_tokens=4,
                stream=stream,
                extra_body={"response_format": form},
            )
            assert answer.headers.get(header) == names
            answer.parse().close() if stream else answer.parse()


def test_an_answer_that_is_cut_says_so_and_is_the_beginning_of_the_whole(stack) -> None:
    with stack.client() as client:
        whole = ask(client, {"guided_json": LONG}).choices[0]
        cut = ask(client, {"guided_json": LONG}, max_tokens=20).choices[0]
        assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
        assert whole.message.content.startswith(cut.message.content)
        stopped = ask(client, {"guided_json": LONG}, stop=["green"]).choices[0]
        assert stopped.finish_reason == "stop" and stopped.message.content
        assert stopped.message.content == whole.message.content.partition("green")[0]
        several = ask(client, {"guided_json": LONG}, n=3, logprobs=True, top_logprobs=1).choices
        assert {choice.message.content for choice in several} == {whole.message.content}
        tokens = [entry.token for entry in several[0].logprobs.content]
        assert "".join(tokens).startswith(whole.message.content)


def test_what_a_grammar_forces_takes_fewer_steps_and_is_the_same(stack) -> None:
    """Token by token is how requests that want log-probabilities go."""
    words = ["a1b2c3d4e5f6g7h8i9", "0z1y2x3w4v5u"]
    schema = {"type": "array", "items": {"enum": words}, "minItems": 12, "maxItems": 12}
    form = {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}
    fields = {**form, "return_token_ids": True}
    deaths = gauges(stack)["service_deaths_total"]
    with stack.client() as client:

        def counted(**options: Any) -> tuple[Any, int]:
            before = gauges(stack)["steps_total"]
            answer = ask(client, fields, seed=4, **options)
            return answer.choices, int(gauges(stack)["steps_total"] - before)

        counted()  # the matcher's process is there from here on
        (one,), _ = counted(logprobs=True)
        assert len(one.logprobs.content) >= len(one.token_ids) - 1
        fast, steps = counted(n=2)
        for choice in fast:
            assert choice.token_ids == one.token_ids
            assert choice.message.content == one.message.content
        assert len(one.token_ids) > 60 and steps < len(one.token_ids)
        assert streamed(client, form) == one.message.content
        for limit in range(5, 25):
            (cut,), _ = counted(max_tokens=limit)
            assert cut.token_ids == one.token_ids[:limit] and cut.finish_reason == "length"
        (stopped,), _ = counted(stop=["5f6"])
        assert stopped.message.content == one.message.content.partition("5f6")[0]
        for number in range(20):  # runs that begin anywhere in a block
            several, _ = counted(n=3, content="x" * number)
            assert len({choice.message.content for choice in several}) == 1
    assert gauges(stack)["service_deaths_total"] == deaths


@pytest.mark.parametrize("victim", ["matcher", "checker", "worker", "scheduler", "tokenizer"])
def test_kills_change_nothing_in_a_text(stack, victim: str) -> None:
    with stack.client() as client:
        content = f"of {victim}"
        wanted = streamed(client, {"guided_json": LONG}, content=content)
        jsonschema.validate(json.loads(wanted), LONG)
        events = ask(client, {"guided_json": LONG}, stream=True, content=content)
        text = ""
        for index, event in enumerate(events):
            text += event.choices[0].delta.content or "" if event.choices else ""
            if index == 10 or (index in (40, 70) and victim == "matcher"):
                _kill(stack, victim)
        assert text == wanted
        assert streamed(client, {"guided_json": LONG}, content=content) == wanted
    stack.wait_serving()


def _kill(stack: Any, victim: str) -> None:
    if victim in ("matcher", "checker"):
        service = "worker" if victim == "matcher" else "tokenizer"
        for pid in stack.matchers(service):
            os.kill(pid, signal.SIGKILL)
    else:
        os.kill(stack.pid(victim), signal.SIGKILL)
        time.sleep(0.3)


def test_rows_without_grammars_are_what_they_are_without_neighbours(stack) -> None:
    prompt = [11, 12, 13]
    with stack.client() as client, ThreadPoolExecutor(8) as pool:
        model = client.models.list().data[0].id
        held = [
            pool.submit(streamed, client, {"guided_json": LONG}, content=f"number {i}")
            for i in range(4)
        ]
        free = [
            pool.submit(
                client.completions.create,
                model=model,
                prompt=prompt,
                max_tokens=100,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            for _ in range(4)
        ]
        for future in free:
            assert future.result().choices[0].token_ids == chain(prompt, 100, VOCAB)
        for future in held:
            jsonschema.validate(json.loads(future.result()), LONG)


def test_a_client_that_leaves_while_its_grammar_is_checked_leaves_nothing(stack) -> None:
    def leave() -> None:
        with stack.client() as client, contextlib.suppress(openai.APITimeoutError):
            ask(client, {"guided_json": {"const": f"x{threading.get_ident()}"}}, timeout=0.02)

    threads = [threading.Thread(target=leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with stack.client() as client:
        assert ask(client, {"guided_regex": "abc"}).choices[0].message.content == "abc"


def test_no_process_is_started_for_those_who_do_not_ask(fake_stack) -> None:
    assert not fake_stack.matchers("worker") and not fake_stack.matchers("tokenizer")
    with (
        fake_stack.client() as client,
        pytest.raises(openai.BadRequestError, match="--skip-tokenizer-init"),
    ):
        client.completions.create(
            model=client.models.list().data[0].id,
            prompt=[1],
            max_tokens=4,
            extra_body={"guided_regex": "a"},
        )


def test_a_real_model_answers_in_the_form_that_it_is_asked_for(demo_stack) -> None:
    with demo_stack.client() as client:
        plain = ask(client, {}, temperature=0, max_tokens=24).choices[0].message.content
        with ThreadPoolExecutor(4) as pool:
            people = pool.submit(
                ask, client, {"response_format": BY_OPENAI}, n=4, temperature=1.0, seed=3
            )
            beside = pool.submit(ask, client, {}, temperature=0, max_tokens=24)
            held = {"structured_outputs": {"regex": "[A-Z][a-z]{2,6}"}}
            words = pool.submit(
                ask, client, held, temperature=1.0, n=4, frequency_penalty=0.5, logprobs=True
            )
        texts = [choice.message.content for choice in people.result().choices]
        assert all(map(is_person, texts)) and len(set(texts)) > 1
        assert beside.result().choices[0].message.content == plain
        for choice in words.result().choices:
            assert re.fullmatch("[A-Z][a-z]{2,6}", choice.message.content)
            # Of the logits before the grammar: what it forces need not have been likely.
            assert min(entry.logprob for entry in choice.logprobs.content) < -1e-3
        alone = [ask(client, {"response_format": BY_OPENAI}, seed=5) for _ in range(2)]
        first, second = [answer.choices[0].message.content for answer in alone]
        assert first == second and is_person(first)


def test_llm_answers_in_the_form_that_it_is_asked_for() -> None:
    options: dict[str, Any] = {"device": "fake", "fake_eos_token_id": 2, "max_model_len": 4096}
    with LLM(model=str(demo_gguf()), **options) as llm:
        forms = [
            StructuredOutputsParams(json=SCHEMA),
            StructuredOutputsParams(choice=["x", "y"]),
            None,
        ]
        params = [SamplingParams(max_tokens=400, structured_outputs=form) for form in forms]
        person, choice, free = llm.generate(["a", "b", "c"], params)
        assert is_person(person.outputs[0].text) and choice.outputs[0].text in ("x", "y")
        assert len(free.outputs[0].token_ids) > 1
        with pytest.raises(ValueError, match="not supported"):
            llm.generate("a", SamplingParams(structured_outputs={"json": {"not": {}}}))
