"""Limits, scores of prompts and questions to the tokenizer through the real services, with the demo
model, against transformers.

This program holds the requests, as the frontend does, so that nothing here depends on HTTP. The
oracle is one pass of transformers over prompt and output together, whose logits its own processors
then restrict.
"""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from pagewire import LLM
from pagewire.offline.engine import Engine
from pagewire.requests.errors import ErrorKind
from pagewire.requests.queries import MakeQuery
from pagewire.requests.request import Job
from pagewire_protocol.channels import Inbox, Outbox, inbox_address
from pagewire_protocol.messages import (
    Detokenize,
    Finish,
    Message,
    Prompt,
    Role,
    Submit,
    Tokenize,
    Tokens,
    pack,
    unpack,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from worker.sampling_reference import bias, restricted, scored

STEPS = 16
GREEDY: dict[str, Any] = {"seed": 0, "max_tokens": STEPS, "temperature": 0.0, "ignore_eos": True}
TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "1, 1, 2, 3, 5, 8,",
    "Dear friend, yesterday the garden",
)


class Sink:
    wants_tokens = True

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.said = ""
        self.scores: dict[int, tuple[int, list[tuple[int, float]]]] = {}
        self.bytes: dict[int, bytes] = {}
        self.prompt: list[int] = []
        self.end: Any = None

    def started(self, started) -> None:
        self.prompt = unpack("i", started.prompt_ids).tolist()

    def prompt_logprobs(self, entry) -> None:
        columns = zip("iiif", (entry.counts, entry.ranks, entry.ids, entry.values), strict=True)
        counts, ranks, ids, values = (unpack(code, column).tolist() for code, column in columns)
        entries = iter(zip(ids, values, entry.texts, strict=True))
        for i, count in enumerate(counts):
            part = [next(entries) for _ in range(count)]
            self.scores[entry.first + i] = ranks[i], [(token, value) for token, value, _ in part]
            self.bytes[entry.first + i] = part[0][2]

    def text(self, text) -> None: ...

    def tokens(self, text, tokens, logprobs) -> None:
        self.said += text
        self.ids += tokens

    def finished(self, reason, stop_reason, completion_tokens, reasoning_tokens) -> None:
        self.end = reason

    def failed(self, error) -> None:
        self.end = error


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with LLM(
        dtype="float32",
        device="cpu",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        num_tokenizers=1,
    ) as llm:
        yield llm._engine


def pump(engine: Engine, sinks: list[Sink]) -> None:
    end = time.monotonic() + 60
    while any(sink.end is None for sink in sinks):
        assert time.monotonic() < end
        engine.pump()


def run(engine: Engine, jobs: list[Job]) -> list[Sink]:
    engine.refresh()  # another fixture may have taken longer than a silent member is kept
    sinks = [Sink() for _ in jobs]
    for job, sink in zip(jobs, sinks, strict=True):
        assert engine.submit(job, sink) is not None
    pump(engine, sinks)
    return sinks


def job(text: str, options: dict[str, Any] | None = None, **sampling: Any) -> Job:
    return Job(
        Prompt(text=text),
        Sampling(**{**GREEDY, **sampling}),
        TextOptions(return_prompt_ids=True, **(options or {})),
    )


def sequences(tokenizer: Any, words: tuple[str, ...]) -> tuple[bytes, ...]:
    """vLLM's rule: a word as it is, and after a space where that is as long and begins
    otherwise."""
    found: list[bytes] = []
    for word in words:
        bare, spaced = (
            tokenizer(space + word, add_special_tokens=False).input_ids for space in ("", " ")
        )
        found += [pack("i", bare)] + [pack("i", spaced)] * (
            len(spaced) == len(bare) and spaced[0] != bare[0]
        )
    return tuple(found)


def test_limits_and_scores_of_the_prompt(engine: Engine, oracle: Any) -> None:
    model, tokenizer = oracle
    plain = run(engine, [job(text) for text in TEXTS])
    jobs, given = [], []
    for i, (text, sink) in enumerate(zip(TEXTS, plain, strict=True)):
        words = tuple({tokenizer.decode([token]).strip() for token in sink.ids[1:5]} - {""})
        allowed = sorted({*range(200 * i, 40_000, 3), *sink.ids})
        sampling: dict[str, Any] = {
            **bias({sink.ids[0]: -6.0, tokenizer(" the").input_ids[0]: 2.0}),
            "allowed_ids": pack("i", allowed),
            "min_tokens": 5,
            "stop_token_ids": (sink.ids[6],),
            "repetition_penalty": 1.1,
            "prompt_logprobs": i,
        }
        jobs.append(job(text, {"bad_words": words}, **sampling))
        given.append(Sampling(**{**GREEDY, **sampling, "bad_words": sequences(tokenizer, words)}))
    for sink, before, sampling, text in zip(run(engine, jobs), plain, given, TEXTS, strict=True):
        prompt = tokenizer(text).input_ids
        assert sink.end in ("length", "stop") and sink.prompt == prompt and sink.ids != before.ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sink.ids])).logits[0]
        for step, token in enumerate(sink.ids):
            x = restricted(
                logits[len(prompt) + step - 1],
                prompt,
                sink.ids[:step],
                sampling,
                (tokenizer.eos_token_id,),
            )
            assert token == int(x.argmax()), f"token {step} after {text!r}"
        wanted = scored(logits, prompt, sampling.prompt_logprobs)
        assert {p: (rank, [i for i, _ in e]) for p, (rank, e) in sink.scores.items()} == {
            p: (r, [i for i, _ in e]) for p, r, e in wanted
        }
        for position, _, entries in wanted:
            assert [v for _, v in sink.scores[position][1]] == pytest.approx(
                [v for _, v in entries], abs=2e-3
            )
        assert text.encode().endswith(b"".join(sink.bytes[p] for p in range(1, len(prompt))))


def test_a_truncated_prompt_is_its_end(engine: Engine, oracle: Any) -> None:
    whole = oracle[1]("word " * 600).input_ids
    jobs = [job("word " * 600, {"truncate_prompt": keep}) for keep in (-1, 7)]
    alone = Job(Prompt(ids=pack("i", whole[-7:])), jobs[0].sampling, jobs[0].text)
    cut, rest, tail = run(engine, [*jobs, alone])
    assert (
        cut.prompt == whole[-(512 - STEPS) :]
        and cut.end == "length"
        and rest.prompt == whole[-7:]
        and rest.ids == tail.ids
    )


def test_what_the_tokenizer_refuses_by_name(engine: Engine) -> None:
    (sink,) = run(engine, [job("hello", {"bad_words": ("fine", "1 2 " * 50)})])
    assert sink.end.kind is ErrorKind.INVALID and sink.end.param == "bad_words"


def answered(engine: Engine, make_query: MakeQuery) -> Any:
    answers: list[Any] = []
    engine.owner.query(make_query, answers.append)
    end = time.monotonic() + 60
    while not answers:
        assert time.monotonic() < end
        engine.pump()
    return answers[0]


def test_tokenize_and_detokenize(engine: Engine, oracle: Any) -> None:
    text = "Ünïcödé 世界 <|im_start|>🙂"
    said = answered(engine, partial(Tokenize, prompt=Prompt(text=text), with_texts=True))
    ids = unpack("i", said.ids).tolist()
    assert ids == oracle[1](text).input_ids and list(said.texts) == oracle[1].convert_ids_to_tokens(
        ids
    )
    assert answered(engine, partial(Detokenize, ids=said.ids)).text == text
    assert answered(engine, partial(Detokenize, ids=pack("i", [10**6]))).kind is ErrorKind.INVALID


def test_hostile_columns_straight_to_the_scheduler_end_as_refusals(engine: Engine) -> None:
    run_dir = engine._run_dir
    inbox: Inbox[Message] = Inbox(run_dir, Role.TOKENIZER, 77)
    outbox, ends = Outbox(), {}
    hostile: list[dict[str, Any]] = [
        {"bias_ids": pack("i", [2**31 - 1]), "bias_values": pack("f", [1.0])},
        {"bias_ids": pack("i", [1, 2, 3]), "bias_values": pack("f", [1.0])},
        {"bias_ids": pack("i", [1]), "bias_values": pack("f", [float("nan")])},
        {"allowed_ids": pack("i", [-5])},
        {"allowed_ids": b"abcdef"},
        {"allowed_ids": pack("i", [4]), "bad_words": (pack("i", [4]),)},
        {"bad_words": (pack("i", [49_152]),)},
        {"bad_words": (b"",)},
    ]
    try:
        for i, sampling in enumerate(hostile):
            rid = bytes([i]) * 16
            message = Submit(
                rid, 1, i, inbox.address, pack("i", [5, 6]), b"", Sampling(**{**GREEDY, **sampling})
            )
            assert outbox.send(inbox_address(run_dir, Role.SCHEDULER, 0), message)
        end = time.monotonic() + 30
        while len(ends) < len(hostile) and time.monotonic() < end:
            inbox.wait(0.2)
            ends |= {
                e.handle: e
                for message in inbox.drain()
                if isinstance(message, Tokens)
                for e in message.ended
            }
        assert {(e.finish, e.status) for e in ends.values()} == {(Finish.REFUSED, 400)} and len(
            ends
        ) == len(hostile)
    finally:
        inbox.close()
        outbox.close()
    (sink,) = run(engine, [job("still there")])
    assert sink.end == "length" and len(sink.ids) == STEPS


def test_a_question_and_a_scored_prompt_survive_the_tokenizer(engine: Engine, oracle: Any) -> None:
    answers: list[Any] = []
    sink = Sink()
    text = " ".join(TEXTS) * 4
    assert engine.submit(job(text, prompt_logprobs=1), sink) is not None
    engine.owner.query(partial(Tokenize, prompt=Prompt(text="hello")), answers.append)
    os.kill(
        next(pid for name, pid in engine.pids().items() if name.startswith("tokenizer")),
        signal.SIGKILL,
    )
    pump(engine, [sink])
    end = time.monotonic() + 60
    while not answers and time.monotonic() < end:
        engine.pump()
    assert unpack("i", answers[0].ids).tolist() == oracle[1]("hello").input_ids
    assert sink.end == "length" and sorted(sink.scores) == list(
        range(1, len(oracle[1](text).input_ids))
    )
