"""Small tokenizers built in the process: a byte-level BPE, and a sentencepiece-like one with
scores, each also as a GGUF file."""

import os
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The capital of France is Paris, and the year is 2024.",
    "def f(x):\n    return [x ** 2 for _ in range(10)]  # squares\n\n\tif x:\r\n\t\tpass\n",
    "你好，世界！今天的天气很好。日本語も、한국어도。",
    "emoji 😀👩‍👩‍👧 and flags 🇩🇪, accents: é e\u0301 ñ ü, math ∑∂√",
    "   leading, trailing and    inner   spaces   ",
    "12345 007 3.14159 1,000,000 ١٢٣",
    "It's we'll THEY'RE 'd",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def template_source() -> str:
    return TEMPLATE


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """Byte-level BPE with digits apart, as SmolLM's; few merges, so that most characters beyond
    ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    words = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def write_gguf(path: Path, fields: dict[str, object]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("general.languages", ["en", "zh"])
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bpe_fields(tokenizer: Tokenizer, pre: str = "smollm") -> dict[str, object]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def spm_fields() -> dict[str, object]:
    """A hand-made sentencepiece vocabulary: control tokens, all bytes, characters, and pieces
    scored by their order."""
    pieces = [
        "▁t",
        "he",
        "▁the",
        "▁c",
        "▁ca",
        "at",
        "▁cat",
        "▁s",
        "▁sat",
        "▁▁",
        "hello",
        "▁hello",
        "he",
        "ll",
        "llo",
    ]
    characters = sorted(set("▁abcdefghijklmnopqrstuvwxyz.,!世"))
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        *dict.fromkeys(pieces),
        *characters,
    ]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def make_gguf(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer):
    """Writes a GGUF file with a tokenizer of the kind "bpe" or "spm", changed by the keywords."""

    def make(kind: str = "bpe", **changes: object) -> Path:
        fields = bpe_fields(bpe) if kind == "bpe" else spm_fields()
        fields.update({key.replace("__", "."): value for key, value in changes.items()})
        fields = {key: value for key, value in fields.items() if value is not None}
        return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", fields)

    return make


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, where it is on this machine already."""
    from pagewire.hub import huggingface

    given = os.environ.get("PAGEWIRE_TEST_GGUF")
    path = Path(given) if given else huggingface.cache_dir() / "demo" / huggingface.DEMO_GGUF
    if not path.is_file():
        pytest.skip("the demo model is not on this machine; set PAGEWIRE_TEST_GGUF")
    return path
