"""Where each token begins in a text: of generated tokens, of prompts, of ids."""

import pytest
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import Encoder
from pagewire.tokenizer.gguf_tokenizer import build
from pagewire.tokenizer.queries import answer
from pagewire_protocol.messages import Detokenize, LogprobColumns, Prompt, Tokenize, pack, unpack
from pagewire_protocol.sampling import Sampling
from tokenizer.test_requests import Bench, step
from tokenizers import Tokenizer, processors

ME = "ipc:///run/frontend.sock"
MIXED = "hi 😀👩‍👧 你好世界! e\u0301 é<|im_end|>\n\n  end 😀"
SPM = " the cat sat 世 é😀.<s> the cat"


@pytest.fixture
def spm(make_gguf) -> Tokenizer:
    from pagewire.checkpoint.gguf_metadata import read_metadata

    return build(read_metadata(make_gguf("spm")))


def expected(tokenizer: Tokenizer, ids: list[int], text: str, skip: bool) -> list[int]:
    """By definition: what is shown of the tokens before, as far as `text` begins with it. (In the
    middle of a character the library replaces whole characters before it, too.)"""
    starts = [0]
    for end in range(1, len(ids)):
        before = tokenizer.decode(ids[:end], skip_special_tokens=skip)
        shown = next(n for n in range(len(before), -1, -1) if text.startswith(before[:n]))
        starts.append(max(shown, starts[-1]))
    return starts


def generated(bench: Bench, ids: list[int], **options) -> tuple[str, list[int]]:
    """The text of generated tokens, and the offsets in their log-probabilities."""
    handle = bench.submit(sampling=Sampling(3, len(ids), logprobs=0), **options).handle
    text, offsets = "", []
    for position, token in enumerate(ids):
        one = LogprobColumns(
            *(pack(*c) for c in (("i", [0]), ("i", [1]), ("i", [1]), ("i", [token]), ("f", [-1.0])))
        )
        bench.requests.tokens([step((handle, position, token), logprobs=one)])
        deltas = bench.outgoing()
        text += "".join(deltas.texts)
        offsets += [entry.offset for entry in deltas.logprobs]
    return text, offsets


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_generated_tokens(kind: str, skip: bool, request):
    tokenizer = request.getfixturevalue(kind)
    bench = Bench(tokenizer)
    ids = tokenizer.encode(MIXED if kind == "bpe" else SPM, add_special_tokens=False).ids
    assert len(ids) < 60
    text, offsets = generated(
        bench, ids, prompt=Prompt(ids=pack("i", [5])), skip_special_tokens=skip
    )
    # The prompt may end a word, so that the generated text keeps its first space.
    lead = len(text) - len(tokenizer.decode(ids, skip_special_tokens=skip))
    wanted = expected(tokenizer, ids, text[lead:], skip)
    assert offsets == [start + lead * (i > 0) for i, start in enumerate(wanted)]


def test_generated_tokens_after_an_interruption(bpe: Tokenizer):
    """The tokens so far are decoded again, without being shown."""
    ids = bpe.encode(MIXED).ids
    whole, offsets = generated(Bench(bpe), ids)
    for cut in (1, 4, 7):
        bench = Bench(bpe)
        handle = bench.submit(output=ids[:cut], sampling=Sampling(3, len(ids), logprobs=0)).handle
        one = LogprobColumns(
            pack("i", [0]), pack("i", [1]), pack("i", [1]), pack("i", [ids[cut]]), pack("f", [-1.0])
        )
        bench.requests.tokens([step((handle, cut, ids[cut]), logprobs=one)])
        (entry,) = bench.outgoing().logprobs
        assert entry.offset == offsets[cut] and whole


def test_bytes_of_which_no_character_comes(bpe: Tokenizer):
    """U+FFFD stands for them, before the token that shows that they are none."""
    first = bpe.encode("😀").ids[0]
    ids = [first, *bpe.encode("hi").ids]
    decoding = Decoding(bpe)
    text, offsets = decoding.decode(ids), decoding.offsets(ids)
    assert text == "\ufffdhi" and text[offsets[1] :][:1] == "h" and offsets[0] == 0


def test_text_that_is_held_back_counts(bpe: Tokenizer):
    """A stop string may yet be completed: where a token begins does not wait for that."""
    ids = bpe.encode("hello world").ids
    _, offsets = generated(Bench(bpe), ids, stop=("rl!",))
    assert offsets == expected(bpe, ids, "hello world", True)


@pytest.mark.parametrize("text", [MIXED, "  two", "hello 12 😀", "<|im_start|>user", "e\u0301"])
def test_a_prompt_of_text(bpe: Tokenizer, text: str):
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[
            (token, tokenizer.token_to_id(token)) for token in ("<|endoftext|>", "<|im_end|>")
        ],
    )
    reply = answer(Encoder(tokenizer, None), Tokenize(1, ME, Prompt(text=text), with_offsets=True))
    ids, offsets = (unpack("i", column).tolist() for column in (reply.ids, reply.offsets))
    assert ids == tokenizer.encode(text).ids and reply.first == b"<|endoftext|>"
    # hidden at both ends, and shown where the text itself has such a token
    assert offsets == [0, *expected(bpe, ids[1:-1], text, False), len(text)]


def test_a_prompt_of_text_with_a_prefix_and_a_normalizer(spm: Tokenizer):
    """Sentencepiece puts a space before the text, which the text does not have."""
    text = "the cat sat 世."
    reply = answer(Encoder(spm, None), Tokenize(1, ME, Prompt(text=text), with_offsets=True))
    ids, offsets = (unpack("i", column).tolist() for column in (reply.ids, reply.offsets))
    assert reply.first == b"<s>" and offsets[:2] == [0, 0]
    pieces = [text[a:b] for a, b in zip(offsets[1:], [*offsets[2:], len(text)], strict=True)]
    assert [piece.strip() for piece in pieces[:3]] == ["the", "cat", "sat"]
    assert "".join(pieces) == text and len(ids) == len(offsets)


def test_ids(bpe: Tokenizer):
    ids = bpe.encode(MIXED).ids
    for skip in (True, False):
        question = Detokenize(1, ME, pack("i", ids), skip, with_offsets=True)
        reply = answer(Encoder(bpe, None), question)
        assert unpack("i", reply.offsets).tolist() == expected(bpe, ids, reply.text, skip)
        assert reply.first == b"h" or MIXED.encode().startswith(reply.first)
    assert not answer(Encoder(bpe, None), Detokenize(1, ME, pack("i", ids))).offsets
