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

from . import (
    formats,
    gguf_metadata,
    gguf_tokenizer,
    sentencepiece_model,
    sentencepiece_tokenizer,
    templates,
    tiktoken_bpe,
)

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
    metadata = gguf_metadata.read_metadata(path)
    template = metadata.get("tokenizer.chat_template", "")
    return Loaded(gguf_tokenizer.build(metadata), template, gguf_tokenizer.named_tokens(metadata))


def _load_directory(path: Path) -> Loaded:
    settings = {**_json(path / "special_tokens_map.json"), **_json(path / "tokenizer_config.json")}
    config, generation = _json(path / "config.json"), _json(path / "generation_config.json")
    template = _template(path, settings) or _built_in(path, config, generation)
    if (path / "tokenizer.json").is_file():
        return Loaded(_read_json_form(path / "tokenizer.json"), template, formats.named(settings))
    built = formats.build(path, settings, config, generation)
    if built is not None:
        # ChatGLM2 and 3 call this token `sop`, as if it were a word of the text: here it has a name
        # of its own.
        return Loaded(
            built.tokenizer,
            template.replace("[gMASK]sop", "[gMASK]<sop>"),
            {**built.names, **formats.named(settings)},
        )
    if any((path / name).is_file() for name in OLD_FORMATS):
        return _load_with_transformers(path, template, settings)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _load_gguf(ggufs[0])
    if len(ggufs) > 1:
        raise NoTokenizer(
            f"{path} has {len(ggufs)} GGUF files; give one of them, for example {ggufs[0]}"
        )
    if not (path / "config.json").is_file():
        raise NoTokenizer(
            f"{path} holds no model: it has no config.json, no tokenizer.json and no .gguf file"
        )
    raise NoTokenizer(
        f"{path} has no tokenizer.json; name a tokenizer with --tokenizer, or serve token ids with --skip-tokenizer-init"
    )


def _read_json_form(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise NoTokenizer(f"{path} cannot be read: {error}") from None


def _built_in(path: Path, config: dict[str, Any], generation: dict[str, Any]) -> str:
    name = templates.choose(path, config, generation)
    if name:
        log.info(
            "%s ships no chat template: using the built-in one called %s (--chat-template overrides it)",
            path,
            name,
        )
    return templates.source(name) if name else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise NoTokenizer(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _template(path: Path, config: dict[str, Any]) -> str:
    """The newest place first: a file of its own, a JSON file, the tokenizer's configuration; of
    several templates the one named default."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text()
    template = _json(path / "chat_template.json").get("chat_template") or config.get(
        "chat_template"
    )
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""


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
    return Loaded(backend, template, formats.named(dict(converted.special_tokens_map)))


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
