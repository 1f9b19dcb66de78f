"""What becomes of requests, message by message, without sockets."""

import re
from collections.abc import Iterable

import pytest
from msgspec.structs import replace
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import LONG, Encoder
from pagewire.tokenizer.encodings import EncodingTask
from pagewire.tokenizer.grammar_checks import Outcome
from pagewire.tokenizer.requests import Requests, encode
from pagewire.tokenizer.template import ChatTemplate
from pagewire_protocol.grammar import Grammar, GrammarKind
from pagewire_protocol.messages import (
    Cancel,
    Chat,
    ChatMessage,
    Deltas,
    End,
    Finish,
    Generate,
    LogprobColumns,
    Peer,
    Placed,
    Prompt,
    RequestKind,
    Role,
    Roster,
    Submit,
    Tokens,
    pack,
    unpack,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from tokenizers import Tokenizer

FRONTEND, OTHER = "ipc:///run/frontend-a.sock", "ipc:///run/frontend-b.sock"
VOCAB = 500
RID = (1).to_bytes(16, "big")
X = 1 << 43 | 7
"""An execution of epoch 1."""


def roster(
    epoch: int = 1, frontends: Iterable[str] = (FRONTEND, OTHER), max_model_len: int = 64
) -> Roster:
    peers = tuple(Peer(Role.FRONTEND, inbox[-15:], inbox, 5, True) for inbox in frontends)
    return Roster(epoch, peers, max_model_len, VOCAB, (2,), True, True)


class Bench:
    """Requests with a message list on each side."""

    def __init__(self, tokenizer: Tokenizer | None, template: str = "") -> None:
        self.tokenizer = tokenizer
        self.offloaded: list[EncodingTask] = []
        self.encoder = Encoder(tokenizer, ChatTemplate(template, {}) if template else None)
        self.requests = Requests(
            self.encoder,
            Decoding(tokenizer),
            "ipc:///run/tokenizer.sock",
            self.offloaded.append,
            lambda grammar, vocab_size, eos: self.outcomes.get(grammar.source),
            clock=lambda: self.now,
        )
        self.now = 100.0
        self.outcomes: dict[str, Outcome] = {"g": Outcome("")}
        """Of grammars, by source: what is wrong with each."""
        self.requests.on_roster(roster(), True)

    def finish(self, task: EncodingTask) -> None:
        """As a thread does, and then the loop."""
        task.result = encode(self.encoder, task.text)
        while self.requests.encoded(task):
            pass

    def generate(
        self,
        prompt: Prompt | str = "hi",
        rid: int = 1,
        attempt: int = 1,
        handle: int = 70,
        **fields,
    ) -> None:
        if isinstance(prompt, str):
            prompt = Prompt(text=prompt)
        sampling = fields.pop(
            "sampling", Sampling(3, fields.pop("max_tokens", 8), fields.pop("min_tokens", 0))
        )
        options = {
            name: fields.pop(name) for name in list(fields) if name in TextOptions.__struct_fields__
        }
        output = pack("i", fields.pop("output", ()))
        reply_to = fields.pop("reply_to", FRONTEND)
        text = TextOptions(**options)
        self.requests.generate(
            Generate(
                rid.to_bytes(16, "big"),
                attempt,
                handle,
                reply_to,
                prompt,
                output,
                sampling,
                text,
                **fields,
            )
        )

    def sent(self) -> list[Submit | Cancel]:
        sent, self.requests.to_scheduler = self.requests.to_scheduler, []
        return sent

    def submit(self, *args, **fields) -> Submit:
        self.generate(*args, **fields)
        (submit,) = self.sent()
        assert isinstance(submit, Submit)
        return submit

    def outgoing(self, inbox: str = FRONTEND) -> Deltas:
        outgoing = self.requests.outgoing[inbox]
        assert outgoing
        return outgoing.take()

    def end(self, inbox: str = FRONTEND) -> End:
        (end,) = self.outgoing(inbox).ended
        return end

    def ids(self, text: str) -> list[int]:
        assert self.tokenizer
        return self.tokenizer.encode(text).ids


def step(*rows: tuple[int, int, int], execution: int = X, **fields) -> Tokens:
    """Rows are (handle, position, token)."""
    handles, positions, tokens = zip(*rows, strict=True) if rows else ((), (), ())
    ones = [1] * len(rows)
    executions = pack("Q", [execution] * len(rows))
    return Tokens(
        pack("I", handles),
        pack("I", ones),
        executions,
        pack("i", positions),
        pack("i", tokens),
        **fields,
    )


def rows(deltas: Deltas) -> list[tuple[int, int, int, int, list[int], str]]:
    """(handle, attempt, execution, position, tokens, text) of each row."""
    tokens, start, found = unpack("i", deltas.tokens).tolist(), 0, []
    columns = [
        unpack(code, column).tolist()
        for code, column in zip(
            "IIQi",
            (deltas.handles, deltas.attempts, deltas.executions, deltas.positions),
            strict=True,
        )
    ]
    for handle, attempt, execution, position, count, text in zip(
        *columns, unpack("i", deltas.counts), deltas.texts, strict=True
    ):
        found.append((handle, attempt, execution, position, tokens[start : start + count], text))
        start += count
    assert start == len(tokens)
    return found


@pytest.fixture
def bench(bpe: Tokenizer, template_source: str) -> Bench:
    return Bench(bpe, template_source)


# --- prompts
#   ----------------------------------------------------------------------------------------------------------


def test_text_becomes_a_submit(bench: Bench):
    submit = bench.submit("hello 世界", priority=3, cache_salt="s", max_tokens=5)
    assert unpack("i", submit.prompt).tolist() == bench.ids("hello 世界")
    assert (submit.rid, submit.attempt, submit.reply_to) == (
        (1).to_bytes(16, "big"),
        1,
        "ipc:///run/tokenizer.sock",
    )
    assert (submit.priority, submit.cache_salt, submit.sampling, submit.output) == (
        3,
        "s",
        Sampling(3, 5),
        b"",
    )
    assert bench.submit(rid=2).handle != submit.handle


def test_chat_is_rendered(bench: Bench):
    submit = bench.submit(Prompt(chat=Chat((ChatMessage("user", "hey"),))))
    assert unpack("i", submit.prompt).tolist() == bench.ids(
        "<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ids_pass(bench: Bench):
    assert bench.submit(Prompt(ids=pack("i", [5, VOCAB - 1]))).prompt == pack("i", [5, VOCAB - 1])


def test_special_tokens_are_added_to_plain_prompts_only_and_on_request(
    make_gguf, template_source: str
):
    from pagewire.tokenizer.load import load

    bench = Bench(load(make_gguf(tokenizer__ggml__add_bos_token=True)).tokenizer, template_source)
    assert unpack("i", bench.submit("x").prompt)[0] == 1
    assert unpack("i", bench.submit("x", rid=2, add_special_tokens=False).prompt)[0] != 1
    chat = Prompt(chat=Chat((ChatMessage("user", "x"),)))
    assert (
        unpack("i", bench.submit(chat, rid=3).prompt).tolist().count(1) == 2
    )  # the template's own <|im_start|>s


@pytest.mark.parametrize(("most", "expected"), [(64, 4), (3, 3)])
def test_max_tokens_is_what_the_context_leaves(bench: Bench, most: int, expected: int):
    prompt = Prompt(ids=pack("i", [5] * 60))
    submit = bench.submit(prompt, max_tokens=most, max_tokens_is_rest=True)
    assert submit.sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("length", "max_tokens", "rest", "text", "param"),
    [
        (
            60,
            5,
            False,
            "64 tokens. However, you requested 65 tokens (60 in the prompt, 5 for the completion)",
            "max_tokens",
        ),
        (
            64,
            5,
            False,
            "64 tokens. However, you requested 69 tokens (64 in the prompt, 5 for the completion)",
            "prompt",
        ),
        (
            70,
            1,
            True,
            "64 tokens. However, you requested 71 tokens (70 in the prompt, 1 for the completion)",
            "prompt",
        ),
        (0, 5, False, "the prompt is empty", "prompt"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    bench: Bench, length: int, max_tokens: int, rest: bool, text: str, param: str
):
    bench.generate(
        Prompt(ids=pack("i", [5] * length)), max_tokens=max_tokens, max_tokens_is_rest=rest
    )
    end = bench.end()
    assert (end.handle, end.attempt, end.finish, end.status, end.param) == (
        70,
        1,
        Finish.REFUSED,
        400,
        param,
    )
    assert text in end.message and not bench.sent() and not len(bench.requests)


@pytest.mark.parametrize("token", [VOCAB, -1, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_refused(bench: Bench, token: int):
    bench.generate(Prompt(ids=pack("i", [5, token])))
    assert re.search(
        rf"token id {token} is outside the model's vocabulary of {VOCAB} tokens",
        bench.end().message,
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(), "exactly one"),
        (Prompt(text="a", ids=b""), "exactly one"),
        (Prompt(ids=b"abc"), "no multiple of 4"),
        (Prompt(chat=Chat((ChatMessage("user", "x"),), True, True)), "exclude each other"),
    ],
)
def test_malformed_prompts_are_refused(bench: Bench, prompt: Prompt, message: str):
    bench.generate(prompt)
    end = bench.end()
    assert end.status == 400 and message in end.message


def test_no_template(bpe: Tokenizer):
    bench = Bench(bpe)
    bench.generate(Prompt(chat=Chat((ChatMessage("user", "x"),))))
    end = bench.end()
    assert end.status == 400 and "--chat-template" in end.message and end.param == "messages"


def test_the_template_s_own_refusal(bpe: Tokenizer):
    bench = Bench(bpe, "{{ raise_exception('System role not supported') }}")
    bench.generate(Prompt(chat=Chat((ChatMessage("system", "x"),))))
    assert bench.end().message == "System role not supported"


def test_no_worker_yet(bench: Bench):
    bench.requests.on_roster(roster(max_model_len=0), False)
    bench.generate()
    end = bench.end()
    assert end.finish is Finish.REFUSED and end.status == 503 and end.retry_after_s == 1


def test_without_a_tokenizer():
    bench = Bench(None)
    for prompt in (Prompt(text="x"), Prompt(chat=Chat((ChatMessage("user", "x"),)))):
        bench.generate(prompt)
        end = bench.end()
        assert end.status == 400 and "--skip-tokenizer-init" in end.message
    handle = bench.submit(Prompt(ids=pack("i", [5, 6]))).handle
    bench.requests.tokens([step((handle, 0, 499))])
    assert rows(bench.outgoing()) == [(70, 1, X, 0, [499], "")]


# --- tokens
#   -----------------------------------------------------------------------------------------------------------


def test_placed_becomes_started(bench: Bench):
    one, two = (
        bench.submit("hello"),
        bench.submit("hello", rid=2, handle=71, return_prompt_ids=True),
    )
    bench.requests.tokens(
        [step(placed=(Placed(one.handle, 1, 4), Placed(two.handle, 1, 0), Placed(999, 1, 0)))]
    )
    first, second = bench.outgoing().started
    assert (first.handle, first.attempt, first.cached_tokens, first.prompt_ids) == (70, 1, 4, None)
    assert first.prompt_tokens == len(bench.ids("hello")) and second.prompt_ids == two.prompt


def test_rows_go_to_their_owners(bench: Bench):
    a, b = bench.ids("ab")
    one, two = bench.submit().handle, bench.submit(rid=2, handle=71, reply_to=OTHER).handle
    bench.requests.tokens([step((two, 0, b), (one, 0, a), (999, 0, a))])
    assert rows(bench.outgoing()) == [(70, 1, X, 0, [a], "a")]
    assert rows(bench.outgoing(OTHER)) == [(71, 1, X, 0, [b], "b")]
    assert not bench.requests.outgoing[FRONTEND]


def test_several_steps_in_a_drain_become_one_row_a_stream(bench: Bench):
    ids = bench.ids("𐌰世")
    one, two = bench.submit().handle, bench.submit(rid=2, handle=71).handle
    steps = [step((one, n, token), (two, n, ids[0])) for n, token in enumerate(ids)]
    bench.requests.tokens(steps)
    first, second = rows(bench.outgoing())
    assert first == (70, 1, X, 0, ids, "𐌰世")
    assert second[3:5] == (0, [ids[0]] * len(ids))


def test_rows_of_several_tokens_and_of_none(bench: Bench):
    ids = bench.ids("𐌰世界")
    one, two = bench.submit().handle, bench.submit(rid=2, handle=71).handle
    first, rest = ids[:1], ids[1:]
    counts = pack("i", [1, 0, len(rest)])
    row = step((one, 0, first[0]), (two, 0, 0), (one, 1, 0))
    message = replace(row, tokens=pack("i", [*first, *rest]), counts=counts)
    bench.requests.tokens([message])
    assert rows(bench.outgoing()) == [(70, 1, X, 0, ids, "𐌰世界")]


def test_rows_of_several_tokens_beside_rows_of_one(bench: Bench):
    """A drain of two messages, one with counts and one without."""
    ids = bench.ids("世界")
    one, two = bench.submit().handle, bench.submit(rid=2, handle=71).handle
    several = replace(
        step((one, 0, 0), (two, 0, 0)),
        tokens=pack("i", [*ids, ids[0]]),
        counts=pack("i", [len(ids), 1]),
    )
    bench.requests.tokens([several, step((one, len(ids), ids[0]), (two, 1, ids[1]))])
    first, second = rows(bench.outgoing())
    assert first[3:5] == (0, [*ids, ids[0]]) and second[3:5] == (0, ids[:2])


def test_a_gap_inside_a_drain_of_several_tokens_is_seen(bench: Bench):
    handle = bench.submit().handle
    message = replace(step((handle, 1, 0)), tokens=pack("i", [5, 6]), counts=pack("i", [2]))
    replay = replace(step((handle, 0, 0)), tokens=pack("i", [5]), counts=pack("i", [1]))
    bench.requests.tokens([replay])
    bench.requests.tokens([message])
    assert len(bench.requests) == 1
    bench.requests.tokens([replace(message, positions=pack("i", [4]))])
    assert bench.end().finish is Finish.LOST


def test_other_executions_and_repeated_rows_are_dropped_and_gaps_are_lost(bench: Bench):
    (a,) = bench.ids("a")
    handle = bench.submit().handle
    bench.requests.tokens([step((handle, 0, a))])
    assert rows(bench.outgoing())
    bench.requests.tokens([step((handle, 1, a), execution=X + 1), step((handle, 0, a))])
    assert not bench.requests.outgoing[FRONTEND]
    bench.requests.tokens([step((handle, 2, a))])
    end = bench.end()
    assert (end.handle, end.finish) == (70, Finish.LOST) and not len(bench.requests)


def test_damaged_columns_lose_every_stream(bench: Bench):
    handle = bench.submit().handle
    whole = step((handle, 0, 5))
    for broken in (
        Tokens(whole.handles, b"", b"", b"", b""),
        step((handle, 0, VOCAB)),
        step((handle, 0, -1)),
        step((handle, 0, 5), counts=pack("i", [2])),
        step((handle, 0, 5), counts=pack("i", [1, 0])),
        step((handle, 0, 5), counts=pack("i", [-1])),
    ):
        bench.requests.tokens([broken])
        assert bench.end().finish is Finish.LOST
        (cancel,) = bench.sent()
        assert isinstance(cancel, Cancel), "the scheduler is told of what nobody waits for"
        handle = bench.submit().handle


@pytest.mark.parametrize("finish", [Finish.LENGTH, Finish.CANCELLED, Finish.FAILED, Finish.LOST])
def test_ends_are_passed_on_and_unfinished_text_only_with_a_finished_generation(
    bench: Bench, finish: Finish
):
    ids = bench.ids("𐌰")
    handle = bench.submit(stop=("ab",)).handle
    bench.requests.tokens([step((handle, 0, ids[0]), ended=(End(handle, 1, finish, status=7),))])
    deltas = bench.outgoing()
    assert [row[5] for row in rows(deltas)] == ["\ufffd" if finish is Finish.LENGTH else ""]
    assert deltas.ended == (End(70, 1, finish, status=7),) and not len(bench.requests)


def test_held_text_comes_with_an_end_that_comes_alone(bench: Bench):
    (a,) = bench.ids("a")
    handle = bench.submit(stop=("ab",)).handle
    bench.requests.tokens([step((handle, 0, a))])
    assert rows(bench.outgoing())[0][5] == ""
    bench.requests.tokens([step(ended=(End(handle, 1, Finish.LENGTH),))])
    assert rows(bench.outgoing()) == [(70, 1, X, 1, [], "a")]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_counts_and_has_no_text_unless_included(bench: Bench, include: bool):
    a, b = bench.ids("ab")
    handle = bench.submit(include_stop=include).handle
    bench.requests.tokens(
        [step((handle, 0, b)), step((handle, 1, b), ended=(End(handle, 1, Finish.STOP, b),))]
    )
    deltas = bench.outgoing()
    assert rows(deltas) == [(70, 1, X, 0, [b, b], "bb" if include else "b")]
    assert deltas.ended[0].stop_reason == b != a


# --- stop strings
#   -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("include", "text"), [(False, "hello "), (True, "hello ST")])
def test_a_stop_string_ends_the_request_here(bench: Bench, include: bool, text: str):
    ids = bench.ids("hello S") + bench.ids("Top")
    submit = bench.submit(stop=("ST", "never"), include_stop=include)
    seen, ends = "", []
    for position, token in enumerate(ids):
        bench.requests.tokens([step((submit.handle, position, token))])
        if bench.requests.outgoing[FRONTEND]:
            deltas = bench.outgoing()
            seen += "".join(deltas.texts)
            ends += deltas.ended
    assert seen == text
    assert ends == [End(70, 1, Finish.STOP, "ST")]
    assert bench.sent() == [Cancel(((submit.rid, 1),))] and not len(bench.requests)


def test_rows_after_a_stop_string_in_the_same_drain_are_dropped(bench: Bench):
    a, b = bench.ids("ab")
    handle = bench.submit(stop=("b",)).handle
    bench.requests.tokens(
        [
            step((handle, 0, a)),
            step((handle, 1, b)),
            step((handle, 2, a), ended=(End(handle, 1, Finish.LENGTH),)),
        ]
    )
    deltas = bench.outgoing()
    assert rows(deltas) == [(70, 1, X, 0, [a, b], "a")]
    assert deltas.ended == (End(70, 1, Finish.STOP, "b"),)


def test_stop_strings_count_after_min_tokens(bench: Bench):
    a, b = bench.ids("ab")
    handle = bench.submit(stop=("ab",), min_tokens=3).handle
    bench.requests.tokens([step((handle, n, token)) for n, token in enumerate([a, b, a, b, a])])
    assert rows(bench.outgoing())[0][5] == "abab"
    bench.requests.tokens([step((handle, 5, b))])
    deltas = bench.outgoing()
    assert deltas.texts == ("",) and deltas.ended[0].stop_reason == "ab"


# --- attempts
#   ---------------------------------------------------------------------------------------------------------


def test_a_resubmission_continues_where_the_text_stopped(bench: Bench):
    """Whatever the place where the first attempt broke off, the text of both together is the
    same."""
    ids = bench.ids("x 世界 𐌰 😀 almost EN") + bench.ids("D") + bench.ids("never")
    expected = "x 世界 𐌰 😀 almost "
    for broken in range(len(ids)):
        rid = 100 + broken
        first = bench.submit(rid=rid, stop=("END",))
        bench.requests.tokens(
            [step((first.handle, n, token)) for n, token in enumerate(ids[:broken])] or [step()]
        )
        text = "".join(bench.outgoing().texts) if broken else ""
        bench.generate(rid=rid, attempt=2, handle=72, stop=("END",), output=ids[:broken])
        sent = bench.sent()
        if isinstance(sent[-1], Submit):
            bench.requests.tokens(
                [
                    step((sent[-1].handle, n, ids[n]), execution=X + 9)
                    for n in range(broken, len(ids))
                ]
            )
        deltas = bench.outgoing()
        assert text + "".join(deltas.texts) == expected, broken
        assert deltas.ended == (End(72, 2, Finish.STOP, "END"),)
        bench.sent()


def test_attempts_only_grow(bench: Bench):
    first = bench.submit(attempt=2)
    bench.generate(attempt=2)
    bench.generate(attempt=1)
    assert not bench.sent()
    second = bench.submit(attempt=3, handle=75)
    bench.requests.tokens(
        [step((first.handle, 0, 5)), step((second.handle, 0, 5), execution=X + 1)]
    )
    assert [row[:3] for row in rows(bench.outgoing())] == [(75, 3, X + 1)]


@pytest.mark.parametrize("output", [[VOCAB], [-1]])
def test_a_resubmission_with_impossible_tokens_is_refused(bench: Bench, output: list[int]):
    bench.generate(output=output)
    assert bench.end().finish is Finish.REFUSED


def test_a_new_scheduler_starts_over(bench: Bench):
    old, kept = bench.submit(), bench.submit(rid=2, handle=71)
    bench.requests.tokens([step((kept.handle, 0, 5), execution=2 << 43)])
    bench.outgoing()
    assert bench.requests.on_roster(roster(2, ()), True) == set()
    assert bench.end() == End(70, 1, Finish.LOST, message="the scheduler was replaced")
    bench.requests.tokens([step((old.handle, 0, 5))])
    assert not bench.requests.outgoing[FRONTEND] and len(bench.requests) == 1


# --- cancellation
#   -----------------------------------------------------------------------------------------------------


def test_cancel_goes_to_the_scheduler_which_ends_it(bench: Bench):
    submit = bench.submit()
    message = Cancel(((submit.rid, 1),))
    bench.requests.cancel(message)
    assert bench.sent() == [message]
    bench.requests.tokens([step(ended=(End(submit.handle, 1, Finish.CANCELLED),))])
    assert bench.end().finish is Finish.CANCELLED and not len(bench.requests)


def test_long_prompts_are_encoded_elsewhere(bench: Bench):
    bench.requests.on_roster(roster(max_model_len=100_000), False)
    bench.generate("a" * (LONG + 1))
    assert not bench.sent() and len(bench.requests) == 1
    (task,) = bench.offloaded
    bench.finish(task)
    (submit,) = bench.sent()
    assert isinstance(submit, Submit) and len(submit.prompt) > 1000


def test_cancel_while_encoding(bench: Bench):
    bench.generate("a" * (LONG + 1), attempt=2)
    (task,) = bench.offloaded
    bench.requests.cancel(Cancel(((RID, 1),)))
    assert len(bench.requests) == 1, "an older attempt's cancellation does not count"
    bench.requests.cancel(Cancel(((RID, 2),)))
    assert bench.end() == End(70, 2, Finish.CANCELLED)
    bench.sent()
    bench.finish(task)
    assert not bench.sent() and not len(bench.requests)


def test_requests_of_a_frontend_that_is_gone_are_cancelled(bench: Bench):
    gone, stays = bench.submit(), bench.submit(rid=2, reply_to=OTHER)
    bench.generate("a" * (LONG + 1), rid=3)
    assert bench.requests.on_roster(roster(frontends=(OTHER,)), False) == {FRONTEND}
    assert bench.sent() == [Cancel(((gone.rid, 1),))]
    assert len(bench.requests) == 1 and FRONTEND not in bench.requests.outgoing
    bench.requests.tokens([step((gone.handle, 0, 5), (stays.handle, 0, 5))])
    assert len(rows(bench.outgoing(OTHER))) == 1


def test_a_scheduler_that_reads_nothing_refuses(bench: Bench):
    submit = bench.submit()
    bench.requests.not_sent(Cancel(((submit.rid, 1),)))
    bench.requests.not_sent(submit)
    assert bench.end().status == 503 and not len(bench.requests)


# --- log-probabilities
#   ------------------------------------------------------------------------------------------------


def test_logprobs_have_the_row_they_belong_to_and_raw_bytes(bench: Bench):
    ids = bench.ids("世a")
    one, two = bench.submit().handle, bench.submit(rid=2, handle=71).handle

    def columns(row: int, token: int) -> LogprobColumns:
        return LogprobColumns(
            pack("i", [row]),
            pack("i", [2]),
            pack("i", [3]),
            pack("i", [token, 499]),
            pack("f", [-0.5, -1.5]),
        )

    steps = [
        step((one, 0, ids[0]), (two, 0, 5), logprobs=columns(0, ids[0])),
        step((two, 1, 5), (one, 1, ids[1]), logprobs=columns(1, ids[1])),
    ]
    bench.requests.tokens(steps)
    deltas = bench.outgoing()
    first, second = deltas.logprobs
    at = [row[0] for row in rows(deltas)].index(70)
    assert (first.row, first.index, first.rank, first.ids, first.values) == (
        at,
        0,
        3,
        (ids[0], 499),
        (-0.5, -1.5),
    )
    assert (second.row, second.index) == (at, 1)
    whole = "世a".encode()
    assert (
        first.texts[0] + second.texts[0] == whole[: len(first.texts[0] + second.texts[0])]
        and first.texts[1] == b"" != first.texts[0]
    )


def test_logprobs_of_rows_with_several_tokens_go_by_token(bench: Bench):
    ids = bench.ids("世a")
    handle = bench.submit().handle
    count = len(ids)
    each = pack("i", [1] * count)
    columns = LogprobColumns(
        pack("i", range(count)), each, each, pack("i", ids), pack("f", [-0.5] * count)
    )
    message = replace(step((handle, 0, 0)), tokens=pack("i", ids), counts=pack("i", [count]))
    bench.requests.tokens([replace(message, logprobs=columns)])
    entries = bench.outgoing().logprobs
    assert [(entry.row, entry.index, entry.ids) for entry in entries] == [
        (0, index, (token,)) for index, token in enumerate(ids)
    ]


def test_kind_model_adapter_and_grammar_are_carried(bench: Bench):
    submit = bench.submit(
        kind=RequestKind.GENERATE, model="m", adapter="a", grammar=Grammar(GrammarKind.REGEX, "g")
    )
    carried = submit.kind, submit.model, submit.adapter, submit.grammar
    assert carried == (RequestKind.GENERATE, "m", "a", Grammar(GrammarKind.REGEX, "g"))


def test_a_grammar_is_checked_before_anything_is_computed(bench: Bench):
    bad = Grammar(GrammarKind.REGEX, "bad", param="regex")
    bench.generate(grammar=bad)
    bench.generate(grammar=bad, rid=2)
    assert not bench.sent() and len(bench.requests) == 2
    bench.outcomes["bad"] = Outcome("it is none")
    bench.requests.grammar_settled(bad)
    ends = bench.outgoing().ended
    assert [(end.finish, end.status, end.param) for end in ends] == [
        (Finish.REFUSED, 400, "regex")
    ] * 2
    assert "it is none" in ends[0].message and not len(bench.requests)


def test_a_request_that_waits_for_its_grammar_goes_on_or_is_cancelled(bench: Bench):
    slow = Grammar(GrammarKind.REGEX, "slow")
    bench.generate(grammar=slow)
    bench.generate(grammar=slow, rid=2)
    bench.requests.cancel(Cancel((((2).to_bytes(16, "big"), 1),)))
    assert bench.end().finish is Finish.CANCELLED
    bench.outcomes["slow"] = Outcome("")
    bench.requests.grammar_settled(slow)
    submits = [message for message in bench.sent() if isinstance(message, Submit)]
    assert [(submit.rid, submit.grammar) for submit in submits] == [(RID, slow)]


def test_a_prompt_that_fills_the_context_fits_when_no_token_is_wanted(bench: Bench):
    room = bench.requests.roster.max_model_len
    ids = pack("i", [5] * room)
    assert bench.submit(Prompt(ids=ids), max_tokens=0).sampling.max_tokens == 0
    bench.generate(Prompt(ids=ids), rid=2, max_tokens=1)
    end = bench.end()
    assert end.status == 400 and "maximum context length" in end.message


@pytest.mark.parametrize(
    "broken",
    [
        {"rows": pack("i", [1])},
        {"counts": pack("i", [3])},
        {"ranks": b""},
        {"ids": pack("i", [5, 500])},
    ],
)
def test_damaged_logprobs_lose_every_stream(bench: Bench, broken):
    handle = bench.submit().handle
    whole = {
        "rows": pack("i", [0]),
        "counts": pack("i", [2]),
        "ranks": pack("i", [1]),
        "ids": pack("i", [5, 6]),
        "values": pack("f", [-1, -2]),
    }
    bench.requests.tokens([step((handle, 0, 5), logprobs=LogprobColumns(**{**whole, **broken}))])
    assert bench.end().finish is Finish.LOST and not len(bench.requests)


def test_the_time_that_is_left_goes_on_to_the_scheduler(bench: Bench):
    assert bench.submit(rid=1).timeout_ms == 0
    assert bench.submit(rid=2, timeout_ms=400).timeout_ms == 400
    bench.requests.on_roster(roster(max_model_len=100_000), False)
    bench.generate("mum " * 3000, rid=3, timeout_ms=400, max_tokens=1)
    (task,) = bench.offloaded
    bench.now += 0.3
    bench.generate("mum " * 3000, rid=4, timeout_ms=5, max_tokens=1)
    bench.generate("hi", rid=4, attempt=2, timeout_ms=5)
    assert bench.sent().pop().timeout_ms == 5
    bench.now += 0.3
    bench.finish(task)
    assert not bench.sent()
    end = bench.end()
    assert (end.finish, end.status) == (Finish.REFUSED, 504) and "400 ms" in end.message
    assert not bench.requests._deadlines
