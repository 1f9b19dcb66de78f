"""Requests that cost far more to serve than to send, as data. One that is found later is one more row.

Each is a whole HTTP body. Those of single-file size are made on demand: a test that does not send
one does not build it.
"""

from collections.abc import Callable
from typing import NamedTuple

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MIB = 1 << 20


class Abuse(NamedTuple):
    """One abusive request. `copies` of it are sent at once; `statuses` are the answers that it may
    get."""

    name: str
    path: str
    body: Callable[[], bytes]
    statuses: tuple[int, ...]
    copies: int = 1


def completion(prompt: bytes, more: bytes = b"") -> bytes:
    return b'{"max_tokens":1,"prompt":' + prompt + more + b"}"


def ids(count: int, token: bytes = b"7") -> bytes:
    return b"[" + token + (b"," + token) * (count - 1) + b"]"


def text(characters: int) -> bytes:
    return b'"' + (b"quick brown foxes jump; " * (characters // 24 + 1))[:characters] + b'"'


def chat(messages: bytes, more: bytes = b"") -> bytes:
    return b'{"max_tokens":1,"messages":[' + messages + b"]" + more + b"}"


def user(content: bytes) -> bytes:
    return b'{"role":"user","content":' + content + b"}"


def repeated(piece: bytes, count: int) -> bytes:
    return piece + (b"," + piece) * (count - 1)


def numbered(template: bytes, count: int) -> bytes:
    return b",".join(template % index for index in range(count))


LONG_ROLE = b'{"role":"' + b"assistant" + b'","content":""}'

CORPUS: tuple[Abuse, ...] = (
    # --- one text, many choices: encoded once
    Abuse(
        "a text with 128 choices",
        COMPLETIONS,
        lambda: completion(text(19_900), b',"n":128'),
        (200, 429),
        6,
    ),
    Abuse(
        "a long text with 128 choices",
        COMPLETIONS,
        lambda: completion(text(100_000), b',"n":128'),
        (200, 429),
        2,
    ),
    Abuse(
        "bad words with 128 choices",
        COMPLETIONS,
        lambda: completion(b'"hi"', b',"n":128,"bad_words":[' + repeated(text(60), 128) + b"]"),
        (200, 400),
        2,
    ),
    # --- conversations
    Abuse(
        "4,096 empty messages",
        CHAT,
        lambda: chat(repeated(LONG_ROLE, 4096) + b"," + user(b'"hi"')),
        (200, 400),
        20,
    ),
    Abuse(
        "4,096 short messages",
        CHAT,
        lambda: chat(repeated(user(b'"hi there"'), 4096)),
        (200, 400),
        4,
    ),
    Abuse(
        "400,000 parts",
        CHAT,
        lambda: chat(user(b"[" + repeated(b'{"type":"text","text":""}', 400_000) + b"]")),
        (400, 413),
    ),
    Abuse(
        "400,000 parts of another kind",
        CHAT,
        lambda: chat(user(b"[" + repeated(b'{"type":"text","x":0}', 400_000) + b"]")),
        (400, 413),
    ),
    Abuse(
        "template variables",
        CHAT,
        lambda: chat(
            user(b'"hi"'), b',"chat_template_kwargs":{' + numbered(b'"k%d":0', 500_000) + b"}"
        ),
        (400, 413),
    ),
    # --- keys and values
    Abuse(
        "500,000 unknown keys",
        COMPLETIONS,
        lambda: completion(b'"hi"', b"," + numbered(b'"k%d":null', 500_000)),
        (200, 400, 413),
    ),
    Abuse(
        "400,000 keys of a message",
        CHAT,
        lambda: chat(b'{"role":"user","content":"hi",' + numbered(b'"k%d":null', 400_000) + b"}"),
        (200, 400, 413),
    ),
    Abuse(
        "a bias of 500,000 tokens",
        COMPLETIONS,
        lambda: completion(b'"hi"', b',"logit_bias":{' + numbered(b'"%d":1', 500_000) + b"}"),
        (400, 413),
    ),
    Abuse(
        "a million stop strings",
        COMPLETIONS,
        lambda: completion(b'"hi"', b',"stop":[' + repeated(b'"a"', 1_000_000) + b"]"),
        (400, 413),
    ),
    Abuse(
        "deep nesting",
        COMPLETIONS,
        lambda: completion(b'"hi"', b',"metadata":' + b"[" * 1_000_000 + b"]" * 1_000_000),
        (200, 400, 413),
    ),
    Abuse(
        "31 MB of escapes",
        COMPLETIONS,
        lambda: completion(b'"' + b"\\u0041" * (31 * MIB // 6) + b'"'),
        (400, 413),
    ),
    # --- token ids
    Abuse("31 MB of ids", COMPLETIONS, lambda: completion(ids(15_000_000)), (400, 413)),
    Abuse(
        "4.2 million ids, truncated",
        COMPLETIONS,
        lambda: completion(ids(4_194_304), b',"truncate_prompt_tokens":5'),
        (200, 400, 413),
    ),
    Abuse(
        "1,024 prompts of ids",
        COMPLETIONS,
        lambda: completion(b"[" + repeated(ids(10_000), 1024) + b"]"),
        (200, 400, 413, 429),
    ),
    Abuse(
        "detokenize 4.2 million ids",
        "/detokenize",
        lambda: b'{"tokens":' + ids(4_194_304) + b"}",
        (200, 400),
    ),
    Abuse(
        "detokenize a context of ids",
        "/detokenize",
        lambda: b'{"tokens":' + ids(32_000) + b"}",
        (200,),
        8,
    ),
    # --- long texts
    Abuse("16 MB of text", COMPLETIONS, lambda: completion(text(16 * MIB)), (400, 413), 2),
    Abuse(
        "a word of 2 MB",
        COMPLETIONS,
        lambda: completion(b'"' + b"a" * (2 * MIB) + b'"'),
        (400, 413),
        2,
    ),
    Abuse("a text of 400 KB", COMPLETIONS, lambda: completion(text(400_000)), (200, 400), 4),
    Abuse("tokenize 4 MB", "/tokenize", lambda: b'{"prompt":' + text(4 * MIB) + b"}", (200, 400)),
    Abuse(
        "tokenize 300 KB with names",
        "/tokenize",
        lambda: b'{"return_token_strs":true,"prompt":' + text(300_000) + b"}",
        (200,),
        2,
    ),
    # --- answers that are large
    Abuse(
        "the scores of six contexts",
        COMPLETIONS,
        lambda: completion(b"[" + repeated(ids(32_000), 6) + b"]", b',"prompt_logprobs":20'),
        (200, 400),
    ),
    Abuse(
        "the scores of one context",
        COMPLETIONS,
        lambda: completion(ids(32_000), b',"prompt_logprobs":10'),
        (200,),
    ),
    Abuse(
        "an echo of a context with scores",
        COMPLETIONS,
        lambda: completion(ids(32_000), b',"echo":true,"logprobs":5'),
        (200,),
    ),
    Abuse(
        "1,024 choices",
        COMPLETIONS,
        lambda: completion(b'"hi"', b',"n":1024,"logprobs":20'),
        (200, 429),
    ),
)
