"""The bytes that each token of a vocabulary stands for, read off a tokenizer's decoder. It knows no
requests.

A decoder of the tokenizers library is a sequence of steps, each with a `type`. For most tokenizers
the steps turn each token into bytes whatever stands around it; `is_context_free` says whether that
is so, and `bytes_of_token` then does what the steps would do.
"""

import json
import re
from typing import Any, Final

from tokenizers import Tokenizer

Step = dict[str, Any]
"""One step of a decoder, as the library writes it into tokenizer.json."""
WORD_START: Final = "▁"
"""Sentencepiece's mark for a space before a word."""
BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""Sentencepiece's name for a token that is one byte."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the others for
    the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + n): byte for n, byte in enumerate(others)}
    return alphabet


BYTE_OF: Final = _byte_alphabet()
"""The byte that a character of a byte-level token stands for."""


def tokens_by_id(tokenizer: Tokenizer) -> list[str]:
    """The vocabulary's name of each token; empty for an id that has none."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        tokens[index] = token
    return tokens


def decoder_steps(tokenizer: Tokenizer) -> list[Step]:
    """The steps of the tokenizer's decoder, sequences within sequences resolved."""
    decoder: Any = tokenizer.decoder
    # The library has no reader for a decoder's settings; its pickling state is their JSON.
    root: Step = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "None"}
    return _flatten(root)


def _flatten(step: Step) -> list[Step]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flatten(part)]


def strips_first_space(steps: list[Step]) -> bool:
    """Whether the space that the first word of every text begins with is not shown."""
    return any(step["type"] == "Strip" or _is_stripping_metaspace(step) for step in steps)


def _is_stripping_metaspace(step: Step) -> bool:
    return step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"


def is_context_free(steps: list[Step]) -> bool:
    """Whether each step treats a token without regard to its neighbours, but for one space taken
    off the beginning of the whole text."""
    # Fuse joins all tokens into one text: what follows it would see neighbours. Only a Strip of
    # that one space does no harm there.
    is_fused = False
    for step in steps:
        match step:
            case {"type": "ByteLevel" | "ByteFallback" | "Metaspace"}:
                if is_fused:
                    return False
            case {"type": "Replace", "pattern": {"String": _}}:
                if is_fused:
                    return False
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if is_fused:
                pass
            case _:
                return False
    return True


def bytes_of_token(token: str, steps: list[Step]) -> bytes:
    """The bytes that `token` stands for after context-free steps."""
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                return _from_byte_level(token)
            case "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            case "Metaspace":
                token = token.replace(step.get("replacement", WORD_START), " ")
            case "ByteFallback" if byte := BYTE_TOKEN.fullmatch(token):
                return bytes((int(byte[1], 16),))
            case _:
                pass
    return token.encode()


def _from_byte_level(token: str) -> bytes:
    """A token with a character outside GPT-2's alphabet was added as plain text."""
    values = [BYTE_OF.get(character, -1) for character in token]
    return token.encode() if -1 in values else bytes(values)


def text_of(data: bytes) -> str | None:
    """The text; None where the bytes are no whole UTF-8 by themselves."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
