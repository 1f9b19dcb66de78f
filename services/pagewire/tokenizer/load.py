"""Finds and builds the tokenizer of a model: its `tokenizers` object, chat template and named
special tokens. It knows no requests.

Sources: a directory with tokenizer.json, one of the formats of `formats`, or one GGUF file; or a
GGUF file. Directories with other formats only go through transformers, imported then and without
torch. A model that ships no chat template may get a built-in one.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

from ..checkpoint import chat_templates, gguf_files, gguf_metadata
from ..checkpoint.errors import Unsupported
from ..checkpoint.json_files import Config, by_tools, chat_template, read_object, tokenizer_settings
from . import (
    formats,
    gguf_tokenizer,
    sentencepiece_model,
    sentencepiece_tokenizer,
    tiktoken_bpe,
)
from .added_tokens import listed, named, read_tokenizer_json, with_added

log = logging.getLogger("pagewire.tokenizer")
OLD_FORMATS: Final = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
)


BROKEN: Final = (
    Unsupported,
    formats.BadFiles,
    gguf_metadata.BadGguf,
    gguf_tokenizer.UnsupportedTokenizer,
    sentencepiece_model.BadModel,
    sentencepiece_tokenizer.UnsupportedModel,
    tiktoken_bpe.BadRanks,
)


class NoTokenizer(ValueError):
    """There is no tokenizer that can be used; the text says where it was looked for and what to
    do."""


class Loaded(NamedTuple):
    """What a model's files say about text."""

    tokenizer: Tokenizer
    chat_template: str
    """Empty when the model has none."""
    names: dict[str, str]
    """What chat templates may name, like bos_token."""
    response_template: str = ""
    """The description of the model's answers in tokenizer_config.json, as JSON; empty without."""


def load(path: Path) -> Loaded:
    """Raises NoTokenizer, OSError."""
    try:
        loaded = _load_directory(path) if path.is_dir() else _load_gguf(path)
    except BROKEN as error:
        raise NoTokenizer(str(error)) from None
    # A tokenizer.json may carry the training set-up; requests are never cut or padded.
    loaded.tokenizer.no_truncation()
    loaded.tokenizer.no_padding()
    return loaded


def _load_gguf(path: Path) -> Loaded:
    metadata = gguf_metadata.read_metadata(gguf_files.parts(path)[0])
    with_tools = metadata.get("tokenizer.chat_template.tool_use")
    template = by_tools(with_tools, metadata.get("tokenizer.chat_template"))
    return Loaded(gguf_tokenizer.build(metadata), template, gguf_tokenizer.named_tokens(metadata))


def _load_directory(path: Path) -> Loaded:
    settings = tokenizer_settings(path)
    described = settings.get("response_template")
    text = json.dumps(described, ensure_ascii=False) if described else ""
    return _build(path, settings)._replace(response_template=text)


def _build(path: Path, settings: Config) -> Loaded:
    config = read_object(path / "config.json")
    generation = read_object(path / "generation_config.json")
    template = chat_template(path, settings) or _built_in(path, config, generation)
    added = listed(path, settings)
    if (path / "tokenizer.json").is_file():
        tokenizer = _read_json_form(path / "tokenizer.json")
        size = int(config.get("vocab_size") or 0)
        return Loaded(with_added(tokenizer, added, size), template, named(settings))
    built = formats.build(path, settings, config, generation, added)
    if built is not None:
        # ChatGLM2 and 3 call this token `sop`, as if it were a word of the text: here it has a name
        # of its own.
        return Loaded(
            built.tokenizer,
            template.replace("[gMASK]sop", "[gMASK]<sop>"),
            {**built.names, **named(settings)},
        )
    if any((path / name).is_file() for name in OLD_FORMATS):
        return _load_with_transformers(path, template, settings)
    gguf = gguf_files.find(path)
    if gguf is not None:
        return _load_gguf(gguf)
    if not (path / "config.json").is_file():
        raise NoTokenizer(
            f"{path} holds no model: it has no config.json, no tokenizer.json and no .gguf file"
        )
    raise NoTokenizer(
        f"{path} has no tokenizer.json; name a tokenizer with --tokenizer, or serve token ids with --skip-tokenizer-init"
    )


def _read_json_form(path: Path) -> Tokenizer:
    try:
        return read_tokenizer_json(path.read_bytes())
    except Exception as error:  # the library raises bare Exception
        raise NoTokenizer(f"{path} cannot be read: {error}") from None


def _built_in(path: Path, config: dict[str, Any], generation: dict[str, Any]) -> str:
    name = chat_templates.choose(path, config, generation)
    if name:
        log.info(
            "%s ships no chat template: using the built-in one called %s (--chat-template overrides it)",
            path,
            name,
        )
    return chat_templates.source(name) if name else ""


def _load_with_transformers(path: Path, template: str, settings: dict[str, Any]) -> Loaded:
    # Otherwise it warns that torch is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with _torch_hidden():
            from transformers import AutoTokenizer  # type: ignore[import-untyped]

            converted = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        if "AutoTokenizer" in (settings.get("auto_map") or ()):
            tokenizer_class = settings.get("tokenizer_class")
            raise NoTokenizer(
                f"{path} has no tokenizer.json but a {tokenizer_class} of its repository's own code, "
                "which tokenizers never run here; name a tokenizer that has one with --tokenizer"
            ) from None
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NoTokenizer(
            f"{path} has no tokenizer.json, and transformers cannot convert what is there: {line}"
        ) from None
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise NoTokenizer(
            f"{path} has only a tokenizer without a tokenizer.json form; save one there, or name another with --tokenizer"
        )
    return Loaded(backend, template, named(dict(converted.special_tokens_map)))


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
    """Within the context torch cannot be imported: transformers would, though it converts
    vocabularies without it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
