"""LLM's features against transformers on the demo model in float32: beams, scores, best_of,
prompts; and the forms of its calls."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from msgspec import structs
from pagewire import LLM, BeamSearchParams, SamplingParams
from pagewire.worker.fake import chain

VOCAB = 1000
CONTEXT = 512
TALK = [{"role": "user", "content": "What is the capital of France?"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ mark | default('') }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(dtype="float32", device="cpu", max_model_len=CONTEXT, max_num_seqs=16) as llm:
        yield llm


@pytest.fixture(scope="module")
def fake() -> Iterator[LLM]:
    with LLM(device="fake", skip_tokenizer_init=True, fake_vocab_size=VOCAB) as llm:
        yield llm


def generate(llm: LLM, prompts: Any, **params: Any) -> list[Any]:
    return llm.generate(prompts, SamplingParams(**params), use_tqdm=False)


def beams_of(
    oracle: Any, prompt: str, width: int, count: int, length: int, **options: Any
) -> list[tuple[list[int], float]]:
    model, tokenizer = oracle
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=width, num_return_sequences=count, max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    return [
        (row, score)
        for row, score in zip(
            out.sequences[:, ids.shape[1] :].tolist(), out.sequences_scores.tolist(), strict=True
        )
    ]


# --- beam search ---


def test_beams_are_those_of_transformers(oracle: Any, demo: LLM) -> None:
    penalty, prompts = 2.0, ["The capital of France is", "def add(a, b):\n"]
    common = {"length_penalty": penalty, "early_stopping": "never"}
    outputs = generate(
        demo, prompts, n=2, best_of=3, use_beam_search=True, temperature=0, max_tokens=6, **common
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = beams_of(oracle, prompt, 3, 2, 6, **common)
        assert [one.token_ids for one in output.outputs] == [tokens for tokens, _ in wanted]
        scores = [one.cumulative_logprob / len(one.token_ids) ** penalty for one in output.outputs]
        assert scores == pytest.approx([score for _, score in wanted], abs=1e-3)
        assert [one.text for one in output.outputs] == [
            oracle[1].decode(tokens) for tokens, _ in wanted
        ]
        assert output.prompt == prompt and [one.index for one in output.outputs] == [0, 1]


def test_tokens_that_end_a_beam(oracle: Any, demo: LLM) -> None:
    """Some of the beams end with a full stop, others reach the limit."""
    (stop,) = oracle[1](".").input_ids
    prompt, ends = "The capital of France is", [oracle[1].eos_token_id, stop]
    (output,) = generate(
        demo, prompt, n=3, use_beam_search=True, temperature=0, max_tokens=5, stop_token_ids=[stop]
    )
    wanted = beams_of(oracle, prompt, 3, 3, 5, eos_token_id=ends)
    assert {one.finish_reason for one in output.outputs} == {"stop", "length"}
    for one, (tokens, _) in zip(output.outputs, wanted, strict=True):
        ended = one.finish_reason == "stop"
        assert one.token_ids == tokens[: len(one.token_ids)] and len(one.token_ids) == (
            tokens.index(stop) + 1 if ended else 5
        )
        assert (one.token_ids[-1] == stop) == ended == (one.stop_reason == stop)
        assert one.text == oracle[1].decode(one.token_ids[:-1] if ended else one.token_ids)


def test_beam_search_by_its_own_method(oracle: Any, demo: LLM) -> None:
    (output,) = demo.beam_search(
        [{"prompt": "The capital of France is"}], BeamSearchParams(beam_width=2, max_tokens=3)
    )
    wanted = beams_of(oracle, "The capital of France is", 2, 2, 3)
    ids = oracle[1]("The capital of France is").input_ids
    assert [one.tokens for one in output.sequences] == [ids + tokens for tokens, _ in wanted]
    for one, (tokens, score) in zip(output.sequences, wanted, strict=True):
        assert one.text == oracle[1].decode(ids + tokens) and one.cum_logprob == pytest.approx(
            3 * score, abs=1e-3
        )
        assert [next(iter(row)) for row in one.logprobs] == tokens
        assert sum(next(iter(row.values())).logprob for row in one.logprobs) == pytest.approx(
            one.cum_logprob, abs=1e-4
        )


def test_a_beam_of_width_one_is_greedy(fake: LLM) -> None:
    outputs = fake.beam_search(
        [[7, 8], {"prompt_token_ids": [9]}], BeamSearchParams(1, 6), concurrency_limit=1
    )
    assert [one.sequences[0].tokens for one in outputs] == [
        [7, 8, *chain([7, 8], 6, VOCAB)],
        [9, *chain([9], 6, VOCAB)],
    ]
    assert [len(one.sequences) for one in outputs] == [1, 1] and outputs[0].sequences[
        0
    ].finish_reason == "length"


def test_many_searches_among_other_requests_and_stop_tokens(fake: LLM) -> None:
    prompts = [[i, i + 1] for i in range(60)]
    params = [
        SamplingParams(n=2, use_beam_search=True, temperature=0, max_tokens=5)
        if i % 2
        else SamplingParams(max_tokens=5)
        for i in range(60)
    ]
    for ids, output in zip(prompts, fake.generate(prompts, params, use_tqdm=False), strict=True):
        assert (
            output.outputs[0].token_ids == chain(ids, 5, VOCAB) and output.prompt_token_ids == ids
        )
    said = chain([5, 6], 4, VOCAB)
    (output,) = generate(
        fake,
        [5, 6],
        n=2,
        use_beam_search=True,
        temperature=0,
        max_tokens=9,
        stop_token_ids=[said[2]],
    )
    best = output.outputs[0]
    assert (best.token_ids, best.finish_reason, best.stop_reason) == (said[:3], "stop", said[2])


@pytest.mark.parametrize("kind", ["worker", "tokenizer", "scheduler"])
def test_a_search_survives_the_death_of_a(kind: str, fake: LLM) -> None:
    os.kill(fake.pids()[f"{kind}-0"], signal.SIGKILL)
    outputs = generate(
        fake, [[i, 5] for i in range(20)], n=2, use_beam_search=True, temperature=0, max_tokens=6
    )
    assert [output.outputs[0].token_ids for output in outputs] == [
        chain([i, 5], 6, VOCAB) for i in range(20)
    ]


def test_what_a_beam_search_cannot_hold_is_refused(fake: LLM) -> None:
    with pytest.raises(
        ValueError,
        match=r"prompt 0: .*maximum context length is 32768 tokens.*2 in the prompt, 32767 for",
    ):
        generate(fake, [1, 2], n=2, use_beam_search=True, temperature=0, max_tokens=32767)
    with pytest.raises(ValueError, match=r"prompt 0: .*1000"):
        generate(fake, [VOCAB], n=2, use_beam_search=True, temperature=0)
    assert generate(fake, [3], max_tokens=2)[0].outputs[0].token_ids == chain([3], 2, VOCAB)


# --- several continuations, and scores ---


def test_the_best_of_several_come_first(oracle: Any, demo: LLM) -> None:
    """All four with n=4; then the two best of the same four."""
    common = {"seed": 3, "max_tokens": 4, "temperature": 1.2}
    (every,) = generate(demo, "My favourite animal is", n=4, logprobs=0, **common)
    (best,) = generate(demo, "My favourite animal is", n=2, best_of=4, **common)
    ids = every.prompt_token_ids
    scores: dict[tuple[int, ...], float] = {}
    for one in every.outputs:
        with torch.inference_mode():
            values = (
                oracle[0](torch.tensor([ids + one.token_ids]))
                .logits[0, len(ids) - 1 : -1]
                .double()
                .log_softmax(-1)
            )
        scores[tuple(one.token_ids)] = float(
            values.gather(1, torch.tensor(one.token_ids)[:, None]).sum()
        )
        assert one.cumulative_logprob == pytest.approx(scores[tuple(one.token_ids)], abs=1e-3)
    wanted = sorted(scores, key=lambda tokens: -scores[tokens])[:2]
    assert len(scores) == 4 and [tuple(one.token_ids) for one in best.outputs] == wanted
    assert [one.index for one in best.outputs] == [0, 1] and all(
        one.logprobs is None for one in best.outputs
    )
    assert [one.cumulative_logprob for one in best.outputs] == pytest.approx(
        [scores[tokens] for tokens in wanted], abs=1e-3
    )


def test_prompt_tokens_are_scored_as_transformers_does(oracle: Any, demo: LLM) -> None:
    for _ in range(2):  # the second time the prompt's blocks are cached
        (output,) = generate(
            demo,
            "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
            prompt_logprobs=2,
            max_tokens=1,
        )
        ids, rows = output.prompt_token_ids, output.prompt_logprobs
        with torch.inference_mode():
            values = oracle[0](torch.tensor([ids])).logits[0].double().log_softmax(-1)
        assert rows[0] is None and len(rows) == len(ids)
        for place, row in enumerate(rows[1:], 1):
            top = values[place - 1].topk(2).indices.tolist()
            assert list(row) == list(dict.fromkeys([ids[place], *top]))
            for token, entry in row.items():
                assert entry.logprob == pytest.approx(float(values[place - 1, token]), abs=1e-3)
                assert entry.rank == int((values[place - 1] > values[place - 1, token]).sum()) + 1
                assert entry.decoded_token == oracle[1].decode([token])


def test_moments_are_in_order(demo: LLM) -> None:
    metrics = generate(demo, "One, two,", max_tokens=3)[0].metrics
    moments = (
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.last_token_time,
        metrics.finished_time,
    )
    assert (
        0 <= time.time() - moments[0] < 600
        and list(moments) == sorted(moments)
        and metrics.time_in_queue >= 0
    )


# --- prompts ---


def test_a_chat_shows_the_text_that_it_became(oracle: Any, demo: LLM) -> None:
    talks = [TALK, [{"role": "system", "content": "You are terse."}, *TALK]]
    outputs = demo.chat(talks, SamplingParams(max_tokens=1), use_tqdm=False)
    for talk, output in zip(talks, outputs, strict=True):
        wanted = oracle[1].apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert output.prompt == wanted and output.prompt_token_ids == oracle[1](wanted).input_ids
    bare = demo.chat(
        TALK, SamplingParams(max_tokens=1), use_tqdm=False, add_generation_prompt=False
    )[0]
    assert bare.prompt == oracle[1].apply_chat_template(TALK, tokenize=False)


def test_a_template_and_variables_for_one_call(demo: LLM) -> None:
    params = SamplingParams(max_tokens=1)
    output = demo.chat(
        TALK, params, use_tqdm=False, chat_template=TEMPLATE, chat_template_kwargs={"mark": "!"}
    )[0]
    assert output.prompt == "[user] What is the capital of France?!\n"
    with pytest.raises(ValueError, match="system role"):
        demo.chat(
            TALK, params, use_tqdm=False, chat_template="{{ raise_exception('system role') }}"
        )
    with pytest.raises(ValueError, match="neither a file nor"):
        demo.chat(TALK, params, use_tqdm=False, chat_template="no-such-template")
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        demo.chat(TALK, params, use_tqdm=False, chat_template_kwargs={"x": object()})


def test_the_ends_of_turns_in_a_template_for_one_call(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the model's own files do not name end the answer as a stop token does."""
    end = demo.get_tokenizer().convert_tokens_to_ids("<|im_end|>")
    template = TEMPLATE + "<|im_end|>"

    def endings(**params: Any) -> tuple[Any, Any, int]:
        stated = SamplingParams(max_tokens=3, allowed_token_ids=[end], **params)
        (output,) = demo.chat(TALK, stated, use_tqdm=False, chat_template=template)[0].outputs
        return output.finish_reason, output.stop_reason, len(output.token_ids)

    assert endings() == ("stop", None, 1)
    unaware = structs.replace(
        demo._context, model=structs.replace(demo._context.model, eos_token_ids=())
    )
    monkeypatch.setattr(demo, "_context", unaware)
    assert endings() == ("stop", end, 1)
    assert endings(ignore_eos=True) == ("length", None, 3)


def test_the_tokenizer_for_programs_is_the_one_that_is_used(oracle: Any, demo: LLM) -> None:
    tokenizer = demo.get_tokenizer()
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == oracle[1].apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert (
        tokenizer(text).input_ids
        == oracle[1](text).input_ids
        == generate(demo, text, max_tokens=1)[0].prompt_token_ids
    )
    assert (tokenizer.eos_token, tokenizer.decode(tokenizer("héllo 🙂").input_ids)) == (
        oracle[1].eos_token,
        "héllo 🙂",
    )
    assert demo.get_tokenizer() is tokenizer


def test_a_missing_package_is_named_with_how_to_install_it(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_tokenizer", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pagewire\[all\]'"):
        demo.get_tokenizer()


def test_only_the_end_of_a_prompt(fake: LLM) -> None:
    (output,) = generate(fake, [1, 2, 3, 4, 5], truncate_prompt_tokens=2, max_tokens=3)
    assert output.prompt_token_ids == [4, 5] and output.outputs[0].token_ids == chain(
        [4, 5], 3, VOCAB
    )
    (output,) = generate(
        fake,
        [1, 2, 3, 4, 5],
        truncate_prompt_tokens=2,
        max_tokens=3,
        n=2,
        use_beam_search=True,
        temperature=0,
    )
    assert output.prompt_token_ids == [4, 5] and output.outputs[0].token_ids == chain(
        [4, 5], 3, VOCAB
    )


def test_calls_of_several_threads_wait_for_each_other(fake: LLM) -> None:
    with ThreadPoolExecutor(6) as pool:
        calls = [
            pool.submit(generate, fake, [[i, j] for j in range(20)], max_tokens=5)
            for i in range(12)
        ]
    for i, call in enumerate(calls):
        assert [output.outputs[0].token_ids for output in call.result()] == [
            chain([i, j], 5, VOCAB) for j in range(20)
        ]


def test_older_and_newer_forms_of_a_call(fake: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    wanted = [chain([1, 2], 2, VOCAB), chain([3], 2, VOCAB)]
    forms: list[Any] = [
        fake.generate(None, params, [[1, 2], [3]], False),
        fake.generate(prompt_token_ids=[[1, 2], [3]], sampling_params=params, use_tqdm=False),
        fake.generate(
            [{"prompt_token_ids": [1, 2], "cache_salt": "a"}, {"prompt_token_ids": [3]}],
            params,
            use_tqdm=False,
            priority=[5, -5],
        ),
    ]
    for outputs in forms:
        assert [output.outputs[0].token_ids for output in outputs] == wanted
    beside = fake.generate(["one", "two"], params, [[1, 2], [3]], use_tqdm=False)
    assert [output.prompt for output in beside] == ["one", "two"]
    for words, call in {
        "2 prompts but 1 prompt_token_ids": lambda: fake.generate(["a", "b"], params, [[1]]),
        "1 prompts but 2 priorities": lambda: fake.generate([[1]], params, priority=[1, 2]),
        "lora_request is not supported": lambda: fake.generate([[1]], params, lora_request="x"),  # type: ignore[arg-type]
        "prompt 0: `cache_salt` must be a string, got 5": lambda: fake.generate(
            [{"prompt_token_ids": [1], "cache_salt": 5}], params
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert fake.generate([], params, use_tqdm=False) == []
