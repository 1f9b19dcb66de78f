"""Log-probabilities over HTTP agree with themselves whichever way they are asked for, on the real
model."""

import codecs
import functools
from typing import Any

import pytest

PROMPT = "The capital of France is"
NEAR = 0.1
"""bfloat16 rounds otherwise in a batch of another shape."""


@pytest.fixture(scope="module")
def complete(demo_stack: Any) -> Any:
    client = demo_stack.client()
    return functools.partial(client.completions.create, model=client.models.list().data[0].id)


@pytest.fixture(scope="module")
def said(complete: Any) -> dict[str, Any]:
    """Eight greedy tokens with their log-probabilities."""
    answer = complete(
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        logprobs=3,
        extra_body={"return_token_ids": True},
    )
    return answer.choices[0].model_dump()


def test_a_scored_prompt_is_worth_what_it_was_when_it_was_generated(
    complete: Any, said: dict[str, Any]
) -> None:
    ids = said["prompt_token_ids"] + said["token_ids"]
    extra = {"prompt_logprobs": 2}
    scored = (
        complete(prompt=ids, max_tokens=0, echo=True, logprobs=3, extra_body=extra)
        .choices[0]
        .model_dump()
    )
    assert scored["text"] == PROMPT + said["text"]
    shown, count = scored["logprobs"], len(said["token_ids"])
    assert shown["token_logprobs"][0] is None and len(shown["token_logprobs"]) == len(ids)
    assert shown["token_logprobs"][-count:] == pytest.approx(
        said["logprobs"]["token_logprobs"], abs=NEAR
    )
    assert shown["tokens"][-count:] == said["logprobs"]["tokens"]
    for mine, theirs in zip(
        shown["top_logprobs"][-count:], said["logprobs"]["top_logprobs"], strict=True
    ):
        assert max(mine.values()) == pytest.approx(max(theirs.values()), abs=NEAR)
    rows = scored["prompt_logprobs"][-count:]
    assert all(
        row[str(token)]["rank"] <= 2 for row, token in zip(rows, said["token_ids"], strict=True)
    )
    assert [
        row[str(token)]["decoded_token"] for row, token in zip(rows, said["token_ids"], strict=True)
    ] == said["logprobs"]["tokens"]


def test_the_best_of_several_is_the_likeliest(complete: Any) -> None:
    extra = {"return_token_ids": True}
    options = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 0, "seed": 5, "extra_body": extra}
    every = complete(n=4, **options).choices
    best = complete(n=2, best_of=4, **options).choices
    ranked = sorted(every, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]


def test_beams_are_no_worse_than_greedy(complete: Any, said: dict[str, Any]) -> None:
    extra = {"use_beam_search": True, "ignore_eos": True}
    options = {
        "prompt": PROMPT,
        "max_tokens": 8,
        "logprobs": 0,
        "temperature": 0,
        "extra_body": extra,
    }
    best = complete(n=2, best_of=4, **options).choices
    sums = [sum(choice.logprobs.token_logprobs) for choice in best]
    assert sums[0] >= sums[1] and sums[0] >= sum(said["logprobs"]["token_logprobs"]) - NEAR
    assert best[0].text != best[1].text and "".join(best[0].logprobs.tokens) == best[0].text


def test_forbidden_and_allowed_tokens(complete: Any, said: dict[str, Any]) -> None:
    first = said["token_ids"][0]
    greedy = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    extra = {"return_token_ids": True}
    biased = (
        complete(**greedy, logit_bias={str(first): -100}, extra_body=extra).choices[0].model_dump()
    )
    assert first not in biased["token_ids"]
    allowed = [first, said["token_ids"][1]]
    only = (
        complete(**greedy, extra_body={**extra, "allowed_token_ids": allowed})
        .choices[0]
        .model_dump()
    )
    assert set(only["token_ids"]) <= set(allowed)
    word = said["logprobs"]["tokens"][0].strip()
    worded = complete(**greedy, extra_body={**extra, "bad_words": [word]}).choices[0].model_dump()
    assert word not in worded["text"]


def pieces(logprobs: dict[str, Any], text: str) -> list[str]:
    """The part of the text that each token begins, up to where the next one does."""
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(text)
    return [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)]


SCRIPTS = "<|im_start|>user\nHi 😀👍, 你好世界! Ünï<|im_end|>\n"


@pytest.mark.parametrize("ids_as_text", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_are_places_in_the_returned_text(
    complete: Any, stream: bool, ids_as_text: bool
) -> None:
    """Characters in pieces, special tokens, and the generated text behind the prompt."""
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": ids_as_text}
    answer = complete(
        prompt=SCRIPTS,
        max_tokens=6,
        temperature=0,
        echo=True,
        logprobs=0,
        stream=stream,
        extra_body=extra,
    )
    chunks = list(answer) if stream else [answer]
    choices = [chunk.choices[0].model_dump() for chunk in chunks]
    text = "".join(choice["text"] for choice in choices)
    logprobs = {
        name: [
            value for choice in choices if choice["logprobs"] for value in choice["logprobs"][name]
        ]
        for name in ("text_offset", "tokens", "token_logprobs")
    }
    assert text.startswith(SCRIPTS) and "".join(pieces(logprobs, text)) == text
    if ids_as_text:
        assert all(name.startswith("token_id:") for name in logprobs["tokens"])
        return
    parts = [name.startswith("bytes:") for name in logprobs["tokens"]]
    assert sum(parts) >= 4
    for name, part, piece in zip(logprobs["tokens"], parts, pieces(logprobs, text), strict=True):
        # a part of a character begins where the character does; the last part has it
        hidden = "" if name.startswith("<|") else name
        assert piece in (name, hidden) if not part else len(piece) <= 1, (name, piece)


def starts_of(names: list[str], shown_special: bool) -> tuple[list[int], str]:
    """Where tokens of these names begin by definition, and their text: behind the characters of the
    tokens before, of which an unfinished one counts when the next token does not go on with it."""
    whole, starts = b"", []
    for name in names:
        raw = name.encode()
        if name.startswith("bytes:"):
            raw = bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
        elif name.startswith("<|") and not shown_special:
            raw = b""
        goes_on = not raw or raw[0] & 0xC0 == 0x80
        before = codecs.utf_8_decode(whole, "replace", not goes_on)[0]
        starts.append(len(before))
        whole += raw
    return starts, whole.decode("utf-8", "replace")


PIECES = "😀👍 你好世é<|im_start|> ab"


@pytest.fixture(scope="module")
def ids_of(complete: Any) -> Any:
    """The token ids of a text."""

    @functools.cache
    def ids(text: str) -> list[int]:
        answer = complete(prompt=text, max_tokens=1, extra_body={"return_token_ids": True})
        return answer.choices[0].model_dump()["prompt_token_ids"]

    return ids


@pytest.mark.parametrize(
    ("skip_special_tokens", "stop"), [(True, []), (False, ["世"]), (True, ["ab", " a"])]
)
@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_of_choices_of_random_pieces(
    complete: Any, ids_of: Any, stream: bool, skip_special_tokens: bool, stop: list[str]
) -> None:
    """Two choices at a time, of characters in pieces that mostly do not fit each other, behind an
    echoed prompt of ids."""
    prompt = ids_of("<|im_start|>é 你")
    answer = complete(
        prompt=prompt,
        echo=True,
        n=2,
        max_tokens=16,
        temperature=2,
        seed=11,
        logprobs=0,
        stop=stop,
        stream=stream,
        extra_body={
            "allowed_token_ids": sorted(set(ids_of(PIECES))),
            "skip_special_tokens": skip_special_tokens,
            "ignore_eos": True,
        },
    )
    chunks = list(answer) if stream else [answer]
    for index in range(2):
        choices = [one for chunk in chunks for one in chunk.choices if one.index == index]
        text = "".join(one.text for one in choices)
        shown = [one.logprobs for one in choices if one.logprobs]
        names = [name for one in shown for name in one.tokens]
        offsets = [at for one in shown for at in one.text_offset]
        assert len(names) == len(offsets) > len(prompt)
        echoed, echo = starts_of(names[: len(prompt)], True)
        starts, generated = starts_of(names[len(prompt) :], not skip_special_tokens)
        assert text.startswith(echo) and (echo + generated).startswith(text)
        assert offsets[: len(prompt)] == echoed
        wanted = [min(len(echo) + at, len(text)) for at in starts]
        assert offsets[len(prompt) :] == wanted, (names, text)
