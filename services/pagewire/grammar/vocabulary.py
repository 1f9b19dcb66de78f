"""A model's tokens as llguidance knows them: the bytes of each, which are special, which end a
text."""

from collections.abc import Sequence
from typing import Final

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from ..config import ModelConfig
from ..hub.huggingface import has_own_tokenizer, resolve, tokenizer_model
from ..tokenizer.decode import Decoding
from ..tokenizer.load import load
from .errors import GrammarError

NO_TEXT: Final = (
    "this server runs without a tokenizer (--skip-tokenizer-init), so it cannot tell which tokens "
    "match a grammar"
)

_CHARACTER: Final = r'[^"\\\x00-\x1F\x7F]'
SLICES: Final = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{most}}}" for most in (10, 14, 18, 30)),
    f"{_CHARACTER}+",
]
"""Sets of tokens that llguidance allows at once where a grammar allows them all. Its own are those
of 10 and 30 characters and of any number; in strings that may have only some characters more, the
two between save a quarter of the time (40 to 30 us a mask over `maxLength` of 20 to 60)."""


class Vocabulary:
    """Of a model with `size` tokens, whose texts end at the tokens `eos`."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos: Sequence[int]) -> None:
        """Raises GrammarError where single tokens stand for no fixed bytes."""
        decoding = Decoding(tokenizer)
        if not decoding.is_tabled:
            raise GrammarError(
                "this model's tokens stand for no fixed text, so no grammar can be held"
            )
        decoding.grow(size)
        raw = decoding.raw[:size]
        self.raw = raw
        self.size = size
        self.special = decoding.special
        self.special_ids = {
            raw[token].decode("utf-8", "replace"): token for token in self.special if token < size
        }
        """Of special tokens, by name."""
        self.eos = frozenset(eos)
        wrapped = TokenizerWrapper(_Tokens(tokenizer, raw, self.special, eos))
        self.matching = LLTokenizer(
            wrapped, n_vocab=size, eos_token=list(eos) or None, slices=SLICES
        )


class _Tokens:
    """What TokenizerWrapper asks for."""

    def __init__(
        self, tokenizer: Tokenizer, raw: list[bytes], special: frozenset[int], eos: Sequence[int]
    ) -> None:
        self.eos_token_id = eos[0] if eos else 0
        self.bos_token_id = None
        self.tokens = raw
        self.special_token_ids = sorted(token for token in special if token < len(raw))
        self._tokenizer = tokenizer
        self._special = special
        self._id_of = {
            data: token for token, data in enumerate(raw) if data and token not in special
        }
        self._longest = max(map(len, raw), default=1)

    def __call__(self, data: bytes | str) -> list[int]:
        """`data` as the tokenizer itself would cut it, where that gives these very bytes; else the
        longest tokens first. Used for text that a grammar leaves no choice about. The name of a
        special token in it is text like any other: the token itself may end the answer."""
        text = data if isinstance(data, bytes) else data.encode()
        try:
            ids = self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
            is_text = self._special.isdisjoint(ids)
            if is_text and b"".join(map(self.tokens.__getitem__, ids)) == text:
                return ids
        except (UnicodeDecodeError, IndexError):
            pass
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                token = self._id_of.get(text[start:end])
                if token is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                start += 1
        return ids


def load_vocabulary(model: ModelConfig, size: int, eos: Sequence[int]) -> Vocabulary:
    """Of the model's files or --tokenizer. Raises GrammarError, ValueError, OSError."""
    if model.skip_tokenizer_init:
        raise GrammarError(NO_TEXT)
    source = tokenizer_model(model) if has_own_tokenizer(model) else model
    return Vocabulary(load(resolve(source, lambda line: None)).tokenizer, size, eos)
