"""Directories whose tokenizer is no tokenizer.json but a sentencepiece model, a file of ranks or
GPT-2's two files: which it is, and what its family adds.

Families differ in the tokens outside the file and in what they put before a text; elsewhere that is
said by code of the repository. Known by the class that tokenizer_config.json names, or by
config.json. It knows neither file format.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from . import sentencepiece_model, sentencepiece_tokenizer, tiktoken_bpe
from .added_tokens import ListedToken, named, special_token, with_added
from .gguf_tokenizer import LLAMA3, QWEN2

Config = dict[str, Any]
MODEL_FILE: Final = "tokenizer.model"
LLAMA_LIKE: Final = (
    *("", "LlamaTokenizer", "LLaMATokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"),
    *("BaichuanTokenizer", "BaiChuanTokenizer", "PreTrainedTokenizerFast"),
)
GPT2_LIKE: Final = (
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "CodeGenTokenizer",
    "CodeGenTokenizerFast",
    "Qwen2Tokenizer",
)
GPT2_FILES: Final = ("vocab.json", "merges.txt")
CHATGLM: Final = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
"""In the order of their ids, which follow the pieces. ChatGLM itself calls two of them sop and eop,
as if they were words."""
GLM4: Final = (
    "<|endoftext|>",
    *CHATGLM,
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
CHATGLM_PREFIX: Final = ("[gMASK]", "<sop>")
BAICHUAN_MARKS: Final = {"user": 195, "assistant": 196}
"""The ids that begin a role's message, where generation_config.json names no others."""


class BadFiles(ValueError):
    """GPT-2's files are damaged."""


class Built(NamedTuple):
    """A tokenizer, and its special tokens by the names that chat templates use."""

    tokenizer: Tokenizer
    names: dict[str, str]


def build(
    path: Path, settings: Config, config: Config, generation: Config, added: Sequence[ListedToken]
) -> Built | None:
    """The tokenizer in directory `path`, by tokenizer_config.json, config.json and
    generation_config.json, with the tokens `added`; None where there is none that is known here.
    Raises BadFiles, BadRanks,
    BadModel, UnsupportedModel, OSError."""
    ranks = next(iter(sorted(path.glob("*.tiktoken"))), None)
    file = path / MODEL_FILE
    tokenizer_class = str(settings.get("tokenizer_class") or "")
    if ranks is not None and (
        tokenizer_class == "QWenTokenizer" or config.get("model_type") == "qwen"
    ):
        return _qwen(ranks)
    if tokenizer_class in GPT2_LIKE and all((path / name).is_file() for name in GPT2_FILES):
        return _gpt2(path, settings, added)
    if not file.is_file():
        return None
    chatglm = (
        tokenizer_class in ("ChatGLMTokenizer", "ChatGLM4Tokenizer")
        or config.get("model_type") == "chatglm"
    )
    if tiktoken_bpe.is_ranks(file):
        return _glm4(file, added) if chatglm else None
    if chatglm:
        return _chatglm(sentencepiece_model.read(file))
    if tokenizer_class not in LLAMA_LIKE:
        return None
    model = sentencepiece_model.read(file)
    marks = _marks(model, generation) if config.get("model_type") == "baichuan" else {}
    return _llama(model, settings, marks, added)


def _gpt2(path: Path, settings: Config, added: Sequence[ListedToken]) -> Built:
    """Byte-level BPE by a vocabulary and a list of merges."""
    try:
        vocab, merges = models.BPE.read_file(*(str(path / name) for name in GPT2_FILES))
    except Exception as error:  # the library raises bare Exception
        raise BadFiles(f"{path}: {' and '.join(GPT2_FILES)} cannot be read: {error}") from None
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if settings["tokenizer_class"] == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        steps.append(pre_tokenizers.Split(Regex(QWEN2), "isolated"))
    spaced = bool(settings.get("add_prefix_space", False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=not steps))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    names = named(settings)
    tokenizer = with_added(tokenizer, added, 0)
    _surround(
        tokenizer,
        [names["bos_token"]] if settings.get("add_bos_token") and "bos_token" in names else [],
        [],
    )
    return Built(tokenizer, names)


def _qwen(file: Path) -> Built:
    ranks = tiktoken_bpe.read_ranks(file)
    special = [(token, len(ranks) + n) for n, token in enumerate(tiktoken_bpe.QWEN_SPECIAL)]
    return Built(
        tiktoken_bpe.build(ranks, QWEN2, special, composed=True),
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    )


def _glm4(file: Path, added: Sequence[ListedToken]) -> Built:
    ranks = tiktoken_bpe.read_ranks(file)
    numbered = [(token.content, index) for token, index in added if index is not None]
    special = numbered or [(token, len(ranks) + n) for n, token in enumerate(GLM4)]
    tokenizer = tiktoken_bpe.build(ranks, LLAMA3, special, composed=False)
    _surround(tokenizer, CHATGLM_PREFIX, ())
    return Built(tokenizer, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})


def _chatglm(model: sentencepiece_model.Model) -> Built:
    added = [(special_token(token), len(model.pieces) + n) for n, token in enumerate(CHATGLM)]
    tokenizer = sentencepiece_tokenizer.build(model, added)
    _surround(tokenizer, CHATGLM_PREFIX, ())
    return Built(tokenizer, _named(model))


def _marks(model: sentencepiece_model.Model, generation: Config) -> dict[str, int]:
    ids = {
        f"{role}_token": int(generation.get(f"{role}_token_id", index))
        for role, index in BAICHUAN_MARKS.items()
    }
    return {name: index for name, index in ids.items() if index < len(model.pieces)}


def _llama(
    model: sentencepiece_model.Model,
    settings: Config,
    marks: dict[str, int],
    added: Sequence[ListedToken],
) -> Built:
    """`marks`: ordinary pieces that stand for roles, by the name that a template gives them."""
    if settings.get("add_prefix_space") is False:
        model = replace(model, dummy_prefix=False)
    spoken = [(special_token(model.pieces[index]), index) for index in marks.values()]
    tokenizer = sentencepiece_tokenizer.build(
        model, spoken, prefix_first_only=settings.get("legacy") is False
    )
    tokenizer = with_added(tokenizer, added, 0)
    names = {
        **_named(model),
        **{name: model.pieces[index] for name, index in marks.items()},
        **named(settings),
    }
    before = (
        [names["bos_token"]] if settings.get("add_bos_token", True) and "bos_token" in names else []
    )
    after = (
        [names["eos_token"]]
        if settings.get("add_eos_token", False) and "eos_token" in names
        else []
    )
    _surround(tokenizer, before, after)
    return Built(tokenizer, names)


def _named(model: sentencepiece_model.Model) -> dict[str, str]:
    ids = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unk}
    return {
        name: model.pieces[index] for name, index in ids.items() if 0 <= index < len(model.pieces)
    }


def _surround(tokenizer: Tokenizer, before: Sequence[str], after: Sequence[str]) -> None:
    """What is put around each text that is encoded with special tokens."""
    tokens = [*before, *after]
    if tokens:
        single = " ".join(
            [*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in after)]
        )
        special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(tokens)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
