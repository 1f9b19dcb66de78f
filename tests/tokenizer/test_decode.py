"""Incremental decoding: the deltas joined are the whole text, and no delta breaks a character."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire.checkpoint.gguf_metadata import read_metadata
from pagewire.tokenizer.decode import Decoding, TableDecoder, WindowDecoder
from pagewire.tokenizer.gguf_tokenizer import build
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


@pytest.fixture(scope="module")
def byte_level(bpe: Tokenizer) -> Decoding:
    return Decoding(bpe)


@pytest.fixture(scope="module")
def spm(make_gguf) -> Tokenizer:
    return build(read_metadata(make_gguf("spm")))


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "un", "##able", "."]
    tokenizer = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[1:3]])
    return tokenizer


def deltas(decoding: Decoding, ids: list[int], **options: bool) -> list[str]:
    decoder = decoding.start(**options)
    return [*(decoder.step(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_decode_as_the_library_decodes_them(
    byte_level: Decoding, bpe: Tokenizer, skip: bool
):
    @settings(max_examples=500, deadline=None)
    @given(st.lists(st.integers(0, bpe.get_vocab_size() - 1), max_size=40))
    def check(ids: list[int]) -> None:
        assert "".join(deltas(byte_level, ids, skip_special=skip)) == bpe.decode(
            ids, skip_special_tokens=skip
        )

    check()


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_whole_and_in_whole_characters(
    byte_level: Decoding, bpe: Tokenizer, text: str
):
    found = deltas(byte_level, bpe.encode(text).ids, skip_special=False)
    assert "".join(found) == text
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in found)


def test_a_character_is_held_until_it_is_whole(byte_level: Decoding, bpe: Tokenizer):
    ids = bpe.encode("𐌰").ids
    assert len(ids) == 4
    assert deltas(byte_level, ids) == ["", "", "", "𐌰", ""]
    assert deltas(byte_level, ids[:3]) == ["", "", "", "\ufffd"]
    assert "".join(deltas(byte_level, [*ids[:2], bpe.token_to_id("a")])) == "\ufffda"


def test_the_table_agrees_with_step(byte_level: Decoding, bpe: Tokenizer, texts: list[str]):
    for text in texts:
        fast, slow = byte_level.start(), byte_level.start()
        for token in bpe.encode(text).ids:
            known = fast.texts[token] if fast.can_look_up else None
            assert (fast.step(token) if known is None else known) == slow.step(token)
            assert fast.can_look_up == slow.can_look_up


def test_special_tokens_are_left_out_unless_asked_for(byte_level: Decoding, bpe: Tokenizer):
    ids = bpe.encode("<|im_start|>a<|im_end|>").ids
    assert "".join(deltas(byte_level, ids)) == "a"
    assert "".join(deltas(byte_level, ids, skip_special=False)) == "<|im_start|>a<|im_end|>"
    assert deltas(byte_level, ids, silent=True) == [""] * 4


def test_padding_rows_of_a_model_have_no_text(bpe: Tokenizer):
    decoding = Decoding(bpe)
    decoding.grow(1000)
    assert deltas(decoding, [999]) == ["", ""]
    assert decoding.bytes_of(np.array([999, bpe.token_to_id("ä"), 1], np.int32)) == (
        b"",
        b"\xe4",
        b"<|im_start|>",
    )
    for outside in (1000, -1):
        with pytest.raises(ValueError, match="vocabulary of 1000"):
            decoding.bytes_of(np.array([5, outside], np.int32))


def test_sentencepiece_text_comes_back(spm: Tokenizer):
    decoding = Decoding(spm)
    assert decoding.is_tabled
    rng = random.Random(5)
    for _ in range(300):
        text = "".join(
            rng.choice(["the cat", " ", "世", "é", "😀", "hello", "\n", "z"])
            for _ in range(rng.randrange(12))
        )
        ids = spm.encode(text).ids
        assert decoding.decode(ids) == spm.decode(ids) == text
        assert "".join(deltas(decoding, ids, at_start=True)) == text


def test_sentencepiece_space_belongs_to_the_text_unless_nothing_was_said_before(spm: Tokenizer):
    decoding = Decoding(spm)
    ids = spm.encode("the cat", add_special_tokens=False).ids
    assert "".join(deltas(decoding, ids)) == " the cat"
    assert "".join(deltas(decoding, ids, at_start=True)) == "the cat"
    assert decoding.begins_text([1]) and not decoding.begins_text([1, *ids])


def test_byte_fallback_is_held_until_whole(spm: Tokenizer):
    decoding = Decoding(spm)
    ids = spm.encode("é", add_special_tokens=False).ids[1:]
    assert deltas(decoding, ids) == ["", "é", ""]
    assert deltas(decoding, ids[:1]) == ["", "\ufffd"]


def test_metaspace(bpe: Tokenizer):
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -1.0), ("s", -1.0)], unk_id=0)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    decoding = Decoding(tokenizer)
    assert decoding.is_tabled
    assert decoding.decode([1, 2, 3]) == tokenizer.decode([1, 2, 3]) == "the cats"


def test_decoders_that_look_at_neighbours_use_a_window(wordpiece: Tokenizer):
    decoding = Decoding(wordpiece)
    assert not decoding.is_tabled and isinstance(decoding.start(), WindowDecoder)
    assert isinstance(decoding.start(silent=True), TableDecoder)
    rng = random.Random(3)
    text = "the cats sat unable. the cat sat"
    for ids in [
        wordpiece.encode(text).ids,
        *[[rng.randrange(3, 10) for _ in range(8)] for _ in range(20)],
    ]:
        if not wordpiece.id_to_token(ids[0]).startswith("##"):
            joined = "".join(deltas(decoding, ids))
            assert joined.replace(" .", ".") == wordpiece.decode(ids).replace(" .", ".")


def test_spaces_between_special_tokens(wordpiece: Tokenizer):
    decoding = Decoding(wordpiece)
    assert "".join(deltas(decoding, [1, 2, 3], skip_special=False)) == "[CLS] [SEP] the"
    assert (
        "".join(deltas(decoding, [1, 2, 3], skip_special=False, spaces_between_special=False))
        == "[CLS][SEP] the"
    )
