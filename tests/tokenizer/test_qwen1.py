"""Tokenizers from files of ranks (Qwen-1, GLM-4) against the tiktoken package with the same ranks
and pattern."""

import base64
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from pagewire.tokenizer.load import NoTokenizer, load
from pagewire.tokenizer.merges import merges_of
from pagewire.tokenizer.token_bytes import BYTE_OF
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
QWEN = rf"{WORDS}|\p{{N}}|{PUNCTUATION}"
GLM4 = rf"{WORDS}|\p{{N}}{{1,3}}|{PUNCTUATION}"
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *[f"<|extra_{n}|>" for n in range(205)],
]
GLM4_SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
]
DOCS = Path(__file__).parents[2] / "docs"
ALPHABET = "aaaabbc  \n\r\t's'LL é\u0301世界😀👩‍👩‍👧ſK1234"


@pytest.fixture(scope="module")
def ranks(texts: list[str]) -> dict[bytes, int]:
    """256 bytes, then what merging the documentation gives, in that order: as tiktoken's own
    training numbers them."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(GLM4), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        [*texts, *[page.read_text() for page in DOCS.glob("*.md")]], trainer
    )
    return {
        bytes(BYTE_OF[c] for c in token): index for token, index in tokenizer.get_vocab().items()
    }


@pytest.fixture(scope="module")
def samples(texts: list[str]) -> list[str]:
    generator = random.Random(5)
    made = ["".join(generator.choices(ALPHABET, k=generator.randrange(50))) for _ in range(1500)]
    return [*texts, *made, *(DOCS / "architecture.md").read_text().splitlines()]


def write(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_text(
        "".join(
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in sorted(ranks.items(), key=lambda i: i[1])
        )
    )


@pytest.fixture
def qwen(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    write(tmp_path / "qwen.tiktoken", ranks)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen", "architectures": ["QWenLMHeadModel"]})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"chat_format": "chatml"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "QWenTokenizer", "model_max_length": 8192})
    )
    return tmp_path


@pytest.fixture
def glm4(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    write(tmp_path / "tokenizer.model", ranks)
    added = {
        str(len(ranks) + n): {"content": token, "special": True}
        for n, token in enumerate(GLM4_SPECIAL)
    }
    settings = {
        "tokenizer_class": "ChatGLM4Tokenizer",
        "added_tokens_decoder": added,
        "chat_template": "[gMASK]<sop>...",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_qwen_encodes_as_tiktoken(qwen, ranks, samples):
    special = {token: len(ranks) + n for n, token in enumerate(QWEN_SPECIAL)}
    oracle = tiktoken.Encoding("qwen", pat_str=QWEN, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = load(qwen).tokenizer
    for text in [*samples, "<|im_start|>user\nhi<|im_end|>\n<|extra_204|>"]:
        wanted = oracle.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert tokenizer.encode(text).ids == wanted, text
        assert tokenizer.decode(wanted, skip_special_tokens=False) == unicodedata.normalize(
            "NFC", text
        )
    assert tokenizer.get_vocab_size() == len(ranks) + 208


def test_glm4_encodes_as_tiktoken_after_its_prefix(glm4, ranks, samples):
    special = {token: len(ranks) + n for n, token in enumerate(GLM4_SPECIAL)}
    oracle = tiktoken.Encoding("glm4", pat_str=GLM4, mergeable_ranks=ranks, special_tokens=special)
    loaded = load(glm4)
    prefix = [special["[gMASK]"], special["<sop>"]]
    for text in [*samples, "<|user|>\nhi<|assistant|>"]:
        wanted = oracle.encode(text, allowed_special="all")
        assert loaded.tokenizer.encode(text).ids == prefix + wanted, text
        assert loaded.tokenizer.encode(text, add_special_tokens=False).ids == wanted
    assert (
        loaded.chat_template == "[gMASK]<sop>..." and loaded.names["eos_token"] == "<|endoftext|>"
    )


def test_glm4_without_a_list_of_added_tokens(glm4, ranks):
    (glm4 / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLM4Tokenizer"})
    )
    tokenizer = load(glm4).tokenizer
    assert [
        tokenizer.token_to_id(token) - len(ranks) for token in (*GLM4_SPECIAL, "<|observation|>")
    ] == list(range(10))


def test_a_piece_that_is_a_token_is_taken_whole():
    """tiktoken looks a piece up before it merges; `abc` is out of reach of merging here, and only a
    whole piece becomes it."""
    ranks = {bytes((byte,)): byte for byte in range(256)} | {
        b"bc": 256,
        b"abc": 258,
        b"xy": 259,
        b"xyz": 260,
        b"yz": 257,
    }
    assert merges_of(ranks) == [
        (b"b", b"c"),
        (b"y", b"z"),
        (b"a", b"bc"),
        (b"x", b"y"),
        (b"x", b"yz"),
    ]
    assert merges_of({"a": 0, "b": 1, "c": 2, "d": 3, "abcd": 4}) == []


def test_qwen_needs_neither_torch_nor_transformers_nor_tiktoken(qwen):
    code = (
        "import sys, pathlib; from pagewire.tokenizer.load import load; found = load(pathlib.Path(sys.argv[1]));"
        "assert found.tokenizer.decode(found.tokenizer.encode('hello 你').ids) == 'hello 你';"
        "assert not {'torch', 'transformers', 'tiktoken', 'sentencepiece'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(qwen)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("damage", "told"),
    [("IQ== 0\nnot base64! 7\n", "line 2 is not a token"), ("IQ== 0\n", "lacks 255 of the 256")],
)
def test_damaged_ranks_are_named(qwen, damage, told):
    (qwen / "qwen.tiktoken").write_text(damage)
    with pytest.raises(NoTokenizer, match=rf"qwen\.tiktoken.*{told}"):
        load(qwen)
