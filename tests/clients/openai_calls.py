"""What programs do with the OpenAI client, in words that its versions 1.17 and of today have in
common.

python openai_calls.py BASE_URL KEY      prints one JSON object: what each call gave
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

MESSAGES = [{"role": "user", "content": "Tell me in one sentence what Mexico is famous for"}]
SYSTEM = [{"role": "system", "content": "You're a helpful assistant."}, *MESSAGES]


def failure(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except openai.APIStatusError as error:
        return {
            "kind": type(error).__name__,
            "status": error.status_code,
            "type": error.type,
            "code": error.code,
            "text": str(error),
        }
    raise AssertionError("it was to fail")


def streamed_chat(client: OpenAI, model: str, **options: Any) -> dict[str, Any]:
    chunks = list(
        client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **options)
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    return {
        "text": "".join(texts),
        "role": chunks[0].choices[0].delta.role,
        "reason": [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1],
        "usage": chunks[-1].model_dump().get("usage"),
    }


async def many(base_url: str, key: str, model: str) -> list[str]:
    """Twenty at once."""
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(
                model=model, prompt=f"Number {i} is", max_tokens=8, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(i) for i in range(20)))


def calls(client: OpenAI, model: str) -> dict[str, Any]:
    chat, complete = client.chat.completions.create, client.completions.create
    greedy = {"model": model, "temperature": 0, "max_tokens": 20}
    beams = {"use_beam_search": True, "length_penalty": 0.5, "early_stopping": True}
    return {
        "retrieved": client.models.retrieve(model).id,
        "completion": complete(prompt="JupySQL is", **greedy).model_dump(),
        "several": [
            c.text
            for c in complete(prompt=["a", "b"], n=2, seed=3, model=model, max_tokens=5).choices
        ],
        "scored": complete(
            prompt="JupySQL is", echo=True, logprobs=1, **{**greedy, "max_tokens": 1}
        ).model_dump(),
        "best": len(complete(prompt="a", best_of=3, n=2, model=model, max_tokens=5).choices),
        "beams": [
            c.text for c in complete(prompt="a", n=2, best_of=3, extra_body=beams, **greedy).choices
        ],
        "extra": complete(
            prompt="a",
            model=model,
            max_tokens=5,
            extra_body={"top_k": 1, "repetition_penalty": 1.1},
        )
        .choices[0]
        .text,
        "biased": complete(prompt="a", logit_bias={"17": -100}, **greedy).choices[0].finish_reason,
        "text_stream": "".join(
            chunk.choices[0].text for chunk in complete(prompt="JupySQL is", stream=True, **greedy)
        ),
        "chat": chat(messages=MESSAGES, **greedy).model_dump(),
        "chat_logprobs": chat(messages=MESSAGES, logprobs=True, top_logprobs=2, **greedy)
        .choices[0]
        .logprobs.content[0]
        .model_dump(),
        "chat_stream": streamed_chat(
            client,
            model,
            temperature=0,
            max_tokens=20,
            extra_body={"stream_options": {"include_usage": True}},
        ),
        "no_model": failure(lambda: chat(model="no/such", messages=MESSAGES)),
        "bad": failure(lambda: chat(model=model, messages=MESSAGES, max_tokens=0)),
        "bad_stream": failure(lambda: complete(model=model, prompt="a", n=5000, stream=True)),
    }


def main(base_url: str, key: str) -> None:
    client = OpenAI(base_url=base_url, api_key=key, max_retries=0)
    model = client.models.list().data[0].id
    told = {
        "version": openai.__version__,
        "model": model,
        **calls(client, model),
        "system": chat_with_system(client, model),
        "keyless": wrong_key(base_url),
        "many": asyncio.run(many(base_url, key, model)),
    }
    print(json.dumps(told))


def chat_with_system(client: OpenAI, model: str) -> Any:
    try:
        return (
            client.chat.completions.create(model=model, messages=SYSTEM, max_tokens=5)
            .choices[0]
            .message.role
        )
    except openai.BadRequestError as error:
        return {"type": error.type, "code": error.code, "text": str(error)}


def wrong_key(base_url: str) -> Any:
    try:
        return OpenAI(base_url=base_url, api_key="EMPTY", max_retries=0).models.list().data[0].id
    except openai.AuthenticationError as error:
        return str(error)


main(*sys.argv[1:])
