"""What one request's text costs the tokenizer: encoded once, off the loop where it is long, and
taken a few milliseconds at a time."""

import itertools
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pagewire.config import ModelConfig, RunConfig, TokenizerConfig
from pagewire.tokenizer import encode as encode_module
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import LONG, PIECE, Cancelled, Encoder, Limit, Refused, size_of
from pagewire.tokenizer.encodings import EncodingTask
from pagewire.tokenizer.lanes import SHORT, Lanes
from pagewire.tokenizer.requests import Requests, encode
from pagewire.tokenizer.service import SLICE_S, Service
from pagewire_protocol.channels import prepare_run_dir
from pagewire_protocol.messages import (
    Cancel,
    Chat,
    ChatMessage,
    Generate,
    Peer,
    Prompt,
    Role,
    Roster,
    Submit,
    unpack,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from tokenizers import Tokenizer

FRONTEND = "ipc:///run/frontend-a.sock"
ROSTER = Roster(1, (Peer(Role.FRONTEND, "f", FRONTEND, 5, True),), 32_768, 500, (2,), True, True)


class Counted:
    """A tokenizer that counts the texts that it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return self._tokenizer.encode_batch_fast(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Bench:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.counted = Counted(tokenizer)
        self.encoder = Encoder(self.counted, None, Decoding(tokenizer))  # type: ignore[arg-type]
        self.offloaded: list[EncodingTask] = []
        self.requests = Requests(
            self.encoder, Decoding(tokenizer), "ipc:///run/t.sock", self.offloaded.append
        )
        self.requests.on_roster(ROSTER, True)

    def choices(self, text: str, count: int, **fields: Any) -> None:
        for index in range(count):
            self.requests.generate(generate(Prompt(text=text), index, **fields))

    def finish(self) -> None:
        for task in self.offloaded:
            task.result = encode(self.encoder, task.text)
            while self.requests.encoded(task):
                pass
        self.offloaded.clear()

    def submitted(self) -> list[Submit]:
        return [message for message in self.requests.to_scheduler if isinstance(message, Submit)]


def generate(prompt: Prompt, index: int = 0, **fields: Any) -> Generate:
    words = fields.pop("bad_words", ())
    cut = fields.pop("truncate_prompt", 0)
    return Generate(
        index.to_bytes(16, "big"),
        1,
        index,
        FRONTEND,
        prompt,
        b"",
        Sampling(1, 4),
        TextOptions(bad_words=words, truncate_prompt=cut),
        **fields,
    )


@pytest.fixture
def bench(bpe: Tokenizer) -> Bench:
    return Bench(bpe)


@pytest.mark.parametrize("text", ["hello world " * 20, "hello world " * (LONG // 6)])
def test_the_choices_of_one_text_encode_it_once(bench: Bench, text: str):
    bench.choices(text, 128)
    assert len(bench.offloaded) <= 1
    bench.finish()
    assert bench.counted.texts == [text]
    assert len(bench.submitted()) == 128
    assert len({submit.prompt for submit in bench.submitted()}) == 1


def test_the_choices_of_one_request_encode_its_bad_words_once(bench: Bench):
    bench.choices("hi", 64, bad_words=("hello", "world"))
    assert len(bench.submitted()) == 64
    assert len(bench.counted.texts) == len(("hi",)) + 2 * len(("hello", "world"))


def test_holders_of_different_keys_share_no_encoded_text(bench: Bench):
    """How soon an answer comes would tell one what another has sent."""
    for index, salt in enumerate(("one", "two", "one")):
        bench.requests.generate(generate(Prompt(text="hello world"), index, cache_salt=salt))
    assert bench.counted.texts == ["hello world"] * 2


def test_what_texts_became_is_kept_within_bounds(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pagewire.tokenizer.encodings.KEPT_BYTES", 40_000)
    for index in range(100):
        bench.requests.generate(generate(Prompt(text=f"{index} " + "hello " * 100), index))
    encodings = bench.requests._encodings
    assert encodings._kept_bytes <= 40_000
    assert 0 < len(encodings._kept) < 40
    assert encodings._kept_bytes == sum(taken for _, taken in encodings._kept.values())


def test_every_part_of_a_conversation_counts_as_work():
    def chat(role: str, content: str, count: int) -> Prompt:
        return Prompt(chat=Chat((ChatMessage(role, content),) * count))

    assert size_of(chat("assistant", "", 4096)) > LONG, "what says nothing is rendered all the same"
    assert size_of(chat("r" * 64, "", 128)) > LONG
    assert size_of(chat("user", "x" * LONG, 1)) > LONG
    assert (
        size_of(Prompt(chat=Chat((ChatMessage("user", "x"),), template_kwargs=b" " * LONG))) > LONG
    )


# --- texts that are too long


def test_a_text_that_is_far_too_long_is_refused_before_all_of_it_is_encoded(bench: Bench):
    text = "hello world " * 100_000
    with pytest.raises(Refused) as refused:
        bench.encoder.encode(Prompt(text=text), True, Limit(1000))
    assert (
        f"{len(text)} characters" in refused.value.message
        and "1000 tokens" in refused.value.message
    )
    assert refused.value.param == "prompt"
    assert sum(map(len, bench.counted.texts)) <= PIECE


@pytest.mark.parametrize("word", ["a", "hello ", "你好 ", " "])
def test_a_text_that_fits_is_never_refused(bench: Bench, bpe: Tokenizer, word: str):
    """However many characters its tokens have."""
    text = word * (400_000 // len(word))
    whole = bpe.encode(text).ids
    column = bench.encoder.encode(Prompt(text=text), True, Limit(len(whole)))
    assert unpack("i", column).tolist() == whole


@pytest.mark.parametrize("kept", [1, 7, 5000])
def test_the_end_that_is_kept_of_a_long_text_is_that_of_the_whole(
    bench: Bench, bpe: Tokenizer, kept: int
):
    text = "".join(f"{i} hello world, 你好 the year is {i * 7919}. " for i in range(30_000))
    column = bench.encoder.encode(Prompt(text=text), True, Limit(8192, kept))
    assert unpack("i", column).tolist()[-kept:] == bpe.encode(text).ids[-kept:]
    assert sum(map(len, bench.counted.texts)) < len(text)


def test_encoding_a_long_text_can_be_cancelled(bench: Bench):
    answers = itertools.chain([False, False], itertools.repeat(True))
    with pytest.raises(Cancelled):
        bench.encoder.encode(
            Prompt(text=" " * 4_000_000), True, Limit(100_000), lambda: next(answers)
        )
    assert len(bench.counted.texts) == 2


def test_a_thread_hears_that_the_client_has_left(bench: Bench):
    bench.choices("hello " * LONG, 2)
    (task,) = bench.offloaded
    for index in range(2):
        assert not task.cancelled
        bench.requests.cancel(Cancel(((index.to_bytes(16, "big"), 1),)))
    assert task.cancelled and not len(bench.requests)
    task.result = encode(bench.encoder, task.text)
    assert not bench.requests.encoded(task) and not bench.submitted()


# --- which goes first


class Work:
    def __init__(self, name: str, size: int) -> None:
        self.name, self.size, self.cancelled = name, size, False


def test_short_texts_overtake_long_ones():
    now = [0.0]
    lanes: Lanes[Work] = Lanes(lambda: now[0])
    for name, size in (("book", 4_000_000), ("page", SHORT), ("chapter", 400_000)):
        lanes.put(Work(name, size))
    now[0] = 5.0
    lanes.put(Work("late page", SHORT))
    assert [lanes.take(False).name for _ in range(4)] == ["page", "chapter", "late page", "book"]  # type: ignore[union-attr]


def test_a_long_text_waits_for_later_ones_only_so_long():
    now = [0.0]
    lanes: Lanes[Work] = Lanes(lambda: now[0])
    lanes.put(Work("book", 4_000_000))
    now[0] = 60.0
    lanes.put(Work("page", 100))
    assert lanes.take(False).name == "book"  # type: ignore[union-attr]


def test_one_thread_takes_no_long_text_and_cancelled_ones_are_skipped():
    lanes: Lanes[Work] = Lanes()
    left = Work("left", 100)
    lanes.put(left)
    left.cancelled = True
    lanes.put(Work("book", 4_000_000))
    taken: list[Work | None] = []
    thread = threading.Thread(target=lambda: taken.append(lanes.take(True)))
    thread.start()
    lanes.put(Work("page", 100))
    thread.join(10)
    assert [work and work.name for work in taken] == ["page"]
    lanes.close()
    assert lanes.take(False) is None


# --- the loop


@pytest.fixture
def service(bpe: Tokenizer) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        run_dir = str(prepare_run_dir(folder))
        service = Service(RunConfig(run_dir), ModelConfig(), TokenizerConfig())
        service.requests = Bench(bpe).requests
        yield service
        service.close()
        assert not list(Path(folder).glob("*.sock"))


def test_new_requests_are_taken_in_slices(service: Service):
    """The clock goes forward by a millisecond each time it is read: a request takes that long."""
    for index in range(100):
        service._arrivals.append(generate(Prompt(text=f"hi {index}"), index))
    turns = 0
    milliseconds = itertools.count()
    while service._arrivals:
        before = len(service._arrivals)
        service._take_arrivals(lambda: next(milliseconds) / 1000)
        assert 1 <= before - len(service._arrivals) <= 1000 * SLICE_S + 1
        turns += 1
    assert turns >= 100 / (1000 * SLICE_S + 1)
    assert service.requests is not None and len(service.requests) == 100


def test_a_cancel_finds_the_request_that_waits_before_it(service: Service):
    request = generate(Prompt(text="hi"))
    cancel = Cancel(((request.rid, 1),))
    service._arrivals.extend([request, cancel])
    while service._arrivals:
        service._take_arrivals(iter(range(10)).__next__)
    assert service.requests is not None
    submit, *rest = service.requests.to_scheduler
    assert isinstance(submit, Submit) and rest == [cancel]


def test_what_a_frontend_that_is_gone_has_sent_is_dropped(service: Service):
    service._arrivals.extend([generate(Prompt(text="hi")), Cancel(((bytes(16), 1),))])
    service._drop_arrivals({FRONTEND})
    assert [type(arrival) for arrival in service._arrivals] == [Cancel]


def test_the_sizes_stand_in_order():
    assert LONG < SHORT and encode_module.PIECE >= SHORT
