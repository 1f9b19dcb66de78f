"""Streams whose answers are taken apart, message by message: special tokens, cuts into drains, an
attempt after a kill, stop strings, counts."""

import json

import pytest
from msgspec import Struct
from pagewire.requests.answers import ContentDelta, ReasoningDelta, ToolCallDelta, outputs_of
from pagewire.requests.answers import Delta as AnswerDelta
from pagewire.tokenizer.answers.model import ModelAnswers
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import Encoder
from pagewire.tokenizer.requests import Requests
from pagewire.tokenizer.template import ChatTemplate
from pagewire_protocol.messages import (
    Chat,
    ChatMessage,
    Deltas,
    End,
    Finish,
    Generate,
    Prompt,
    Submit,
    pack,
)
from pagewire_protocol.sampling import AnswerOptions, Sampling, TextOptions, ToolChoice
from tokenizer.answer_cases import TOOLS
from tokenizer.test_model_answers import AS_JSON, calls
from tokenizer.test_requests import FRONTEND, roster, step
from tokenizers import AddedToken, Tokenizer

SPECIAL = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|user|>", "<|assistant|>")
TEMPLATE = calls("<tool_call>\n", AS_JSON, "\n</tool_call>").replace(
    "<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}"
)
ANSWER = (
    "Hm, 世界.\n</think>\n\nSure.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "São 🦙"}}\n</tool_call><|im_end|>'
)
EXPECTED = {
    "reasoning": "Hm, 世界.",
    "content": "Sure.",
    "calls": [("get_weather", {"city": "São 🦙"})],
}


class Bench:
    def __init__(self, bpe: Tokenizer, template: str = TEMPLATE) -> None:
        self.tokenizer = Tokenizer.from_str(bpe.to_str())
        self.tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
        compiled = ChatTemplate(template, {})
        answers = ModelAnswers(compiled, self.tokenizer)
        encoder = Encoder(self.tokenizer, compiled, None, answers)
        self.requests = Requests(
            encoder,
            Decoding(self.tokenizer),
            "ipc:///run/t.sock",
            lambda task: None,
            answers=answers,
        )
        self.requests.on_roster(roster(max_model_len=4096), True)

    def generate(self, answer: AnswerOptions | None, attempt: int = 1, **fields: object) -> Submit:
        output = pack("i", fields.pop("output", ()))  # type: ignore[arg-type]
        tools = json.dumps(TOOLS).encode()
        chat = Chat((ChatMessage("user", "hi"),), tools=tools)
        text = TextOptions(answer=answer, **fields)  # type: ignore[arg-type]
        self.requests.generate(
            Generate(
                bytes(16), attempt, 70, FRONTEND, Prompt(chat=chat), output, Sampling(1, 999), text
            )
        )
        (submit,) = self.requests.to_scheduler
        self.requests.to_scheduler = []
        assert isinstance(submit, Submit)
        return submit

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def feed(self, submit: Submit, tokens: list[int], first: int, size: int) -> list[Deltas]:
        """Drains of `size` tokens."""
        messages: list[Deltas] = []
        for at in range(0, len(tokens), size):
            rows = [
                (submit.handle, first + at + i, token)
                for i, token in enumerate(tokens[at : at + size])
            ]
            self.requests.tokens([step(*rows)])
            messages.append(self.requests.outgoing[FRONTEND].take())
        return messages

    def end(self, submit: Submit, finish: Finish = Finish.STOP) -> Deltas:
        self.requests.tokens([step(ended=(End(submit.handle, submit.attempt, finish),))])
        return self.requests.outgoing[FRONTEND].take()


class Answer(Struct):
    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] = []
    ids: list[str] = []

    def add(self, messages: list[Deltas]) -> "Answer":
        for message in messages:
            for output in outputs_of(message) if message.part_rows else message.texts:
                assert not isinstance(output, str) or not output
                for delta in output if isinstance(output, tuple) else ():
                    self._add(delta)
        return self

    def _add(self, delta: AnswerDelta) -> None:
        match delta:
            case ContentDelta(text):
                self.content += text
            case ReasoningDelta(text):
                self.reasoning += text
            case ToolCallDelta(name=name) if name:
                self.calls.append([name, ""])
                self.ids.append(delta.call_id)
            case ToolCallDelta(index, arguments=text):
                self.calls[index][1] += text

    def whole(self) -> dict[str, object]:
        calls = [(name, json.loads(arguments)) for name, arguments in self.calls]
        return {"reasoning": self.reasoning, "content": self.content, "calls": calls}


AUTO = AnswerOptions(ToolChoice.AUTO)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_no_drain_changes_an_answer(bpe: Tokenizer, size: int) -> None:
    bench = Bench(bpe)
    submit = bench.generate(AUTO)
    tokens = bench.ids(ANSWER)
    messages = bench.feed(submit, tokens, 0, size)
    last = bench.end(submit)
    assert Answer().add([*messages, last]).whole() == EXPECTED
    thought = tokens.index(bench.tokenizer.token_to_id("</think>")) + 1
    assert last.ended[0].reasoning_tokens == thought


@pytest.mark.parametrize("killed", range(0, 60, 7))
def test_an_attempt_after_a_kill_goes_on_where_the_first_one_was(
    bpe: Tokenizer, killed: int
) -> None:
    """The successor knows the tokens that the owner has, whose parts were delivered."""
    first = Bench(bpe)
    tokens = first.ids(ANSWER)
    answer = Answer().add(first.feed(first.generate(AUTO), tokens[:killed], 0, 2))
    second = Bench(bpe)
    submit = second.generate(AUTO, 2, output=tokens[:killed])
    answer.add([*second.feed(submit, tokens[killed:], killed, 3), second.end(submit)])
    assert answer.whole() == EXPECTED
    other = Answer().add(Bench.feed(first, first.generate(AUTO, 3), tokens, 0, 50))
    assert answer.ids == other.ids, "an id belongs to the request, not to an attempt"


def test_a_call_that_is_cut_off_is_kept(bpe: Tokenizer) -> None:
    bench = Bench(bpe)
    submit = bench.generate(AUTO)
    tokens = bench.ids(ANSWER[: ANSWER.index("ão")])
    messages = [*bench.feed(submit, tokens, 0, 1), bench.end(submit, Finish.LENGTH)]
    assert Answer().add(messages).calls == [["get_weather", '{"city": "S']]


def test_a_stop_string_ends_the_parts_too(bpe: Tokenizer) -> None:
    bench = Bench(bpe)
    submit = bench.generate(AUTO, stop=("Sur",))
    messages = bench.feed(submit, bench.ids(ANSWER), 0, 1)
    ended = [end for message in messages for end in message.ended]
    assert [(end.finish, end.stop_reason) for end in ended] == [(Finish.STOP, "Sur")]
    assert ended[0].reasoning_tokens
    assert Answer().add(messages).whole() == {"reasoning": "Hm, 世界.", "content": "", "calls": []}


def test_one_call_where_no_more_may_be(bpe: Tokenizer) -> None:
    bench = Bench(bpe)
    submit = bench.generate(AnswerOptions(ToolChoice.AUTO, parallel_tool_calls=False))
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    messages = [*bench.feed(submit, bench.ids(f"x</think>{call}{call}"), 0, 4), bench.end(submit)]
    assert Answer().add(messages).calls == [["now", "{}"]]


def test_without_options_the_text_is_as_it_was(bpe: Tokenizer) -> None:
    bench = Bench(bpe)
    submit = bench.generate(None)
    messages = [*bench.feed(submit, bench.ids(ANSWER), 0, 1), bench.end(submit)]
    assert not any(message.part_rows for message in messages)
    text = "".join(text for message in messages for text in message.texts)
    assert text == ANSWER.replace("<|im_end|>", "").replace("</think>", "").replace(
        "<tool_call>", ""
    ).replace("</tool_call>", "")
