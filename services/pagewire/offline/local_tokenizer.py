"""The tokenizer of a model in the program itself: for those who render or count before they
generate. Knows files, no services."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagewire_protocol.structs import Chat

from ..tokenizer.load import load
from ..tokenizer.template import ChatTemplate, TemplateRefused, read_option


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


def renderer(path: Path, chat_template: str) -> Callable[[Chat], str]:
    """Renders conversations with this template instead of the model's own. The function raises
    ValueError when the template refuses."""
    template = ChatTemplate(read_option(chat_template), load(path).names)

    def render(chat: Chat) -> str:
        try:
            return template.render(chat)
        except TemplateRefused as refusal:
            raise ValueError(str(refusal)) from None

    return render
