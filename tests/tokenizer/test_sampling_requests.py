"""What the tokenizer adds to sampling: bad words as token ids, the end of a long prompt,
log-probabilities of a prompt as bytes."""

import numpy as np
import pytest
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import LONG, Encoder
from pagewire.tokenizer.encodings import EncodingTask
from pagewire.tokenizer.requests import Requests, encode
from pagewire_protocol.messages import (
    Deltas,
    Finish,
    Generate,
    Peer,
    Placed,
    Prompt,
    PromptLogprobs,
    Role,
    Roster,
    Submit,
    Tokens,
    pack,
    unpack,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from tokenizers import Tokenizer

FRONTEND = "ipc:///run/frontend-a.sock"
VOCAB, CONTEXT = 500, 64
X = 1 << 43 | 7


class Bench:
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.offloaded: list[EncodingTask] = []
        self.encoder = Encoder(tokenizer, None)
        self.requests = Requests(
            self.encoder, Decoding(tokenizer), "ipc:///run/tokenizer.sock", self.offloaded.append
        )
        frontend = Peer(Role.FRONTEND, "f", FRONTEND, 5, True)
        self.requests.on_roster(Roster(1, (frontend,), CONTEXT, VOCAB, (2,), True, True), True)

    def finish(self, task: EncodingTask) -> None:
        """As a thread does, and then the loop."""
        task.result = encode(self.encoder, task.text)
        while self.requests.encoded(task):
            pass

    def generate(self, prompt: Prompt, sampling: Sampling, text: TextOptions, **fields) -> None:
        self.requests.generate(
            Generate(b"r" * 16, 1, 70, FRONTEND, prompt, b"", sampling, text, **fields)
        )

    def submit(self, *args, **fields) -> Submit:
        self.generate(*args, **fields)
        (submit,) = self.requests.to_scheduler
        self.requests.to_scheduler = []
        assert isinstance(submit, Submit)
        return submit

    def refusal(self, *args) -> tuple[int, str, str | None]:
        self.generate(*args)
        ((deltas,),) = (self.requests.outgoing[FRONTEND].messages(),)
        (end,) = deltas.ended
        assert (
            end.finish is Finish.REFUSED
            and not self.requests.to_scheduler
            and not len(self.requests)
        )
        return end.status, end.message, end.param


@pytest.fixture
def bench(bpe: Tokenizer) -> Bench:
    return Bench(bpe)


def ids(column: bytes) -> list[int]:
    return unpack("i", column).tolist()


HI, PLAIN = Prompt(text="hi"), Sampling(3, 8)


# --- bad words
#   --------------------------------------------------------------------------------------------------------


def vllm_sequences(tokenizer: Tokenizer, words: tuple[str, ...]) -> list[list[int]]:
    """The rule as vLLM documents it: without a space always; with one when as long and different
    from the first token on."""
    found: list[list[int]] = []
    for word in words:
        bare = tokenizer.encode(word.lstrip(), add_special_tokens=False).ids
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False).ids
        found += [bare] + ([spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [])
    return found


def test_bad_words_become_token_ids_with_and_without_a_space(bench: Bench, bpe: Tokenizer):
    words = ("Paris", "the", "France", "  is", "!", "世界", "user")
    wanted = vllm_sequences(bpe, words)
    assert len(words) < len(wanted) < 2 * len(words), "the words here must show both cases"
    given = Sampling(3, 8, bad_words=(pack("i", [9, 8]),))
    submit = bench.submit(HI, given, TextOptions(bad_words=words))
    assert [ids(word) for word in submit.sampling.bad_words] == [[9, 8], *wanted]


@pytest.mark.parametrize("word", [" ", "x ?" * 64])
def test_a_bad_word_without_tokens_or_with_too_many_is_refused(bench: Bench, word: str):
    status, message, param = bench.refusal(HI, PLAIN, TextOptions(bad_words=("ok", word)))
    assert status == 400 and param == "bad_words" and "1 to 64" in message


def test_bad_words_need_a_tokenizer():
    status, message, param = Bench(None).refusal(
        Prompt(ids=pack("i", [1])), PLAIN, TextOptions(bad_words=("x",))
    )
    assert status == 400 and param == "bad_words" and "--skip-tokenizer-init" in message


def test_many_bad_words_are_encoded_beside_the_loop(bench: Bench):
    words = tuple(f"word{i} " + "x" * 240 for i in range(LONG // 480 + 1))
    bench.generate(HI, PLAIN, TextOptions(bad_words=words))
    (task,) = bench.offloaded
    bench.finish(task)
    assert len(bench.requests.outgoing[FRONTEND].take().ended) == 1, "each has more than 64 tokens"


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"bias_ids": pack("i", [VOCAB]), "bias_values": pack("f", [1.0])}, "logit_bias"),
        ({"bias_ids": pack("i", [1]), "bias_values": pack("f", [float("nan")])}, "logit_bias"),
        ({"allowed_ids": pack("i", [-1])}, "allowed_token_ids"),
        ({"allowed_ids": b"abc"}, "allowed_token_ids"),
    ],
)
def test_columns_that_no_model_could_take_are_refused_here_already(bench: Bench, sampling, param):
    assert bench.refusal(HI, Sampling(3, 8, **sampling), TextOptions())[::2] == (400, param)


def test_nothing_is_left_when_the_only_allowed_token_is_a_bad_word(bench: Bench, bpe: Tokenizer):
    (token,) = bpe.encode("!", add_special_tokens=False).ids
    status, message, param = bench.refusal(
        HI, Sampling(3, 8, allowed_ids=pack("i", [token])), TextOptions(bad_words=("!",))
    )
    assert (status, param) == (400, "allowed_token_ids") and "no token could be sampled" in message


# --- truncation
#   -------------------------------------------------------------------------------------------------------

LONG_IDS = list(range(3, 103))


@pytest.mark.parametrize(
    ("keep", "max_tokens", "rest", "kept"),
    [
        (5, 8, False, 5),
        (56, 8, False, 56),
        (-1, 8, False, 56),
        (-1, 63, False, 1),
        (-1, 16, True, 63),
        (200, 8, False, None),
        (0, 8, False, None),
    ],
)
def test_the_end_of_a_long_prompt_is_kept(
    bench: Bench, keep: int, max_tokens: int, rest: bool, kept: int | None
):
    given = (
        Prompt(ids=pack("i", LONG_IDS)),
        Sampling(3, max_tokens),
        TextOptions(truncate_prompt=keep, return_prompt_ids=True),
    )
    if kept is None:
        assert "maximum context length is 64" in bench.refusal(*given)[1]
        return
    submit = bench.submit(*given, max_tokens_is_rest=rest)
    assert ids(submit.prompt) == LONG_IDS[-kept:] and submit.sampling.max_tokens == (
        CONTEXT - kept if rest else max_tokens
    )
    bench.requests.tokens([Tokens(b"", b"", b"", b"", b"", (Placed(submit.handle, 1, 0),))])
    (started,) = bench.requests.outgoing[FRONTEND].take().started
    assert started.prompt_tokens == kept and started.prompt_ids == submit.prompt


def test_text_is_cut_by_tokens_and_short_prompts_stay(bench: Bench, bpe: Tokenizer):
    whole = bpe.encode("hello there, world").ids
    assert (
        ids(
            bench.submit(
                Prompt(text="hello there, world"), PLAIN, TextOptions(truncate_prompt=3)
            ).prompt
        )
        == whole[-3:]
    )
    bench = Bench(bpe)
    assert (
        ids(
            bench.submit(
                Prompt(text="hello there, world"), PLAIN, TextOptions(truncate_prompt=-1)
            ).prompt
        )
        == whole
    )


def test_no_room_at_all_is_refused_not_cut_to_nothing(bench: Bench):
    given = Prompt(ids=pack("i", LONG_IDS)), Sampling(3, CONTEXT), TextOptions(truncate_prompt=-1)
    assert bench.refusal(*given)[0] == 400


# --- log-probabilities of the prompt
#   ----------------------------------------------------------------------------------


def run_of(
    handle: int, first: int, tokens: list[int], execution: int = X, attempt: int = 1, **columns
) -> PromptLogprobs:
    count = len(tokens)
    parts = {
        "counts": pack("i", [2] * count),
        "ranks": pack("i", range(1, count + 1)),
        "ids": np.array([[token, 5] for token in tokens], np.int32).tobytes(),
        "values": pack("f", [-1.0] * 2 * count),
        **columns,
    }
    return PromptLogprobs(None, first, *parts.values(), attempt, execution, handle=handle)


def said(*runs: PromptLogprobs, **more) -> Tokens:
    return Tokens(b"", b"", b"", b"", b"", prompt_logprobs=runs, **more)


def test_prompt_logprobs_come_after_started_before_rows_with_their_bytes(
    bench: Bench, bpe: Tokenizer
):
    submit = bench.submit(
        Prompt(text="世界 hello"), Sampling(3, 8, prompt_logprobs=1), TextOptions()
    )
    prompt, handle = ids(submit.prompt), submit.handle
    first, second = run_of(handle, 1, prompt[1:4]), run_of(handle, 4, prompt[4:])
    row = (pack("I", [handle]), pack("I", [1]), pack("Q", [X]), pack("i", [0]), pack("i", [5]))
    bench.requests.tokens(
        [said(first, placed=(Placed(handle, 1, 0),)), Tokens(*row, prompt_logprobs=(second,))]
    )
    outgoing = bench.requests.outgoing[FRONTEND]
    assert outgoing
    messages = outgoing.messages()
    assert not outgoing and [
        [len(m.started), len(m.prompt_logprobs), len(m.texts)] for m in messages
    ] == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]
    runs: list[PromptLogprobs] = [run for message in messages for run in message.prompt_logprobs]
    assert [(run.handle, run.first, run.attempt, run.execution) for run in runs] == [
        (70, 1, 1, X),
        (70, 4, 1, X),
    ]
    assert (
        runs[0].ids == first.ids and runs[0].ranks == first.ranks and runs[0].values == first.values
    )
    own = b"".join(text for run in runs for text in run.texts[::2])
    whole = "世界 hello".encode()
    assert (
        whole.endswith(own)
        and own.decode(errors="ignore").endswith("hello")
        and len(own) >= len(prompt) - 1
    )


def test_prompt_logprobs_of_another_attempt_or_execution_are_dropped(bench: Bench):
    handle = bench.submit(
        Prompt(text="hello"), Sampling(3, 8, prompt_logprobs=1), TextOptions()
    ).handle
    bench.requests.tokens(
        [
            said(
                run_of(handle, 1, [7]),
                run_of(handle, 2, [7], X + 1),
                run_of(handle, 3, [7], attempt=2),
                run_of(9, 4, [7]),
            )
        ]
    )
    deltas: list[Deltas] = bench.requests.outgoing[FRONTEND].messages()
    assert [run.first for message in deltas for run in message.prompt_logprobs] == [1]


@pytest.mark.parametrize(
    "broken",
    [
        {"counts": pack("i", [3])},
        {"ranks": b""},
        {"values": pack("f", [1.0])},
        {"ids": b"abc"},
        {"counts": pack("i", [0])},
    ],
)
def test_damaged_prompt_logprobs_lose_their_stream_alone(bench: Bench, broken):
    handle = bench.submit(
        Prompt(text="hello"), Sampling(3, 8, prompt_logprobs=1), TextOptions()
    ).handle
    bench.requests.tokens([said(run_of(handle, 1, [7], **broken))])
    (message,) = bench.requests.outgoing[FRONTEND].messages()
    assert message.ended[0].finish is Finish.LOST and not len(bench.requests)
