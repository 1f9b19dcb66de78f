"""The first tutorial: Qwen-1_8B-Chat from a directory, offline, behind a server, asked by the
OpenAI client and by curl."""

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from printed import printed_text

SERVER = (
    "python3 -m pagewire.entrypoints.openai.api_server --model {model} --host 0.0.0.0 --port 8080 --dtype auto --max-num-seqs 32"
    " --max-model-len 4096 --tensor-parallel-size 1 --trust-remote-code"
)


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any], qwen1: str) -> Any:
    return serve(SERVER.format(model=qwen1))


def test_offline_infer(run: Callable[..., Any], qwen1: str) -> None:
    """The program has no `if __name__ == "__main__"`, and the repository's code, which it trusts,
    is not needed."""
    done = run(f"python offline_infer.py {qwen1}")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    printed_text(first, "Prompt: '你好，你是谁？', Generated text: ")
    printed_text(second, "Prompt: '法国的首都在哪里？', Generated text: ")
    bar = done.stderr.replace("\r", "\n").splitlines()[-1]
    numbers = r"\[\d\d:\d\d<\d\d:\d\d, +[\d.]+(it/s|s/it), est\. speed input: [\d.]+ toks/s, output: [\d.]+ toks/s\]"
    assert re.match(r"Processed prompts: 100%\|█+\| 2/2 " + numbers, bar), bar


def test_the_server_says_that_it_is_ready_and_where(server: Any, qwen1: str) -> None:
    line = server.wait_line("Pagewire serves")
    assert line == f"Pagewire serves {qwen1} at {server.url}"
    server.wait_line("listening on 127.0.0.1:")
    server.wait_line("longest context 4,096 tokens")


def test_the_model_is_listed_by_the_very_words_of_the_command(server: Any, qwen1: str) -> None:
    listed = server.get("/v1/models")
    (model,) = listed["data"]
    assert (
        listed["object"] == "list"
        and model["object"] == "model"
        and model["id"] == qwen1
        and qwen1.endswith("/")
    )
    assert model["root"] == qwen1 and model["parent"] is None and model["max_model_len"] == 4096
    assert (
        model["owned_by"]
        and model["created"] > 0
        and model["permission"][0]["object"] == "model_permission"
    )


@pytest.mark.usefixtures("server")
def test_api_infer_with_the_openai_client(run: Callable[..., Any], server: Any, qwen1: str) -> None:
    done = run(f"python api_infer.py {server.url}")
    assert done.returncode == 0, done.stderr
    model, prompt, response, reason = done.stdout.splitlines()
    assert model == f"Model: {qwen1}"
    assert prompt == "Prompt: 描述一下北京的秋天"
    printed_text(response, "Response: ")
    assert reason == "Reason: length, 16" or reason.startswith("Reason: stop")


def test_curl(server: Any, qwen1: str) -> None:
    body = json.dumps(
        {"model": qwen1, "prompt": "描述一下北京的秋天", "max_tokens": 512}, ensure_ascii=False
    )
    command = [
        "curl",
        "-sS",
        f"{server.url}/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    answer = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    )
    assert (
        answer["object"] == "text_completion"
        and answer["id"].startswith("cmpl-")
        and answer["model"] == qwen1
    )
    (choice,) = answer["choices"]
    assert set(choice) >= {"index", "text", "logprobs", "finish_reason", "stop_reason"} and choice[
        "finish_reason"
    ] in ("stop", "length")
    usage = answer["usage"]
    assert (
        1 <= usage["completion_tokens"] <= 512
        and usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    )


def test_greedy_answers_are_the_same_each_time_and_chinese_comes_back_whole(
    server: Any, qwen1: str
) -> None:
    body = {
        "model": qwen1,
        "prompt": "描述一下北京的秋天",
        "max_tokens": 24,
        "temperature": 0,
        "echo": True,
    }
    first, second = (
        server.post("/completions", body).json()["choices"][0]["text"] for _ in range(2)
    )
    assert first == second and first.startswith("描述一下北京的秋天")
    said = ""
    with server.client().completions.create(**body, stream=True) as stream:
        for chunk in stream:
            said += chunk.choices[0].text
    assert said == first


def test_a_chat_although_the_repository_ships_no_template(server: Any, qwen1: str) -> None:
    messages = [
        {"role": "system", "content": "你是一个有用的助手。"},
        {"role": "user", "content": "你好"},
    ]
    answer = server.post(
        "/chat/completions", {"model": qwen1, "messages": messages, "max_tokens": 8}
    ).json()
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["id"].startswith(
        "chatcmpl-"
    )
