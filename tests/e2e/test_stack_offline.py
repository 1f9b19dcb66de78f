"""LLM: the same services without HTTP, in programs of their own where the program's end is what is
tested."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from pagewire import LLM, SamplingParams
from pagewire.offline.llm import EngineError
from pagewire.worker.fake import chain

VOCAB = 1000
FAKE = {"device": "fake", "skip_tokenizer_init": True, "fake_vocab_size": VOCAB}
PROGRAM = """
import os, signal, sys
from pagewire import LLM, SamplingParams
llm = LLM(device="fake", skip_tokenizer_init=True, fake_vocab_size=1000)
print(*llm.pids().values(), flush=True)
llm.generate([1, 2, 3], SamplingParams(max_tokens=4), use_tqdm=False)
"""


@pytest.fixture(scope="module")
def fake() -> Iterator[LLM]:
    with LLM(**FAKE) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(max_model_len=512, max_num_seqs=16, dtype="float32") as llm:
        yield llm


def test_a_prompt_is_scored_without_a_token_being_generated(fake: LLM) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = fake.generate([[5, *chain([5], 3, VOCAB)]], params, use_tqdm=False)
    rows = output.prompt_logprobs
    assert (
        rows and rows[0] is None and [next(iter(row.values())).rank for row in rows[1:]] == [1] * 3
    )
    assert list(output.outputs[0].token_ids) == [] and output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match="max_tokens"):
        SamplingParams(max_tokens=0)


def test_thousands_of_prompts_come_back_in_order(fake: LLM) -> None:
    make = random.Random(0)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 40))] for _ in range(2000)]
    params = [SamplingParams(max_tokens=1 + i % 20) for i in range(len(prompts))]
    outputs = fake.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    assert len({output.request_id for output in outputs}) == 2000
    for output, ids, chosen in zip(outputs, prompts, params, strict=True):
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == chain(ids, chosen.max_tokens or 0, VOCAB)
        assert (output.finished, output.outputs[0].finish_reason) == (True, "length")


def test_the_bar_is_worded_like_the_one_people_know(
    fake: LLM, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.generate([[1, 2], [3, 4]], SamplingParams(max_tokens=4))
    shown = capfd.readouterr().err
    assert "Processed prompts: 100%" in shown and "2/2" in shown
    assert "est. speed input: " in shown and " toks/s, output: " in shown


def test_n_continuations_and_logprobs(fake: LLM) -> None:
    output = fake.generate([7, 8], SamplingParams(n=3, max_tokens=5, logprobs=1), use_tqdm=False)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for completion in output.outputs:
        assert completion.token_ids == chain([7, 8], 5, VOCAB)
        assert (
            completion.logprobs is not None
            and [next(iter(row)) for row in completion.logprobs] == completion.token_ids
        )
        assert completion.cumulative_logprob == 0.0


def test_a_refused_prompt_is_an_error_with_its_place_and_the_others_go_on_next_time(
    fake: LLM,
) -> None:
    with pytest.raises(ValueError, match=r"prompt 1: .*1000"):
        fake.generate([[1], [VOCAB], [2]], SamplingParams(max_tokens=4), use_tqdm=False)
    assert fake.generate([3], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[
        0
    ].token_ids == chain([3], 2, VOCAB)


def test_text_without_a_tokenizer_is_refused(fake: LLM) -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        fake.generate("hello", use_tqdm=False)
    with pytest.raises(ValueError, match="chat template"):
        fake.chat([{"role": "user", "content": "hello"}], use_tqdm=False)


@pytest.mark.parametrize("kind", ["worker", "tokenizer", "scheduler"])
def test_a_batch_survives_the_death_of_a(kind: str, fake: LLM) -> None:
    os.kill(fake.pids()[f"{kind}-0"], signal.SIGKILL)
    prompts = [[i, i + 1] for i in range(50)]
    outputs = fake.generate(prompts, SamplingParams(max_tokens=30), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [
        chain(ids, 30, VOCAB) for ids in prompts
    ]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('broken')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_the_services_end_with_the_program(
    ending: str, code: int, watch_gone: Callable[[list[int], float], bool]
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM + ending],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == code, result.stderr
    pids = [int(word) for word in result.stdout.split()]
    assert len(pids) == 3
    assert watch_gone(pids, 2)


def test_a_worker_that_cannot_start_is_an_exception_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match="blocks"):
        LLM(**FAKE, max_model_len=4096, num_kv_blocks=1, block_size=1)


def test_after_the_end_the_object_says_so() -> None:
    llm = LLM(**FAKE)
    llm.shutdown()
    for call in (lambda: llm.generate([1, 2]), llm.stats):
        with pytest.raises(EngineError, match="was shut down"):
            call()


def test_a_forked_copy_is_refused_and_does_no_harm(fake: LLM) -> None:
    """A child of multiprocessing's fork would read its parent's answers, and wait for ever."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            fake.generate([[1, 2]], use_tqdm=False)
        except EngineError as error:
            os.write(writing, str(error).encode())
        finally:
            fake.shutdown()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert "forked copy" in answer.read()
    os.waitpid(child, 0)
    (output,) = fake.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3


def test_wrong_settings_are_named() -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        LLM(no_such_setting=1)
    with pytest.raises(ValueError, match="pipeline_parallel_size=0"):
        LLM(pipeline_parallel_size=0)
    with pytest.raises(ValueError, match="quantization='quip'"):
        LLM(quantization="quip")
    with pytest.raises(ValueError, match="max_num_seqs"):
        LLM(max_num_seqs=0)
    with pytest.raises(ValueError, match="/no/such/model does not exist"):
        LLM("/no/such/model")


def test_the_demo_generates_and_chats(demo: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    first, second = demo.generate(
        ["The capital of France is", {"prompt": "Once upon a time"}], params, use_tqdm=False
    )
    assert first.prompt == "The capital of France is" and "Paris" in first.outputs[0].text
    assert (
        second.outputs[0].text
        and second.prompt_token_ids
        and second.outputs[0].finish_reason == "length"
    )
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    answers = demo.chat([talk, talk], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert ["Paris" in answer.outputs[0].text for answer in answers] == [True, True], answers


def test_the_demo_keeps_seeds_and_stops(demo: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=12)
    alone = demo.generate("A short poem:", params, use_tqdm=False)[0].outputs[0].token_ids
    among = (
        demo.generate(["Something else entirely", "A short poem:"], params, use_tqdm=False)[1]
        .outputs[0]
        .token_ids
    )
    assert alone == among
    stopped = demo.generate(
        "1, 2, 3, 4,", SamplingParams(temperature=0, max_tokens=24, stop="7"), use_tqdm=False
    )[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "7") and "7" not in stopped.text
