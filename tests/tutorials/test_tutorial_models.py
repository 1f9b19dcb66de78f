"""The models that the tutorials name: their published configurations are understood, and have as
many weights as they are known for.

That each family computes what it should is shown in tests/worker; some are served here through the
whole stack.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pagewire.checkpoint import chat_templates
from pagewire.worker.models import describe
from tutorials import tiny_models

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
"""Billions of weights, and what of the repository's config.json matters."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configuration_is_understood(name: str) -> None:
    assert describe(PUBLISHED[name]["config"]).parameters / 1e9 == pytest.approx(
        PUBLISHED[name]["billions"], rel=0.003
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen/Qwen-1_8B-Chat", "chatml"),
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("chavinlo/alpaca-native", "alpaca"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2"),
        ("THUDM/chatglm3-6b", "chatglm3"),
        ("microsoft/phi-1_5", "phi-1_5"),
        ("facebook/opt-125m", ""),
        ("google/gemma-2b", ""),
    ],
)
def test_who_gets_a_chat_template_without_shipping_one(name: str, wanted: str) -> None:
    folder = Path("/hub") / f"models--{name.replace('/', '--')}" / "snapshots" / "0123"
    assert chat_templates.choose(folder, PUBLISHED[name]["config"], {}) == wanted


def test_chatglm_with_its_own_tokenizer_and_without_its_code(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny_models.save_chatglm(tmp_path / "chatglm3-6b")
    stack = serve(f"pagewire serve {path} --trust-remote-code")
    messages: Any = [{"role": "user", "content": "你好"}]
    answer = stack.client().chat.completions.create(
        model=str(path), messages=messages, max_tokens=16, temperature=0
    )
    assert answer.choices[0].message.content and answer.choices[0].finish_reason in (
        "stop",
        "length",
    )
    body = {
        "model": str(path),
        "prompt": "晚上睡不着应该怎么办",
        "max_tokens": 8,
        "temperature": 0,
        "echo": True,
    }
    assert (
        stack.post("/completions", body)
        .json()["choices"][0]["text"]
        .startswith("晚上睡不着应该怎么办")
    )
