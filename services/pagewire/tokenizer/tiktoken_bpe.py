"""Builds a `tokenizers.Tokenizer` from a file of ranks in tiktoken's format: Qwen-1's
`qwen.tiktoken`, GLM-4's `tokenizer.model`.

Such a file has a line for each token, its bytes in base64 and its rank, which is its id. It says
nothing of special tokens and of how a text is cut before merging: those are given by the caller.
Format and rule of merging: the tiktoken package.
"""

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .merges import merges_of
from .token_bytes import BYTE_OF

Ranks = dict[bytes, int]
CHARACTER_OF: Final = {byte: character for character, byte in BYTE_OF.items()}
QWEN_EXTRAS: Final = 205
QWEN_SPECIAL: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{n}|>" for n in range(QWEN_EXTRAS)),
)
"""In the order of their ids, which follow the ranks."""


class BadRanks(ValueError):
    """The file is not in tiktoken's format, or damaged."""


def is_ranks(path: Path) -> bool:
    """Whether the file begins like one of ranks; `tokenizer.model` names both these and
    sentencepiece's."""
    with path.open("rb") as file:
        words = file.readline(4096).split()
    try:
        return (
            len(words) == 2
            and words[1].isdigit()
            and bool(base64.b64decode(words[0], validate=True))
        )
    except binascii.Error:
        return False


def read_ranks(path: Path) -> Ranks:
    """The tokens of a file with their ranks. Raises BadRanks, OSError."""
    ranks: Ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise BadRanks(
                f"{path}: line {number} is not a token in base64 and its rank: the file is damaged; fetch it again"
            ) from None
    missing = sum(bytes((byte,)) not in ranks for byte in range(256))
    if missing:
        raise BadRanks(
            f"{path} lacks {missing} of the 256 single bytes: the file is damaged; fetch it again"
        )
    return ranks


def build(
    ranks: Ranks, pattern: str, special: Iterable[tuple[str, int]], composed: bool
) -> Tokenizer:
    """The tokenizer. `pattern` cuts a text into pieces, `special` are tokens with their ids;
    `composed`: texts are brought to NFC first."""
    vocab = {_printable(token): rank for token, rank in ranks.items()}
    vocab.update(special)
    merges = [(_printable(left), _printable(right)) for left, right in merges_of(ranks)]
    # A piece that is itself a token is taken whole, as tiktoken does, whatever the merges say.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, _ in special]
    )
    return tokenizer


def _printable(token: bytes) -> str:
    return "".join([CHARACTER_OF[byte] for byte in token])
