"""Tokens that a vocabulary has beside its model's: which files name them, and a tokenizer that has
each of them under its own id.

tokenizer.json should list them all, and does not always: some checkpoints name them in
tokenizer_config.json, added_tokens.json or special_tokens_map.json alone. The tokenizers library
numbers new tokens by itself and knows no gaps between ids; where a file says another id, the token
is written into the model's vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct
from tokenizers import AddedToken, Tokenizer

from ..checkpoint.json_files import Config, added_entries, read_object, token_text

FLAGS: Final = ("lstrip", "rstrip", "single_word", "normalized", "special")
NAMED: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
FILLER: Final = "\uf8ffunused-{}\uf8ff"
"""Name of an id that no token has, where ids follow from places in a list. Private-use characters,
so that no text contains it."""


class ListedToken(NamedTuple):
    """A token that a file names. `id`: None where the file says none."""

    token: AddedToken
    id: int | None


class _JsonToken(Struct):
    id: int
    content: str


class _TokenizerJson(Struct):
    added_tokens: list[_JsonToken] = []


def named(settings: Config) -> dict[str, str]:
    """The special tokens that tokenizer_config.json or special_tokens_map.json names, which chat
    templates may use."""
    texts = {name: token_text(settings.get(name)) for name in NAMED}
    return {name: text for name, text in texts.items() if text is not None}


def listed(path: Path, settings: Config) -> list[ListedToken]:
    """All tokens that the files of directory `path` name beside tokenizer.json, those with an id
    first. `settings`: of tokenizer_config.json and special_tokens_map.json. Raises Unsupported."""
    tokens = {
        entry["content"]: ListedToken(
            AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in FLAGS}),
            index,
        )
        for index, entry in added_entries(settings).items()
    }
    special = _special_texts(settings)
    for text, index in read_object(path / "added_tokens.json").items():
        if isinstance(index, int):
            token = AddedToken(text, normalized=False, special=text in special)
            tokens.setdefault(text, ListedToken(token, index))
    for text in special:
        tokens.setdefault(text, ListedToken(special_token(text), None))
    return sorted(tokens.values(), key=lambda entry: (entry.id is None, entry.id or 0))


def special_token(text: str) -> AddedToken:
    """A token that is found in a text before anything else, and hidden in one."""
    return AddedToken(text, normalized=False, special=True)


def _special_texts(settings: Config) -> list[str]:
    values: list[Any] = [settings.get(name) for name in NAMED]
    for name in LISTS:
        more = settings.get(name) or ()
        values += more.values() if isinstance(more, dict) else more
    texts = (token_text(value) for value in values)
    return list(dict.fromkeys(text for text in texts if text))


def read_tokenizer_json(data: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json, its added tokens under the ids that the file gives them.
    Raises Exception, as the library does, for a file that is none."""
    tokenizer = Tokenizer.from_str(data.decode())
    entries = msgspec.json.decode(data, type=_TokenizerJson).added_tokens
    ids = {entry.content: entry.id for entry in entries}
    wrong_ids = {text: token for text, token in ids.items() if tokenizer.token_to_id(text) != token}
    return _with_ids(json.loads(data), wrong_ids) if wrong_ids else tokenizer


def with_added(tokenizer: Tokenizer, tokens: Sequence[ListedToken], vocab_size: int) -> Tokenizer:
    """`tokenizer` with all of `tokens`. One without an id that the vocabulary lacks gets the next
    free one, if the model's `vocab_size` (0: not known) has it."""
    present = {entry.content: entry for entry in tokenizer.get_added_tokens_decoder().values()}
    missing = [entry for entry in tokens if tokenizer.token_to_id(entry.token.content) is None]
    if missing:
        ids = _new_ids(tokenizer, tokens, missing, vocab_size)
        tokenizer = _with_ids(json.loads(tokenizer.to_str()), ids) if ids else tokenizer
    for token, index in tokens:
        text = token.content
        if tokenizer.token_to_id(text) is None:  # there was no room for it
            continue
        # Without an id a file says no more of a token than that it is special.
        is_alike = text in present and (index is None or repr(present[text]) == repr(token))
        if not is_alike:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def _new_ids(
    tokenizer: Tokenizer,
    tokens: Sequence[ListedToken],
    missing: Sequence[ListedToken],
    vocab_size: int,
) -> dict[str, int]:
    """The ids of the tokens that the vocabulary lacks: what a file says, else the next free
    ones."""
    taken = [*tokenizer.get_vocab(with_added_tokens=True).values()]
    taken += [entry.id for entry in tokens if entry.id is not None]
    following = max(taken, default=-1) + 1
    ids: dict[str, int] = {}
    for token, index in missing:
        if index is not None:
            ids[token.content] = index
        elif not vocab_size or following < vocab_size:
            ids[token.content] = following
            following += 1
    return ids


def _with_ids(document: Config, ids: dict[str, int]) -> Tokenizer:
    """The tokenizer of `document`, tokenizer.json's content, with the texts of `ids` in the model's
    vocabulary under these ids."""
    vocab = document["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab.update(ids)
    else:
        _put_in_list(vocab, ids)
    return Tokenizer.from_str(json.dumps(document))


def _put_in_list(pieces: list[list[Any]], ids: dict[str, int]) -> None:
    """A unigram model's ids are places in its list of pieces and scores."""
    lowest = min((score for _, score in pieces), default=0.0)
    for index in range(len(pieces), max(ids.values()) + 1):
        pieces.append([FILLER.format(index), lowest])
    for text, index in ids.items():
        pieces[index] = [text, lowest]
