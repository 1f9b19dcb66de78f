"""JSON files of a checkpoint, and the chat template among them."""

import json
from pathlib import Path
from typing import Any

from .errors import Unsupported

Config = dict[str, Any]


def read_object(path: Path) -> Config:
    """The object in `path`; empty where there is no such file, or another kind of value in it.
    Raises Unsupported for a file that is not JSON."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise Unsupported(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def tokenizer_settings(directory: Path) -> Config:
    """special_tokens_map.json and tokenizer_config.json, which comes first where both have a key.
    Raises Unsupported."""
    return {
        **read_object(directory / "special_tokens_map.json"),
        **read_object(directory / "tokenizer_config.json"),
    }


def chat_template(directory: Path, settings: Config) -> str:
    """The newest place first: a file of its own, a JSON file, the tokenizer's `settings`; of
    several templates the one named default. Empty where there is none. Raises Unsupported."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text()
    template = read_object(directory / "chat_template.json").get("chat_template") or settings.get(
        "chat_template"
    )
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""


def added_tokens(settings: Config) -> dict[str, int]:
    """The ids of the tokens that tokenizer_config.json adds to a vocabulary, by text."""
    entries: Config = settings.get("added_tokens_decoder") or {}
    return {entry["content"]: int(index) for index, entry in entries.items()}


def token_text(value: object) -> str | None:
    """A special token's text, which a file gives as it is or as an object with `content`; None for
    anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
