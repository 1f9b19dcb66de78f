"""What a prompt may hold, how long it may be, and which part of it stays where the client asked for
a shorter one.

Both who owns a request and the tokenizer decide this, so the rules and their words stand here once.
"""

import re
from typing import Final

_TOO_LONG: Final = re.compile(
    r"This model's maximum context length is (\d+) tokens"
    r"(?:.*\((\d+) in the prompt|.*alone are (\d+) tokens)?"
)


def kept_prompt_tokens(truncate_prompt: int, max_model_len: int, completion_tokens: int) -> int:
    """How many of the prompt's last tokens stay; 0: all of them.

    `truncate_prompt` is the field of `TextOptions`: a number of tokens, 0 for all, or -1 for as
    many as the context of `max_model_len` tokens holds beside `completion_tokens`. Where the
    context has no room for a prompt at all, the prompt stays whole and is then refused as too
    long: an answer to a cut that leaves nothing would be an answer to another question.
    """
    if truncate_prompt >= 0:
        return truncate_prompt
    return max(0, max_model_len - completion_tokens)


def truncated_ids(ids: bytes, kept: int) -> bytes:
    """The last `kept` tokens of an int32 column; all of it when `kept` is 0."""
    return ids[-4 * kept :] if kept else ids


def too_long(max_model_len: int, prompt_tokens: int, completion_tokens: int) -> str:
    """The refusal of a request that does not fit the context."""
    return (
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the prompt, "
        f"{completion_tokens} for the completion). Reduce the prompt or max_tokens."
    )


def far_too_long(max_model_len: int, characters: int, encoded: int, tokens: int) -> str:
    """The refusal of a text that does not fit the context, of which only the first `encoded`
    characters were encoded: they alone are `tokens` tokens or more."""
    return (
        f"This model's maximum context length is {max_model_len} tokens. However, the prompt has "
        f"{characters} characters, of which the first {encoded} alone are {tokens} tokens or more. "
        "Shorten the prompt."
    )


def too_many_characters(max_model_len: int, characters: int, most: int) -> str:
    """The refusal of a text that is longer than any that fits the context."""
    if not max_model_len:
        return f"The prompt has {characters} characters; at most {most} are allowed."
    return (
        f"This model's maximum context length is {max_model_len} tokens, which have at most "
        f"{most} characters. However, the prompt has {characters}. Shorten the prompt."
    )


def said_lengths(refusal: str) -> tuple[int, int] | None:
    """The tokens of the prompt, at least (0: not known), and of the context, which one of the three
    refusals above says; None for any other."""
    match = _TOO_LONG.match(refusal)
    if match is None:
        return None
    return int(match[2] or match[3] or 0), int(match[1])


def outside_vocabulary(token: object, vocab_size: int) -> str:
    """The refusal of a token id that the model does not have."""
    return f"token id {token} is outside the model's vocabulary of {vocab_size} tokens"
