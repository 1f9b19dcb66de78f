"""requests and curl, as the tutorials use them."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import requests

QUESTION = {
    "messages": [{"role": "user", "content": "描述一下北京的秋天"}],
    "max_tokens": 12,
    "temperature": 0,
}


@pytest.mark.parametrize("headers", [{"Content-Type": "application/json"}, None])
def test_requests_with_a_dumped_body(endpoint: Any, headers: dict[str, str] | None) -> None:
    data = {"model": endpoint.model, "prompt": "JupySQL is", "max_tokens": 100, "temperature": 0}
    response = requests.post(
        f"{endpoint.base}/completions", headers=headers, data=json.dumps(data), timeout=30
    )
    assert response.status_code == 200 and response.json()["choices"][0]["text"]
    assert response.json()["usage"]["completion_tokens"] == 100


def test_requests_streams(endpoint: Any) -> None:
    text = ""
    with requests.post(
        f"{endpoint.base}/chat/completions",
        json={**QUESTION, "stream": True},
        stream=True,
        timeout=30,
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines(decode_unicode=True):
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get(
                    "content", ""
                )
    whole = requests.post(f"{endpoint.base}/chat/completions", json=QUESTION, timeout=30).json()
    assert text == whole["choices"][0]["message"]["content"] != ""


def test_requests_without_the_key(guarded: Any) -> None:
    response = requests.get(f"{guarded.base}/models", timeout=10)
    assert response.status_code == 401 and response.text == '{"error": "Unauthorized"}'
    assert requests.get(
        f"{guarded.base}/models", headers={"Authorization": f"Bearer {guarded.key}"}, timeout=10
    ).ok
    assert requests.get(f"{guarded.url}/health", timeout=10).ok
    assert (
        requests.post(f"{guarded.url}/tokenize", json={"prompt": "x"}, timeout=10).status_code
        == 401
    )


def test_tokens_there_and_back(endpoint: Any) -> None:
    told = requests.post(
        f"{endpoint.url}/tokenize",
        json={"prompt": "描述一下北京的秋天", "return_token_strs": True},
        timeout=10,
    ).json()
    assert (
        told["count"] == len(told["tokens"]) == len(told["token_strs"])
        and told["max_model_len"] == 4096
    )
    back = requests.post(
        f"{endpoint.url}/detokenize", json={"tokens": told["tokens"]}, timeout=10
    ).json()
    assert back == {"prompt": "描述一下北京的秋天"}


def test_metrics_have_the_names_that_boards_ask_for(endpoint: Any) -> None:
    requests.post(f"{endpoint.base}/completions", json={"prompt": "a", "max_tokens": 5}, timeout=10)
    text = requests.get(f"{endpoint.url}/metrics", timeout=10).text
    for name in (
        "time_to_first_token",
        "inter_token_latency",
        "time_per_output_token",
        "e2e_request_latency",
        "request_queue_time",
    ):
        assert (
            f'vllm:{name}_seconds_bucket{{engine="0",le="+Inf",model_name="google/gemma-2b"}}'
            in text
        ), name
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
    ):
        assert f'\nvllm:{name}{{engine="0",model_name="google/gemma-2b"}} ' in text, name


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    return subprocess.run(
        ["curl", "-sS", "--max-time", "30", *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_curl_completes_and_chats(endpoint: Any, guarded: Any) -> None:
    body = json.dumps(
        {"model": endpoint.model, "prompt": "描述一下北京的秋天", "max_tokens": 32},
        ensure_ascii=False,
    )
    answer = json.loads(
        curl(f"{endpoint.base}/completions", "-H", "Content-Type: application/json", "-d", body)
    )
    assert (
        answer["object"] == "text_completion" and answer["choices"][0]["finish_reason"] == "length"
    )
    body = json.dumps({"model": guarded.model, **QUESTION}, ensure_ascii=False)
    headers = ("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {guarded.key}")
    answer = json.loads(curl(f"{guarded.base}/chat/completions", *headers, "-d", body))
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_curl_streams(endpoint: Any) -> None:
    body = json.dumps({**QUESTION, "stream": True})
    answer = curl(
        "-N",
        "-i",
        f"{endpoint.base}/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    )
    head, _, events = answer.replace("\r\n", "\n").partition("\n\n")
    assert "200 OK" in head and "text/event-stream" in head
    assert (
        events.startswith("data: {")
        and events.endswith("data: [DONE]\n\n")
        and events.count("data: ") > 3
    )


def test_curl_without_a_content_type_is_told_what_to_do(endpoint: Any) -> None:
    answer = json.loads(curl(f"{endpoint.base}/completions", "-d", '{"prompt": "a"}'))
    assert answer["code"] == 415 and "application/json" in answer["message"]


def test_curl_over_https(start: Any) -> None:
    tls = Path(__file__).parents[1] / "api" / "tls"
    flags = ("--ssl-certfile", str(tls / "cert.pem"), "--ssl-keyfile", str(tls / "key.pem"))
    secure = start("secure", "EMPTY", *flags)
    assert secure.url.startswith("https://127.0.0.1:")
    question = (
        "-H",
        "Content-Type: application/json",
        "-d",
        json.dumps({**QUESTION, "stream": True}),
    )
    answer = curl(
        "-N", "--cacert", str(tls / "cert.pem"), f"{secure.base}/chat/completions", *question
    )
    assert answer.endswith("data: [DONE]\n\n")
    with pytest.raises(subprocess.CalledProcessError):
        curl(f"{secure.base}/models")
