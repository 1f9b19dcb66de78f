"""Tokenize and Detokenize: against the tokenizer itself, and over the service's sockets."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pagewire.config import ModelConfig, RunConfig, TokenizerConfig
from pagewire.tokenizer.encode import LONG, Encoder
from pagewire.tokenizer.queries import answer, is_long
from pagewire.tokenizer.service import Service
from pagewire.tokenizer.template import ChatTemplate
from pagewire_protocol.channels import Inbox, Outbox, prepare_run_dir
from pagewire_protocol.messages import (
    Chat,
    ChatMessage,
    Detokenize,
    Hello,
    Message,
    Prompt,
    Role,
    Tokenize,
    Tokenized,
    pack,
    unpack,
)
from tokenizers import Tokenizer

ME = "ipc:///run/frontend.sock"


@pytest.fixture
def encoder(bpe: Tokenizer, template_source: str) -> Encoder:
    return Encoder(bpe, ChatTemplate(template_source, {}))


def ids(given: Tokenized) -> list[int]:
    assert not given.status, given.message
    return unpack("i", given.ids).tolist()


def test_text_and_chat_and_ids(encoder: Encoder, bpe: Tokenizer):
    said = answer(encoder, Tokenize(3, ME, Prompt(text="hello 世界"), with_texts=True))
    assert (
        said.handle == 3
        and ids(said) == bpe.encode("hello 世界").ids
        and list(said.texts) == bpe.encode("hello 世界").tokens
    )
    chat = Chat((ChatMessage("user", "hey"),), template_kwargs=b'{"x": 1}')
    said = answer(encoder, Tokenize(4, ME, Prompt(chat=chat)))
    assert (
        ids(said) == bpe.encode("<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n").ids
        and said.texts == ()
    )
    assert ids(answer(encoder, Tokenize(5, ME, Prompt(ids=pack("i", [7, 8]))))) == [7, 8]


def test_back_to_text(encoder: Encoder, bpe: Tokenizer):
    whole = bpe.encode("<|im_start|>user 你好, world").ids
    assert (
        answer(encoder, Detokenize(1, ME, pack("i", whole))).text == "<|im_start|>user 你好, world"
    )
    assert (
        answer(encoder, Detokenize(1, ME, pack("i", whole), skip_special_tokens=True)).text
        == "user 你好, world"
    )
    assert answer(encoder, Detokenize(1, ME, b"")) == Tokenized(1)


@pytest.mark.parametrize(
    ("question", "param"),
    [
        (Detokenize(1, ME, pack("i", [5, 100_000])), "tokens"),
        (Detokenize(1, ME, pack("i", [-1])), "tokens"),
        (Detokenize(1, ME, b"abc"), "tokens"),
        (Tokenize(1, ME, Prompt()), "prompt"),
        (
            Tokenize(
                1, ME, Prompt(chat=Chat((ChatMessage("user", "x"),), continue_final_message=True))
            ),
            None,
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(encoder: Encoder, question, param):
    said = answer(encoder, question)
    assert (
        said.status == 400
        and said.message
        and said.param == param
        and not said.ids
        and not said.text
    )


def test_without_a_tokenizer_there_is_neither(bpe: Tokenizer):
    empty = Encoder(None, None)
    for question in (
        Tokenize(1, ME, Prompt(text="x")),
        Detokenize(1, ME, pack("i", [1])),
        Tokenize(1, ME, Prompt(ids=b""), with_texts=True),
    ):
        assert "--skip-tokenizer-init" in answer(empty, question).message


def test_long_ones_are_told_apart():
    assert is_long(Tokenize(1, ME, Prompt(text="x" * (LONG + 1)))) and not is_long(
        Tokenize(1, ME, Prompt(text="x" * LONG))
    )
    assert is_long(Detokenize(1, ME, bytes(4 * LONG))) and not is_long(
        Detokenize(1, ME, bytes(LONG))
    )


class Frontend:
    """PendingQueries a service over sockets, which is told of no scheduler and no worker."""

    def __init__(self, run_dir: Path) -> None:
        self.scheduler: Inbox[Message] = Inbox(run_dir, Role.SCHEDULER, 0)
        self.inbox: Inbox[Message] = Inbox(run_dir, Role.FRONTEND, 11)
        self.outbox = Outbox()

    def await_one(self, inbox: Inbox[Message], kind: type) -> Message:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            inbox.wait(0.2)
            for message in inbox.drain(1):
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} came")


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        made = Frontend(prepare_run_dir(folder))
        made.run_dir = folder  # type: ignore[attr-defined]
        yield made
        made.scheduler.close()
        made.inbox.close()
        made.outbox.close()


def test_the_service_answers_before_there_is_a_worker_and_long_ones_too(
    frontend: Frontend, make_gguf, bpe: Tokenizer
):
    service = Service(
        RunConfig(frontend.run_dir), ModelConfig(model=str(make_gguf())), TokenizerConfig()
    )  # type: ignore[attr-defined]
    address, long = service.inbox.address, "hello world " * (LONG // 10)
    thread = threading.Thread(target=service.loop)
    try:
        assert frontend.outbox.send(
            address, Tokenize(1, frontend.inbox.address, Prompt(text="early"))
        )
        thread.start()
        early = frontend.await_one(frontend.inbox, Tokenized)
        assert early.handle == 1 and early.status in (0, 503)
        while not (hello := frontend.await_one(frontend.scheduler, Hello)).peer.ready:
            pass
        for number, text in ((2, long), (3, "short")):
            assert frontend.outbox.send(
                address, Tokenize(number, frontend.inbox.address, Prompt(text=text))
            )
        said = {
            one.handle: one
            for one in (frontend.await_one(frontend.inbox, Tokenized) for _ in range(2))
        }
        assert (
            hello.peer.inbox == address
            and ids(said[2]) == bpe.encode(long).ids
            and ids(said[3]) == bpe.encode("short").ids
        )
        assert frontend.outbox.send(address, Detokenize(4, frontend.inbox.address, said[2].ids))
        assert frontend.await_one(frontend.inbox, Tokenized).text == long
    finally:
        service.stop()
        thread.join(10)
        service.close()
