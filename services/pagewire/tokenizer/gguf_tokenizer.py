"""Builds a `tokenizers.Tokenizer` from GGUF metadata: byte-level BPE ("gpt2") and sentencepiece BPE
with scores ("llama").

It knows the pre-tokenizers that GGUF only names (`tokenizer.ggml.pre`), as the models' own
tokenizer.json files define them; where a rule is known from llama.cpp alone (src/llama-vocab.cpp),
that one.
"""

from typing import Any, Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ..checkpoint.end_tokens import END_OF_TURN
from . import sentencepiece_tokenizer
from .sentencepiece_model import BPE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Model

PREFIX: Final = "tokenizer.ggml."

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASED: Final = (  # written as escapes: what Unicode normalization would change
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌ"
    "ῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK: Final = (
    "[\r\n]",
    rf"\s?[{CASED}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
DEFAULT: Final = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS_GPT2: Final = (r"\p{N}", GPT2)

SPLITS: Final[dict[str, tuple[str, ...]]] = {
    "default": DEFAULT,
    "gpt-2": (GPT2,),
    "mpt": (GPT2,),
    "olmo": (GPT2,),
    "smollm": DIGITS_GPT2,
    "starcoder": DIGITS_GPT2,
    "refact": DIGITS_GPT2,
    "command-r": DIGITS_GPT2,
    "codeshell": DIGITS_GPT2,
    "llama-bpe": (LLAMA3,),
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "dbrx": (LLAMA3,),
    "smaug-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "deepseek-llm": DEEPSEEK,
    "gpt-4o": (GPT4O,),
}
WHOLE_WORDS: Final = ("llama-bpe", "llama3", "llama-v3")
"""A pre-token that is a vocabulary entry is taken whole, whatever the merges say. These also put
BOS first by default."""
PHI3_PLAIN: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens of Phi-3 that leave what is after them."""
COMPOSED: Final = ("qwen2", "deepseek-r1-qwen")


class UnsupportedTokenizer(ValueError):
    """The file names a tokenizer that is not known here."""


def build(metadata: dict[str, Any]) -> Tokenizer:
    """Raises UnsupportedTokenizer, naming what the file asks for and what is supported."""
    model_type = metadata.get(PREFIX + "model")
    if model_type is None or PREFIX + "tokens" not in metadata:
        raise UnsupportedTokenizer(
            "the GGUF file has no tokenizer; give one with --tokenizer, or serve token ids with --skip-tokenizer-init"
        )
    if model_type not in ("gpt2", "llama"):
        raise UnsupportedTokenizer(
            f"GGUF tokenizer model {model_type!r} is not supported (gpt2 and llama are); give a directory with --tokenizer"
        )
    tokenizer = _byte_level(metadata) if model_type == "gpt2" else _sentencepiece(metadata)
    _add_special(tokenizer, metadata)
    _add_post_processor(tokenizer, metadata, model_type)
    return tokenizer


def named_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """The special tokens that chat templates may name, e.g. {"bos_token": "<s>"}."""
    tokens: list[str] = metadata[PREFIX + "tokens"]
    keys = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
        "sep_token": "seperator",
    }
    ids = {name: metadata.get(f"{PREFIX}{key}_token_id", -1) for name, key in keys.items()}
    return {name: tokens[index] for name, index in ids.items() if 0 <= index < len(tokens)}


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    pre = metadata.get(PREFIX + "pre", "default")
    if pre not in SPLITS:
        raise UnsupportedTokenizer(
            f"GGUF pre-tokenizer {pre!r} is not supported ({', '.join(SPLITS)} are); give a directory with --tokenizer"
        )
    vocab = {token: index for index, token in enumerate(metadata[PREFIX + "tokens"])}
    merges = [_pair(merge) for merge in metadata.get(PREFIX + "merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS))
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    # A piece may itself contain a space in files made from sentencepiece models; the separator is
    # the first that leaves two pieces.
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    tokens: list[str] = metadata[PREFIX + "tokens"]
    kinds = metadata.get(PREFIX + "token_type") or [NORMAL] * len(tokens)
    ids = {
        name: metadata.get(f"{PREFIX}{key}_token_id", -1)
        for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"))
    }
    return sentencepiece_tokenizer.build(
        Model(
            list(tokens),
            list(metadata[PREFIX + "scores"]),
            list(kinds),
            model_type=BPE,
            byte_fallback=True,
            charsmap=b"",
            dummy_prefix=bool(metadata.get(PREFIX + "add_space_prefix", True)),
            remove_extra_spaces=False,
            **ids,
        )
    )


def _add_special(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Tokens that end a turn are special whatever the file calls them: converters have made
    ordinary tokens of them."""
    tokens = metadata[PREFIX + "tokens"]
    piece_types = metadata.get(PREFIX + "token_type") or [NORMAL] * len(tokens)
    pieces = [
        (token, CONTROL if token in END_OF_TURN else piece_type)
        for token, piece_type in zip(tokens, piece_types, strict=False)
        if piece_type in (UNKNOWN, CONTROL, USER_DEFINED) or token in END_OF_TURN
    ]
    strips = _strips_spaces(metadata)
    tokenizer.add_special_tokens(
        [
            AddedToken(
                token, normalized=False, special=True, rstrip=strips and token not in PHI3_PLAIN
            )
            for token, piece_type in pieces
            if piece_type != USER_DEFINED
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(
                token, normalized=False, special=False, rstrip=strips and token not in PHI3_PLAIN
            )
            for token, piece_type in pieces
            if piece_type == USER_DEFINED
        ]
    )


def _strips_spaces(metadata: dict[str, Any]) -> bool:
    """Whether added tokens take the spaces and ends of lines after them, as Phi-3's do. No file
    says so; llama.cpp goes by the model's name. Phi-4's tokenizer is another one."""
    name = str(metadata.get("general.name", "")).lower()
    named = metadata.get("general.architecture") == "phi3" or "phi-3" in name or "phi3" in name
    return named and metadata.get(PREFIX + "model") == "llama"


def _add_post_processor(tokenizer: Tokenizer, metadata: dict[str, Any], model_type: str) -> None:
    named = named_tokens(metadata)
    first_by_default = model_type == "llama" or metadata.get(PREFIX + "pre") in WHOLE_WORDS
    bos = (
        named.get("bos_token") if metadata.get(PREFIX + "add_bos_token", first_by_default) else None
    )
    eos = named.get("eos_token") if metadata.get(PREFIX + "add_eos_token", False) else None
    special = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    if special:
        single = " ".join(
            filter(None, [f"{bos}:0" if bos else "", "$A:0", f"{eos}:0" if eos else ""])
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
