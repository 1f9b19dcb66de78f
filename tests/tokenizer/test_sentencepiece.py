"""Tokenizers from sentencepiece models (Llama, Baichuan, ChatGLM2 and 3) against the sentencepiece
package; the models are trained here."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from pagewire.tokenizer import sentencepiece_model, sentencepiece_tokenizer
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.load import NoTokenizer, load

DOCS = Path(__file__).parents[2] / "docs"
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
KINDS = {
    "llama": {**LLAMA, "split_digits": True, "allow_whitespace_only_pieces": True},
    "no prefix": {
        **LLAMA,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<reserved_1>", "▁▁"],
    },
    "without bytes": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "normalized": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "nmt_nfkc",
    },
}
ALPHABET = "aaabbc the  \n\r\t's'LL é世界你好。😀ſK1234ﬁ"


@pytest.fixture(scope="module")
def corpus(texts: list[str]) -> list[str]:
    pages = [*texts, *[page.read_text() for page in sorted(DOCS.glob("*.md"))]]
    return [line for page in pages for line in page.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def train(corpus, tmp_path_factory):
    """train(kind) -> the path of a model of that kind."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
            options = {
                "vocab_size": 1500,
                "character_coverage": 0.98,
                "minloglevel": 2,
                "num_threads": 2,
                **KINDS[kind],
            }
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus), model_prefix=str(prefix), **options
            )
            made[kind] = prefix.with_suffix(".model")
        return made[kind]

    return make


@pytest.fixture(scope="module")
def samples(corpus) -> list[str]:
    generator = random.Random(5)
    made = ["".join(generator.choices(ALPHABET, k=generator.randrange(50))) for _ in range(1500)]
    return ["", " ", "  two ", *[line for line in corpus if "<s>" not in line][:400], *made]


@pytest.fixture
def directory(tmp_path, train):
    """directory(**files): a directory with the Llama-like model and the named JSON files."""

    def make(kind: str = "llama", **files: dict) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(train(kind).read_bytes())
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_as_sentencepiece(kind, train, samples):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(train(kind)))
    tokenizer = sentencepiece_tokenizer.build(sentencepiece_model.read(train(kind)))
    for text in samples:
        wanted = oracle.encode(text)
        assert tokenizer.encode(text).ids == wanted, text
        if oracle.unk_id() not in wanted:
            assert tokenizer.decode(wanted) == oracle.decode(wanted)


def test_token_by_token_as_all_at_once(train, samples):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(train("llama")))
    decoding = Decoding(sentencepiece_tokenizer.build(sentencepiece_model.read(train("llama"))))
    assert decoding.is_tabled
    for text in samples[:300]:
        assert decoding.decode(oracle.encode(text)) == text


def test_llama_puts_bos_first_unless_told_otherwise(directory, train):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(train("llama")))
    wanted = oracle.encode("hello world")
    path = directory(config={"model_type": "llama"})
    loaded = load(path)
    assert loaded.tokenizer.encode("hello world").ids == [1, *wanted]
    assert loaded.names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    directory(
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": True,
        }
    )
    assert load(path).tokenizer.encode("hello world").ids == [*wanted, 2]


def test_tokens_that_the_repository_adds(directory):
    added = {
        "1": {"content": "<s>", "special": True},
        "1500": {"content": "<pad>", "special": True},
        "1501": {"content": "<tool>"},
    }
    loaded = load(directory(tokenizer_config={"added_tokens_decoder": added, "pad_token": "<pad>"}))
    assert [loaded.tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "<tool>")] == [
        1,
        1500,
        1501,
    ]
    assert loaded.tokenizer.encode("a<tool>b<pad>", add_special_tokens=False).tokens[1:] == [
        "<tool>",
        "▁b",
        "<pad>",
    ]
    assert loaded.names["pad_token"] == "<pad>"


def test_tokens_of_added_tokens_json_behind_a_gap(directory):
    path = directory(tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    (path / "added_tokens.json").write_text('{"<|im_end|>": 1507, "<|im_start|>": 1503}')
    tokenizer = load(path).tokenizer
    ids = tokenizer.encode("<|im_start|>the<|im_end|>", add_special_tokens=False).ids
    assert (ids[0], ids[-1]) == (1503, 1507)


def test_only_the_first_part_gets_a_space_where_the_newer_rule_is_asked_for(directory):
    path = directory(tokenizer_config={"tokenizer_class": "LlamaTokenizer", "legacy": False})
    assert load(path).tokenizer.encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "a"]
    directory(tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    assert load(path).tokenizer.encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "▁a"]
    directory(tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False})
    assert load(path).tokenizer.encode("a</s>a").tokens == ["<s>", "a", "</s>", "a"]


def test_chatglm_has_tokens_after_the_pieces_and_a_prefix(directory, train, samples):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(train("llama")))
    size = oracle.get_piece_size()
    template = "{% for m in messages %}{% if loop.first %}[gMASK]sop<|{{ m.role }}|>{% endif %}{% endfor %}"
    loaded = load(
        directory(
            tokenizer_config={"tokenizer_class": "ChatGLMTokenizer", "chat_template": template}
        )
    )
    tokenizer = loaded.tokenizer
    for text in [*samples[:300], "philosophy of sop and eop"]:
        assert tokenizer.encode(text).ids == [size + 1, size + 3, *oracle.encode(text)]
    parts = "[gMASK]<sop><|user|>\n hello<|assistant|>"
    assert tokenizer.encode(parts, add_special_tokens=False).ids == [
        size + 1,
        size + 3,
        size + 6,
        *oracle.encode("\n hello"),
        size + 7,
    ]
    assert "[gMASK]<sop><|{{" in loaded.chat_template, (
        "the template's `sop` is the token's name here"
    )


def test_baichuan_has_a_token_for_each_role(directory, train):
    """The pieces that begin a message are ordinary ones by the model; in a conversation they are
    tokens."""
    files = {
        "config": {"model_type": "baichuan"},
        "generation_config": {"user_token_id": 300, "assistant_token_id": 301},
    }
    loaded = load(
        directory(
            **files,
            tokenizer_config={"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False},
        )
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(train("llama")))
    assert [loaded.names[name] for name in ("user_token", "assistant_token")] == [
        oracle.id_to_piece(300),
        oracle.id_to_piece(301),
    ]
    text = loaded.names["user_token"] + "hello" + loaded.names["assistant_token"]
    assert loaded.tokenizer.encode(text).ids == [300, *oracle.encode("hello"), 301]


def test_a_truncated_model_is_named(directory):
    """Wherever it is cut: between two fields too, where what is left looks whole."""
    path = directory()
    whole = (path / "tokenizer.model").read_bytes()
    for length in (0, *range(7, 120), len(whole) // 2):
        (path / "tokenizer.model").write_bytes(whole[:length])
        with pytest.raises(
            NoTokenizer, match=r"tokenizer\.model is not a sentencepiece model, or damaged"
        ):
            load(path)


def test_other_kinds_of_model_are_refused(train):
    import dataclasses

    model = sentencepiece_model.read(train("llama"))
    with pytest.raises(
        sentencepiece_tokenizer.UnsupportedModel, match="type word is not supported"
    ):
        sentencepiece_tokenizer.build(dataclasses.replace(model, model_type=3))
    clash = [(sentencepiece_tokenizer.AddedToken("<s>", special=True), 1700)]
    with pytest.raises(sentencepiece_tokenizer.UnsupportedModel, match="'<s>' should have id 1700"):
        sentencepiece_tokenizer.build(dataclasses.replace(model, model_type=1, unk=0), clash)
