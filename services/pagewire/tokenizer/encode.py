"""A prompt as token ids, and whether it can be served at all. It knows what a request says, not who sent it or where it goes.

Everything that is wrong with a request is a `Refused`, whose text is for the client and has the numbers.
"""

from typing import Final

import numpy as np
from msgspec.structs import replace
from pagewire_protocol.messages import Generate, Prompt, Roster, Sampling
from tokenizers import Tokenizer

from .template import ChatTemplate, TemplateRefused

LONG: Final = 20_000
"""Characters from which on a prompt is encoded beside the loop: about 10 ms of work."""


class Refused(Exception):
    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


def size_of(prompt: Prompt) -> int:
    """Characters to be encoded."""
    if prompt.chat is not None:
        return sum(len(message.content) for message in prompt.chat.messages)
    return len(prompt.text or "")


def param_of(prompt: Prompt) -> str:
    """The client's name for the prompt."""
    return "messages" if prompt.chat is not None else "prompt"


class Encoder:
    """Thread-safe. `tokenizer` is None under --skip-tokenizer-init."""

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> None:
        self._tokenizer, self._template = tokenizer, template

    def encode(self, request: Generate) -> bytes:
        """The prompt as an int32 column. Raises Refused."""
        prompt = request.prompt
        match (prompt.ids, prompt.text, prompt.chat):
            case (bytes() as ids, None, None):
                if len(ids) % 4:
                    raise Refused(f"the token ids are {len(ids)} bytes long, which is no multiple of 4", "prompt")
                return ids
            case (None, str() as text, None):
                return self._encode_text(text, request.add_special_tokens, "prompt")
            case (None, None, chat) if chat is not None:
                return self._encode_text(self._render(request), False, "messages")
            case _:
                raise Refused("a prompt is exactly one of text, token ids and messages", "prompt")

    def _render(self, request: Generate) -> str:
        if self._tokenizer is None:
            raise _no_tokenizer("messages")
        if self._template is None or request.prompt.chat is None:
            raise Refused("this model has no chat template: start the server with --chat-template, or use /v1/completions", "messages")
        try:
            return self._template.render(request.prompt.chat)
        except TemplateRefused as refusal:
            raise Refused(str(refusal)[:4000]) from None

    def _encode_text(self, text: str, add_special_tokens: bool, param: str) -> bytes:
        if self._tokenizer is None:
            raise _no_tokenizer(param)
        # The batch call keeps no offsets and releases the interpreter's lock, so a long prompt in a thread delays nobody.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, np.int32).tobytes()


def _no_tokenizer(param: str) -> Refused:
    return Refused("this server was started with --skip-tokenizer-init and takes token ids only, not text", param)


def check(request: Generate, ids: bytes, roster: Roster) -> Sampling:
    """The sampling to submit, with max_tokens filled in. Raises Refused when the model cannot hold the request."""
    param = param_of(request.prompt)
    prompt = np.frombuffer(ids, np.int32)
    if not len(prompt):
        raise Refused("the prompt is empty: it has 0 tokens", param)
    outside = prompt[(prompt < 0) | (prompt >= roster.vocab_size)]
    if len(outside):
        raise Refused(f"token id {outside[0]} is outside the model's vocabulary of {roster.vocab_size} tokens", param)
    room = roster.max_model_len - len(prompt)
    if request.max_tokens_is_rest:
        if room < 1:
            raise Refused(_too_long(roster.max_model_len, len(prompt), 1), param)
        return replace(request.sampling, max_tokens=room)
    if request.sampling.max_tokens > room:
        raise Refused(_too_long(roster.max_model_len, len(prompt), request.sampling.max_tokens), param if room < 1 else "max_tokens")
    return request.sampling


def _too_long(context: int, prompt: int, completion: int) -> str:
    return (
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the prompt, {completion} for the completion). Reduce the prompt or max_tokens."
    )
