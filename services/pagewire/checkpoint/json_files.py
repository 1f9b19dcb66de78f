"""JSON files of a checkpoint, and the chat template among them."""

import json
from pathlib import Path
from typing import Any, Final

from .errors import Unsupported

Config = dict[str, Any]
TOOL_USE_FILE: Final = "additional_chat_templates/tool_use.jinja"
"""Where transformers saves the template of that name, if the default one is a file too."""


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
    several templates the one named default, with the one named tool_use in it for requests that
    have tools. Empty where there is none. Raises Unsupported."""
    if (directory / "chat_template.jinja").is_file():
        named: Config = {"default": (directory / "chat_template.jinja").read_text()}
        if (directory / TOOL_USE_FILE).is_file():
            named["tool_use"] = (directory / TOOL_USE_FILE).read_text()
    else:
        template = read_object(directory / "chat_template.json").get(
            "chat_template"
        ) or settings.get("chat_template")
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template}
        named = template if isinstance(template, dict) else {"default": template}
    return by_tools(named.get("tool_use"), named.get("default"))


def by_tools(with_tools: object, default: object) -> str:
    """One template of two, as far as they are there: for requests that have tools and for others.
    `{{ "" }}` keeps spaces and ends of lines that jinja would take away beside a statement."""
    if not isinstance(default, str):
        return ""
    if not isinstance(with_tools, str):
        return default
    sources = (source.removesuffix("\n") for source in (with_tools, default))
    branches = ('{{ "" }}' + source + '{{ "" }}' for source in sources)
    return "{% if tools %}" + "{% else %}".join(branches) + "{% endif %}"


def added_tokens(settings: Config) -> dict[str, int]:
    """The ids of the tokens that tokenizer_config.json adds to a vocabulary, by text. Raises
    Unsupported."""
    return {entry["content"]: index for index, entry in added_entries(settings).items()}


def added_entries(settings: Config) -> dict[int, Config]:
    """These tokens as the file has them, each with its `content`; by id. Raises Unsupported."""
    entries: Any = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise Unsupported(
            "added_tokens_decoder in tokenizer_config.json is no object of ids and tokens; correct it there"
        )
    for index, entry in entries.items():
        if not index.isdecimal() or token_text(entry) is None or not isinstance(entry, dict):
            raise Unsupported(
                f"added_tokens_decoder in tokenizer_config.json has {entry!r:.80} for {index!r:.20}, "
                "where an id and an object with `content` are expected; correct it there"
            )
    return {int(index): entry for index, entry in entries.items()}


def token_text(value: object) -> str | None:
    """A special token's text, which a file gives as it is or as an object with `content`; None for
    anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
