"""How many characters of a text one token can stand for: by that a text is refused that no context
holds, before it is encoded. Knows the tokenizers library's own description of a tokenizer.

A tokenizer may shorten texts without limit: it strips spaces, or makes one token of any number of
unknown characters. Then the answer is 0, and texts are counted while they are encoded.
"""

import json
from typing import Any, Final

from tokenizers import Tokenizer

COMPOSED: Final = 4
"""Characters that the Unicode forms NFC and NFKC make one of, at most: Greek vowels with three
marks."""
_SPLITTERS: Final = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "UnicodeScripts"}
"""Pre-tokenizers that cut a text and drop nothing."""
_NORMALIZERS: Final = {"ByteLevel", "Prepend", "NFD", "NFKD", "Lowercase"}
"""Normalizers that make no text shorter."""


def longest_token(tokenizer: Tokenizer, longest: int) -> int:
    """Characters; 0: any number. longest: bytes of the longest token."""
    parts = {
        name: json.loads(part.__getstate__()) if part is not None else None
        for name, part in (
            ("normalizer", tokenizer.normalizer),
            ("pre_tokenizer", tokenizer.pre_tokenizer),
        )
    }
    if not _keeps(parts["pre_tokenizer"]) or not _spells(tokenizer.model, json.dumps(parts)):
        return 0
    return _shortening(parts["normalizer"]) * longest


def _shortening(normalizer: Any) -> int:
    """How many characters it can make one of; 0: any number."""
    if normalizer is None:
        return 1
    match normalizer["type"]:
        case "Sequence":
            factor = 1
            for part in normalizer["normalizers"]:
                factor *= _shortening(part)
            return factor
        case "Replace":
            pattern = normalizer["pattern"].get("String")
            content = normalizer["content"]
            return -(-len(pattern) // len(content)) if pattern and content else 0
        case "NFC" | "NFKC":
            return COMPOSED
        case name:
            return int(name in _NORMALIZERS)


def _keeps(splitter: Any) -> bool:
    """Whether a pre-tokenizer drops nothing."""
    if splitter is None or splitter["type"] in _SPLITTERS:
        return True
    if splitter["type"] == "Sequence":
        return all(map(_keeps, splitter["pretokenizers"]))
    return splitter["type"] == "Split" and splitter["behavior"] != "Removed"


def _spells(model: Any, parts: str) -> bool:
    """Whether each character is in some token, none dropped and no two unknown ones in one."""
    if getattr(model, "byte_fallback", False):
        return True
    if type(model).__name__ != "BPE":
        return False
    return "ByteLevel" in parts or bool(model.unk_token and not model.fuse_unk)
