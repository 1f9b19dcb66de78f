"""Which tokens end a text. Every file that names one counts, since none of them can be relied on
alone: config.json of a chat model often has the base model's end, generation_config.json is often
missing, and the tokenizer names the end of a turn. Ids only; what else the files say is not read.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from .errors import Unsupported
from .json_files import Config, added_tokens, chat_template, read_object, token_text

END_OF_TURN: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
)
"""Tokens that end a turn or a text wherever they occur in a vocabulary: those of llama.cpp
(src/llama-vocab.cpp), and a few more families'."""
HARMONY: Final = ("<|return|>", "<|call|>")
"""In a vocabulary that has both, `<|end|>` ends a part of an answer, which goes on."""
GGUF_KEYS: Final = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


class _AddedToken(Struct):
    id: int
    content: str


class _Model(Struct):
    vocab: Raw = Raw(b"{}")


class _TokenizerFile(Struct):
    """What is read of tokenizer.json: msgspec passes over the rest, which is large."""

    added_tokens: list[_AddedToken] = []
    model: _Model = msgspec.field(default_factory=_Model)


def of_directory(
    directory: Path, config: Config, tokenizer: Path | None = None, template: str = ""
) -> tuple[int, ...]:
    """The ids that the files of `directory` name, in rising order: config.json (`config`),
    generation_config.json, the tokenizer's settings, and the end of a turn in its chat template.
    `tokenizer`: where the tokenizer's files are, by default in `directory`. `template`: the source
    of a chat template that is used instead of the model's own. Raises Unsupported."""
    generation = read_object(directory / "generation_config.json")
    ids: set[int] = set()
    for source, file in ((config, "config.json"), (generation, "generation_config.json")):
        ids |= _eos_ids(source.get("eos_token_id"), directory / file)
    ids |= _unnamed(config, generation)
    ids |= of_tokenizer(tokenizer or directory, template)
    return within_vocabulary(ids, int(config.get("vocab_size") or 0))


def _eos_ids(stated: Any, file: Path) -> set[int]:
    """Those of `eos_token_id` in `file`: one, a list, or none. Raises Unsupported."""
    ids = [
        token for token in (stated if isinstance(stated, list) else [stated]) if token is not None
    ]
    for token in ids:
        if not isinstance(token, int | float):
            raise Unsupported(
                f"eos_token_id in {file} is {stated!r}, not a token id or a list of them; correct it there"
            )
    return {int(token) for token in ids}


def of_gguf(
    metadata: dict[str, Any],
    find: Callable[[Iterable[str]], dict[str, int]],
    vocab_size: int,
    tokenizer: Path | None = None,
    template: str = "",
) -> tuple[int, ...]:
    """The ids that a GGUF file names, those of the tokens in its vocabulary that are known to end a
    turn, and what a `tokenizer` from elsewhere names, in rising order. `find`: the ids of texts
    that the vocabulary has. `template`: as in `of_directory`. Raises Unsupported."""
    named = (metadata.get(key) for key in GGUF_KEYS)
    ids = {int(token) for token in named if token is not None}
    ids.update(ending(find(END_OF_TURN)).values())
    if tokenizer is not None:
        ids |= of_tokenizer(tokenizer, template)
    return within_vocabulary(ids, vocab_size)


def ending(tokens: dict[str, int]) -> dict[str, int]:
    """Those of `tokens`, members of END_OF_TURN in a vocabulary with their ids, that end an answer
    there."""
    if all(text in tokens for text in HARMONY):
        return {text: token for text, token in tokens.items() if text != "<|end|>"}
    return tokens


def within_vocabulary(ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids that a model with `vocab_size` tokens (0: not known) can generate, in rising order.
    Files also have -1, for none."""
    return tuple(sorted(token for token in set(ids) if 0 <= token < (vocab_size or 2**31)))


def _unnamed(config: Config, generation: Config) -> set[int]:
    """Tokens that end a message by a family's own code alone: Qwen-1's <|im_start|> and <|im_end|>,
    the next speaker's of ChatGLM3."""
    if config.get("model_type") == "qwen" and generation.get("chat_format") == "chatml":
        return {151_644, 151_645}
    return (
        {64_795, 64_797}
        if config.get("model_type") == "chatglm" and config.get("padded_vocab_size") == 65_024
        else set()
    )


def of_tokenizer(directory: Path, template: str = "") -> set[int]:
    """What the tokenizer's files name: `eos_token`, and tokens that the chat template ends turns
    with; where no template comes with the model, another one will be used, and all added tokens
    that are known to end a turn count. Those of `template`, which is used instead of the model's
    own, count as well. A GGUF file in the place of a directory says nothing here. Raises
    Unsupported."""
    if not directory.is_dir():
        return set()
    settings = read_object(directory / "tokenizer_config.json")
    mapped = read_object(directory / "special_tokens_map.json")
    own = chat_template(directory, {**mapped, **settings})
    vocabulary = _Vocabulary(directory, settings)
    turns = turn_ends(own, vocabulary.ids_of)
    if not own:
        turns = {text: token for text, token in vocabulary.added.items() if text in END_OF_TURN}
    turns |= turn_ends(template, vocabulary.ids_of)
    texts = (token_text(source.get("eos_token")) for source in (settings, mapped))
    named = vocabulary.ids_of(text for text in texts if text is not None)
    return {*ending(turns).values(), *named.values()}


def turn_ends(template: str, find: Callable[[Iterable[str]], dict[str, int]]) -> dict[str, int]:
    """The tokens that the source of a chat template ends turns with, and their ids. `find`: the ids
    of texts that are tokens."""
    return find(text for text in END_OF_TURN if text in template)


class _Vocabulary:
    """The ids of tokens, as far as JSON files tell them."""

    def __init__(self, directory: Path, settings: Config) -> None:
        self._directory = directory
        self._file = _tokenizer_file(directory / "tokenizer.json")
        self.added: dict[str, int] = {
            **read_object(directory / "added_tokens.json"),
            **{entry.content: entry.id for entry in self._file.added_tokens},
            **added_tokens(settings),
        }

    def ids_of(self, texts: Iterable[str]) -> dict[str, int]:
        """Those of `texts` that are tokens, with their ids."""
        ids = {text: self._id_of(text) for text in texts}
        return {text: token for text, token in ids.items() if token is not None}

    def _id_of(self, text: str) -> int | None:
        if text in self.added:
            return self.added[text]
        vocab = msgspec.json.decode(self._file.model.vocab)
        if isinstance(vocab, dict):
            return vocab.get(text, read_object(self._directory / "vocab.json").get(text))
        # A unigram model lists its pieces with their scores.
        return next((index for index, piece in enumerate(vocab) if piece[0] == text), None)


def _tokenizer_file(path: Path) -> _TokenizerFile:
    try:
        return (
            msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
            if path.is_file()
            else _TokenizerFile()
        )
    except msgspec.DecodeError as error:
        raise Unsupported(f"{path} cannot be read: {error}") from None
