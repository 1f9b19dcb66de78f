"""Tokenizers built from GGUF metadata."""

import sys
from pathlib import Path

import gguf
import pytest
from pagewire.checkpoint.gguf_metadata import BadGguf, read_metadata
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.gguf_tokenizer import SPLITS, UnsupportedTokenizer, build, named_tokens
from pagewire.tokenizer.load import NoTokenizer, load
from tokenizer.conftest import spm_fields
from tokenizers import Tokenizer


def test_metadata_equals_the_gguf_package_s(make_gguf):
    path = make_gguf()
    found = read_metadata(path)
    fields = {
        key: field.contents()
        for key, field in gguf.GGUFReader(path).fields.items()
        if not key.startswith("GGUF.")
    }
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in found.items()
    } == fields


def test_not_a_gguf_file(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(BadGguf, match=r"model\.gguf is not a GGUF file"):
        read_metadata(path)
    path.write_bytes(b"")
    with pytest.raises(BadGguf):
        read_metadata(path)


def test_a_cut_file_is_refused(make_gguf, tmp_path: Path):
    whole = make_gguf().read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (5, 24, 60, 400, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(BadGguf):
            read_metadata(path)


def test_it_encodes_as_the_tokenizer_it_was_made_from(make_gguf, bpe: Tokenizer, texts: list[str]):
    built = build(read_metadata(make_gguf()))
    for text in texts:
        assert built.encode(text).ids == bpe.encode(text).ids
        assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", SPLITS)
def test_round_trip_with_each_pre_tokenizer(make_gguf, texts: list[str], pre: str):
    built = build(read_metadata(make_gguf(tokenizer__ggml__pre=pre)))
    for text in texts:
        if "e\u0301" not in text:  # qwen2 composes characters before anything else
            assert (
                built.decode(
                    built.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
                )
                == text
            )


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", " 2024", "!", "\n\n ", " ok"]),
        ("smollm", ["It", "'s", " ", "2", "0", "2", "4", "!", "\n\n ", " ok"]),
        ("llama-bpe", ["It", "'s", " ", "202", "4", "!\n\n", " ", " ok"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "4", "!\n\n", " ", " ok"]),
        ("gpt-4o", ["It's", " ", "202", "4", "!\n\n", " ", " ok"]),
        ("deepseek-llm", ["It", "'", "s", " ", "2", "0", "2", "4", "!", "\n", "\n", " ", " ok"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(make_gguf, pre: str, expected: list[str]):
    built = build(read_metadata(make_gguf(tokenizer__ggml__pre=pre)))
    text = "It's 2024!\n\n  ok"
    pieces = [text[start:end] for _, (start, end) in built.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(pieces) == text
    assert pieces == expected


def test_bos_first_when_the_file_says_so(make_gguf):
    assert build(read_metadata(make_gguf())).encode("hi").ids[0] != 1
    assert (
        build(read_metadata(make_gguf(tokenizer__ggml__add_bos_token=True))).encode("hi").ids[0]
        == 1
    )
    llama3 = build(read_metadata(make_gguf(tokenizer__ggml__pre="llama-bpe")))
    assert llama3.encode("hi").ids[0] == 1
    assert llama3.encode("hi", add_special_tokens=False).ids[0] != 1
    both = build(
        read_metadata(
            make_gguf(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True)
        )
    )
    assert both.encode("hi").ids[:: len(both.encode("hi").ids) - 1] == [1, 2]


def test_special_tokens_in_text_are_one_token(make_gguf):
    assert build(read_metadata(make_gguf())).encode("<|im_start|><|im_end|>").ids == [1, 2]


def test_sentencepiece(make_gguf):
    built = build(read_metadata(make_gguf("spm")))
    assert built.encode("the cat sat").tokens == ["<s>", "▁the", "▁cat", "▁sat"]
    assert built.encode("世é").tokens == ["<s>", "▁", "世", "<0xC3>", "<0xA9>"]
    for text in ("the cat sat", "hello  world", "世界 é😀", " x", "a\nb\tc"):
        assert built.decode(built.encode(text).ids) == text
        assert Decoding(built).decode(built.encode(text).ids) == text
    bare = build(
        read_metadata(
            make_gguf(
                "spm", tokenizer__ggml__add_space_prefix=False, tokenizer__ggml__add_bos_token=False
            )
        )
    )
    assert bare.encode("the").tokens == ["t", "he"]
    assert bare.decode(bare.encode(" the cat").ids) == " the cat"


def test_words_of_gpt_4o_end_before_capitals(make_gguf):
    built = build(read_metadata(make_gguf(tokenizer__ggml__pre="gpt-4o")))
    text = "camelCase HTTPServer path//\n"
    pieces = [text[start:end] for _, (start, end) in built.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == ["camel", "Case", " HTTPServer", " path", "//\n"]


TURN = ["<start_of_turn>", "<end_of_turn>", "  ", "\n\n"]
"""Of Gemma, whose runs of spaces and ends of lines are tokens of their own."""


def with_tokens(tokens: list[str], kinds: list[int], **changes) -> dict:
    fields = {**spm_fields(), **changes}
    count = len(tokens)
    return fields | {
        "tokenizer.ggml.tokens": [*fields["tokenizer.ggml.tokens"], *tokens],
        "tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], *kinds],
        "tokenizer.ggml.scores": [*fields["tokenizer.ggml.scores"], *[-1000.0] * count],
    }


def test_no_space_comes_before_a_turn_of_gemma():
    built = build(with_tokens(TURN, [3, 3, 4, 4], **{"tokenizer.ggml.add_space_prefix": False}))
    text = "<start_of_turn>the\n\nthe   cat<end_of_turn>\n"
    encoded = built.encode(text, add_special_tokens=False)
    turn = ["<start_of_turn>", "t", "he", "\n\n", "t", "he", "  ", "▁cat", "<end_of_turn>"]
    assert encoded.tokens == [*turn, "<0x0A>"]
    assert built.decode(encoded.ids, skip_special_tokens=False) == text
    assert Decoding(built).decode(encoded.ids, skip_special=False) == text


@pytest.mark.parametrize(
    "naming", [{"general.architecture": "phi3"}, {"general.name": "Phi-3-mini-4k-instruct"}]
)
def test_tokens_of_phi_3_take_the_space_after_them(naming):
    """As in its tokenizer.json (rstrip), which files leave out."""
    tokens, kinds = ["<|user|>", "<|end|>", "<|endoftext|>"], [3, 3, 3]
    text = "<|user|>\nthe cat<|end|>\n"
    built = build(with_tokens(tokens, kinds, **naming))
    found = [built.id_to_token(token) for token in built.encode(text).ids]
    assert found == ["<s>", "<|user|>", "▁the", "▁cat", "<|end|>"]
    between_texts = built.encode("<|endoftext|> the", add_special_tokens=False)
    assert between_texts.tokens == ["<|endoftext|>", "▁", "▁the"]
    other = build(with_tokens(tokens, kinds))
    assert "<0x0A>" in other.encode(text).tokens


def test_sentencepiece_agrees_with_its_own_library(tmp_path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(
        "the cat sat on the mat with the hat\nhello world, the world says hello\n" * 50
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=340, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    size = reference.vocab_size()
    kinds = [
        2
        if reference.is_unknown(i)
        else 3
        if reference.is_control(i)
        else 6
        if reference.is_byte(i)
        else 1
        for i in range(size)
    ]
    built = build(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in range(size)],
            "tokenizer.ggml.scores": [reference.get_score(i) for i in range(size)],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.unknown_token_id": reference.unk_id(),
        }
    )
    for text in (
        "the cat sat on the hat",
        "hello world, says the mat",
        "thethe hhello wworld",
        "x é 世界",
    ):
        assert built.encode(text, add_special_tokens=False).ids == reference.encode(text)


def test_what_is_not_supported_is_named(make_gguf):
    with pytest.raises(UnsupportedTokenizer, match="'bert' is not supported"):
        build(read_metadata(make_gguf(tokenizer__ggml__model="bert")))
    with pytest.raises(UnsupportedTokenizer, match=r"'tekken' is not supported.*smollm"):
        build(read_metadata(make_gguf(tokenizer__ggml__pre="tekken")))
    with pytest.raises(NoTokenizer, match="--skip-tokenizer-init"):
        load(make_gguf(tokenizer__ggml__model=None))


def test_demo_model(demo_gguf: Path, texts: list[str]):
    metadata = read_metadata(demo_gguf)
    built = build(metadata)
    assert named_tokens(metadata)["eos_token"] == "<|im_end|>"
    assert built.encode("Hello world 42").ids == [19556, 905, 216, 36, 34]
    decoding = Decoding(built)
    for text in texts:
        ids = built.encode(text).ids
        assert built.decode(ids, skip_special_tokens=False) == text
        assert decoding.decode(ids, skip_special=False) == text


def test_no_torch():
    import subprocess

    code = "import sys, pagewire.tokenizer.service; assert not {'torch', 'transformers', 'aiohttp'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_tokens_that_end_a_turn_are_special_whatever_the_file_calls_them(make_gguf, bpe):
    """Converters have made ordinary tokens of them."""
    ordinary = [1] * bpe.get_vocab_size()
    built = build(read_metadata(make_gguf(tokenizer__ggml__token_type=ordinary)))
    text = "hello<|im_end|>"
    assert built.encode(text).ids == bpe.encode(text).ids
    assert built.decode(built.encode(text).ids) == "hello"


def test_the_first_part_of_a_split_model_has_the_tokenizer(make_gguf, tmp_path: Path):
    whole = make_gguf().read_bytes()
    for n in (1, 2):
        (tmp_path / f"m-0000{n}-of-00002.gguf").write_bytes(whole if n == 1 else b"GGUF")
    (tmp_path / "mmproj.gguf").write_bytes(b"")
    for path in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        assert load(path).names["eos_token"] == "<|im_end|>"
