"""The tokenizer of a model in the program itself: for those who render or count before they
generate. Knows files, no services."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pagewire_protocol.structs import Chat

from ..checkpoint.chat_templates import read_option
from ..checkpoint.end_tokens import ending, turn_ends
from ..tokenizer.load import load
from ..tokenizer.template import ChatTemplate, TemplateRefused


def as_transformers(path: Path, chat_template: str = "") -> Any:
    """transformers' class over the very tokenizer that the service uses. Raises ValueError,
    ImportError."""
    from transformers import PreTrainedTokenizerFast  # type: ignore[import-untyped]

    loaded = load(path)
    template = read_option(chat_template) if chat_template else loaded.chat_template
    names = {
        name: token
        for name, token in loaded.names.items()
        if name in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=loaded.tokenizer,
        name_or_path=str(path),
        clean_up_tokenization_spaces=False,
        **names,
    )
    made.chat_template = template or None
    return made


class CallTemplate(NamedTuple):
    """A chat template that one call uses instead of the model's own."""

    render: Callable[[Chat], str]
    """Raises ValueError when the template refuses."""
    end_token_ids: tuple[int, ...]
    """The tokens that it ends turns with."""


def call_template(path: Path, chat_template: str, defaults: Mapping[str, Any]) -> CallTemplate:
    """`path`: of the tokenizer. `chat_template`: as of --chat-template. `defaults`: its variables
    where a call does not give them. Raises ValueError."""
    loaded = load(path)
    source = read_option(chat_template)
    template = ChatTemplate(source, loaded.names, defaults=dict(defaults))

    def find(texts: Iterable[str]) -> dict[str, int]:
        ids = {text: loaded.tokenizer.token_to_id(text) for text in texts}
        return {text: token for text, token in ids.items() if token is not None}

    def render(chat: Chat) -> str:
        try:
            return template.render(chat)
        except TemplateRefused as refusal:
            raise ValueError(str(refusal)) from None

    return CallTemplate(render, tuple(ending(turn_ends(source, find)).values()))
