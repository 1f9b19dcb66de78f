"""The service over real sockets: once in a thread, once as a process."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pagewire.config import ModelConfig, RunConfig, TokenizerConfig
from pagewire.tokenizer.encode import LONG
from pagewire.tokenizer.load import Loaded
from pagewire.tokenizer.service import Service, Text
from pagewire_protocol.channels import Inbox, Outbox, prepare_run_dir
from pagewire_protocol.messages import (
    Cancel,
    Chat,
    ChatMessage,
    Deltas,
    End,
    Finish,
    Generate,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Peer,
    Placed,
    Prompt,
    Role,
    Roster,
    Submit,
    Tokens,
    pack,
    unpack,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from tokenizers import Tokenizer, models

X = 1 << 43
DEADLINE_S = 30.0


class Stand:
    """The neighbours of one tokenizer: a scheduler and a frontend that keep what they receive."""

    def __init__(self, run_dir: Path) -> None:
        self.scheduler: Inbox[Message] = Inbox(run_dir, Role.SCHEDULER, 0)
        self.frontend: Inbox[Message] = Inbox(run_dir, Role.FRONTEND, 11)
        self.outbox = Outbox()
        self.tokenizer = ""

    def expect(self, inbox: Inbox[Message], wanted: Callable[[Message], bool]) -> Message:
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            inbox.wait(0.2)
            for message in inbox.drain(1):
                if wanted(message):
                    return message
        raise AssertionError("the message did not come")

    def submit(self) -> Submit:
        message = self.expect(self.scheduler, lambda m: isinstance(m, Submit))
        assert isinstance(message, Submit)
        return message

    def deltas(self) -> Deltas:
        message = self.expect(self.frontend, lambda m: isinstance(m, Deltas))
        assert isinstance(message, Deltas)
        return message

    def greet(self) -> Hello:
        """Take part in the start, up to the ready Hello and a roster with a worker."""
        hello = self.expect(self.scheduler, lambda m: isinstance(m, Hello) and m.peer.ready)
        assert isinstance(hello, Hello)
        self.tokenizer = hello.peer.inbox
        self.roster(hello.peer)
        return hello

    def roster(self, *peers: Peer, epoch: int = 1) -> None:
        frontend = Peer(Role.FRONTEND, "f", self.frontend.address, 11, True)
        self.send(Roster(epoch, (frontend, *peers), 30_000, 400, (2,), True, True))

    def send(self, message: Message) -> None:
        assert self.outbox.send(self.tokenizer, message)

    def generate(
        self,
        prompt: Prompt,
        rid: int = 1,
        attempt: int = 1,
        handle: int = 5,
        output: tuple[int, ...] = (),
    ) -> None:
        sampling, text = Sampling(0, 16), TextOptions(stop=("STOP",))
        column = pack("i", output)
        self.send(
            Generate(
                rid.to_bytes(16, "big"),
                attempt,
                handle,
                self.frontend.address,
                prompt,
                column,
                sampling,
                text,
            )
        )

    def step(self, handle: int, position: int, token: int, execution: int = X, **fields) -> None:
        one = pack("I", [1])
        self.send(
            Tokens(
                pack("I", [handle]),
                one,
                pack("Q", [execution]),
                pack("i", [position]),
                pack("i", [token]),
                **fields,
            )
        )

    def close(self) -> None:
        self.scheduler.close()
        self.frontend.close()
        self.outbox.close()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        yield prepare_run_dir(folder)


@pytest.fixture
def stand(run_dir: Path) -> Iterator[Stand]:
    stand = Stand(run_dir)
    yield stand
    stand.close()


@pytest.fixture
def service(stand: Stand, run_dir: Path, make_gguf) -> Iterator[Service]:
    service = Service(
        RunConfig(str(run_dir)), ModelConfig(model=str(make_gguf())), TokenizerConfig()
    )
    thread = threading.Thread(target=service.loop)
    thread.start()
    hello = stand.greet()
    assert (
        hello.tokenizer is not None
        and hello.tokenizer.has_text
        and hello.tokenizer.has_chat_template
    )
    yield service
    service.stop()
    thread.join(10)
    service.close()
    assert not thread.is_alive()
    assert isinstance(stand.expect(stand.scheduler, lambda m: isinstance(m, Goodbye)), Goodbye)


def test_from_chat_to_text_and_back(service: Service, stand: Stand, bpe: Tokenizer):
    stand.generate(Prompt(chat=Chat((ChatMessage("user", "hello"),))))
    submit = stand.submit()
    expected = bpe.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n").ids
    assert unpack("i", submit.prompt).tolist() == expected and submit.reply_to == stand.tokenizer
    answer = bpe.encode("Paris 𐌰!").ids
    stand.step(submit.handle, 0, answer[0], placed=(Placed(submit.handle, 1, 3),))
    first = stand.deltas()
    assert (
        first.started[0].handle,
        first.started[0].prompt_tokens,
        first.started[0].cached_tokens,
    ) == (5, len(expected), 3)
    text = "".join(first.texts)
    for position, token in enumerate(answer[1:], 1):
        last = position == len(answer) - 1
        stand.step(
            submit.handle,
            position,
            token,
            ended=(End(submit.handle, 1, Finish.LENGTH),) if last else (),
        )
    while not (deltas := stand.deltas()).ended:
        text += "".join(deltas.texts)
    assert text + "".join(deltas.texts) == "Paris 𐌰!"
    assert deltas.ended == (End(5, 1, Finish.LENGTH),)


def test_frontends_are_reached_when_they_are_heard_of(
    stand: Stand, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    """Else the first answer to each would wait for its connection."""
    reached: list[str] = []
    monkeypatch.setattr(Outbox, "reach", lambda _, address: reached.append(address))
    request.getfixturevalue("service")
    stand.generate(Prompt(text="hello"))
    stand.submit()
    assert stand.frontend.address in reached


def test_a_warm_up_that_fails_does_no_harm(bpe: Tokenizer):
    words = Tokenizer(models.WordLevel({"hello": 0}, unk_token="[UNK]"))
    for tokenizer in (bpe, words):
        Text(Loaded(tokenizer, "", {})).warm_up()
    Text(None).warm_up()
    with pytest.raises(Exception, match="UNK"):
        words.encode("anything else")


def test_stop_cancel_and_replay(service: Service, stand: Stand, bpe: Tokenizer):
    stand.generate(Prompt(text="hello"))
    submit = stand.submit()
    out = tuple(bpe.encode("a ST").ids)
    for position, token in enumerate(out):
        stand.step(submit.handle, position, token)
    text = ""
    while text != "a ":
        text += "".join(stand.deltas().texts)
    stand.generate(Prompt(text="hello"), attempt=2, handle=6, output=out)
    second = stand.submit()
    assert (
        second.attempt == 2 and second.output == pack("i", out) and second.handle != submit.handle
    )
    for offset, token in enumerate(bpe.encode("O").ids + bpe.encode("P").ids):
        stand.step(second.handle, len(out) + offset, token, X + 1)
    cancel = stand.expect(stand.scheduler, lambda m: isinstance(m, Cancel))
    assert cancel == Cancel(((second.rid, 2),))
    while not (deltas := stand.deltas()).ended:
        assert set(deltas.texts) <= {""}
    assert deltas.ended == (End(6, 2, Finish.STOP, "STOP"),) and set(deltas.texts) == {""}


def test_long_prompts_come_back_and_the_client_s_cancel_passes(service: Service, stand: Stand):
    stand.generate(Prompt(text="a b " * LONG), rid=9)
    end = stand.deltas().ended[0]
    assert end.finish is Finish.REFUSED and "maximum context length is 30000 tokens" in end.message
    stand.generate(Prompt(text="x" * (LONG + 1)), rid=10)
    submit = stand.submit()
    stand.send(Cancel(((submit.rid, 1),)))
    stand.expect(stand.scheduler, lambda m: m == Cancel(((submit.rid, 1),)))


def test_it_keeps_showing_progress(service: Service, stand: Stand):
    first = stand.expect(stand.scheduler, lambda m: isinstance(m, Heartbeat))
    second = stand.expect(stand.scheduler, lambda m: isinstance(m, Heartbeat))
    assert (
        isinstance(first, Heartbeat)
        and isinstance(second, Heartbeat)
        and second.progress > first.progress
    )


def test_what_cannot_be_loaded_ends_the_service(stand: Stand, run_dir: Path, tmp_path: Path):
    service = Service(RunConfig(str(run_dir)), ModelConfig(model=str(tmp_path)), TokenizerConfig())
    with contextlib.closing(service), pytest.raises(ValueError, match=r"no tokenizer\.json"):
        service.loop()


def start(run_dir: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pagewire", "tokenizer", "--run-dir", str(run_dir), *flags]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def test_sigterm_ends_the_process_in_order(stand: Stand, run_dir: Path):
    process = start(run_dir, "--skip-tokenizer-init")
    try:
        hello = stand.greet()
        assert hello.tokenizer is not None and not hello.tokenizer.has_text
        stand.generate(Prompt(ids=pack("i", [3, 4])))
        assert stand.submit().prompt == pack("i", [3, 4])
        process.send_signal(signal.SIGTERM)
        stand.expect(stand.scheduler, lambda m: isinstance(m, Goodbye))
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors
        assert not list(run_dir.glob("tokenizer-*"))
    finally:
        process.kill()
        process.communicate()


def test_a_missing_model_is_the_last_line(stand: Stand, run_dir: Path):
    process = start(run_dir, "--model", "/nowhere/model.gguf")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "/nowhere/model.gguf does not exist" in errors.strip().splitlines()[-1]
