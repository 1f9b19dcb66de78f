"""The second tutorial: OPT offline, Gemma behind a server, requests and the OpenAI client, dtype,
keys, a Dockerfile, restarts."""

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from openai import NotFoundError, OpenAI
from pagewire import LLM, SamplingParams

PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
DOCKERFILE = """
FROM pytorch/pytorch:2.1.2-cuda12.1-cudnn8-devel
WORKDIR /srv
RUN pip install pagewire --no-cache-dir
ENTRYPOINT ["python", "-m", "pagewire.entrypoints.openai.api_server", \\
            "--host", "0.0.0.0", "--port", "80", \\
            "--model", "google/gemma-2b-it", \\
            # depending on the GPU
            "--dtype=half"]
"""


@pytest.fixture(scope="module")
def opt(in_process: None, downloaded: Callable[..., Path]) -> Iterator[LLM]:
    downloaded("facebook/opt-125m")
    with LLM(model="facebook/opt-125m") as llm:
        yield llm


@pytest.fixture(scope="module")
def gemma(serve: Callable[..., Any], downloaded: Callable[..., Path]) -> Any:
    """The base model, with the data type that is the default."""
    downloaded("google/gemma-2b")
    return serve(
        "python -m pagewire.entrypoints.openai.api_server --model=google/gemma-2b --dtype=auto"
    )


def entry_point(dockerfile: str) -> list[str]:
    """Its words, as docker reads them: lines joined, comment lines left out."""
    lines = [line for line in dockerfile.splitlines() if not line.strip().startswith("#")]
    (words,) = re.findall(r"^ENTRYPOINT (\[.*\])", "\n".join(lines).replace("\\\n", " "), re.M)
    return json.loads(words)


@pytest.fixture(scope="module")
def key() -> str:
    return secrets.token_urlsafe()


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Any], downloaded: Callable[..., Path], key: str) -> Any:
    """The instruction-tuned model, started by the words of the tutorial's Dockerfile, with a key in
    the environment."""
    downloaded("google/gemma-2b-it")
    return serve(" ".join(entry_point(DOCKERFILE)), VLLM_API_KEY=key)


def test_the_first_program(opt: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = opt.generate(PROMPTS, SamplingParams(temperature=0.8, top_p=0.95))
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", Generated text: ")[0] for line in lines] == [
        f"Prompt: {prompt!r}" for prompt in PROMPTS
    ]
    assert all(
        output.finished and 1 <= len(output.outputs[0].token_ids) <= 16 for output in outputs
    )


def test_it_says_what_transformers_pipeline_says(opt: LLM, downloaded: Callable[..., Path]) -> None:
    """Greedily, in float32 as the checkpoint is."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        TextGenerationPipeline,
    )

    path = downloaded("facebook/opt-125m")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    assert model.dtype is torch.float32
    generator = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=2)
    (wanted,) = generator("Hello, my name is", generation_config=config, return_full_text=False)
    (output,) = opt.generate(
        "Hello, my name is", SamplingParams(temperature=0, max_tokens=12), use_tqdm=False
    )
    assert output.outputs[0].text == wanted["generated_text"] != ""


def test_a_flask_endpoint_answers_many_at_once(opt: LLM) -> None:
    """The tutorial's program crashes when several users come at a time. Here their calls wait for
    each other."""
    from flask import Flask, jsonify, request

    app, sampling_params = Flask(__name__), SamplingParams(temperature=0.8, top_p=0.95)

    @app.route("/generate", methods=["POST"])
    def generate() -> Any:
        outputs = opt.generate(
            request.get_json().get("prompts", []), sampling_params, use_tqdm=False
        )
        return jsonify(
            [
                {"prompt": output.prompt, "generated_text": output.outputs[0].text}
                for output in outputs
            ]
        )

    def user(number: int) -> list[dict[str, str]]:
        answer = app.test_client().post(
            "/generate", json={"prompts": [f"User {number} says", "and then"]}
        )
        assert answer.status_code == 200
        return answer.get_json()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(user, range(12)))
    assert [answer[0]["prompt"] for answer in answers] == [
        f"User {number} says" for number in range(12)
    ]
    assert all(
        isinstance(answer[0]["generated_text"], str) and answer[1]["prompt"] == "and then"
        for answer in answers
    )


def test_sanity_checks(run: Callable[..., Any], downloaded: Callable[..., Path]) -> None:
    downloaded("facebook/opt-125m")
    assert run("python -c 'import torch; print(torch.cuda.is_available())'").stdout in (
        "True\n",
        "False\n",
    )
    done = run("python check_install.py")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    assert "Processed prompts: 100%" in done.stderr


def test_requests_with_a_dumped_body(gemma: Any) -> None:
    data = {"model": "google/gemma-2b", "prompt": "JupySQL is", "max_tokens": 100, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    answers = [
        requests.post(
            f"{gemma.url}/completions", headers=headers, data=json.dumps(data), timeout=60
        )
        for _ in range(2)
    ]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert texts[0] == texts[1] != "" and answers[0].json()["usage"]["completion_tokens"] <= 100


def test_the_openai_client_with_a_key_that_nobody_asked_for(gemma: Any) -> None:
    completion = gemma.client().completions.create(
        model="google/gemma-2b", prompt="JupySQL is", max_tokens=20
    )
    assert completion.choices[0].text is not None and completion.usage.completion_tokens <= 20
    assert gemma.client().models.retrieve("google/gemma-2b").id == "google/gemma-2b"


def test_the_tutorial_s_slip_of_asking_for_another_model_is_named(gemma: Any) -> None:
    messages: Any = [
        {"role": "user", "content": "Tell me in one sentence what Mexico is famous for"}
    ]
    with pytest.raises(NotFoundError) as caught:
        gemma.client().chat.completions.create(model="google/gemma-2b-it", messages=messages)
    error = caught.value.response.json()["error"]
    assert error["message"].startswith("The model `google/gemma-2b-it` does not exist.")
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)


def test_a_base_model_does_not_chat_and_says_which_flag_would_help(gemma: Any) -> None:
    answer = gemma.post(
        "/chat/completions",
        {"model": "google/gemma-2b", "messages": [{"role": "user", "content": "Hi"}]},
    )
    assert answer.status_code == 400 and "--chat-template" in answer.json()["message"]


def test_half_is_float16(guarded: Any) -> None:
    guarded.wait_line("as torch.float16 on")


def test_chats_keys_and_a_template_without_a_system_role(
    guarded: Any, key: str, call_openai: Any
) -> None:
    program = str(Path(__file__).parent / "programs" / "chat_client.py")
    told = json.loads(call_openai(program, guarded.url, key, "google/gemma-2b-it"))
    assert isinstance(told["content"], str) and told["reason"] in ("stop", "length")
    four = {
        "message": "System role not supported",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
    assert told["body"] == {"object": "error", **four, "error": four}
    if call_openai.version == "1.17.1":
        shown = "{'object': 'error', 'message': 'System role not supported', 'type': 'BadRequestError', 'param': None, 'code': 400"
        assert told["system"].startswith(f"BadRequestError: Error code: 400 - {shown}")
        assert told["keyless"] == "AuthenticationError: Error code: 401 - {'error': 'Unauthorized'}"
    else:
        assert told["system"] == "BadRequestError: Error code: 400 - System role not supported"
        assert told["keyless"].startswith("AuthenticationError: Error code: 401")


def test_the_key_guards_everything_but_the_probes(guarded: Any, key: str) -> None:
    base = guarded.url.removesuffix("/v1")
    for path in ("/v1/models", "/v1/completions", "/tokenize"):
        answer = requests.get(base + path, timeout=10)
        assert answer.status_code == 401 and answer.text == '{"error": "Unauthorized"}'
    assert all(
        requests.get(base + path, timeout=10).status_code == 200
        for path in ("/health", "/version", "/metrics")
    )
    assert (
        OpenAI(api_key=key, base_url=guarded.url).models.list().data[0].id == "google/gemma-2b-it"
    )
    assert (
        guarded.client()
        .with_options(api_key=key)
        .completions.create(model="google/gemma-2b-it", prompt="a", max_tokens=2)
        .choices
    )


def test_a_key_made_in_the_shell() -> None:
    made = "export VLLM_API_KEY=$(python -c 'import secrets; print(secrets.token_urlsafe())'); echo $VLLM_API_KEY"
    command = made.replace("python", sys.executable)
    assert (
        len(
            subprocess.run(
                ["sh", "-c", command], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
        >= 40
    )


def test_a_service_manager_sees_failures(run: Callable[..., Any], tmp_path: Path) -> None:
    """`Restart=on-failure` needs an exit code that is not 0; the last line is the reason."""
    for model in ("/no/such/model", str(tmp_path)):
        done = run(f"pagewire serve {model} --port 0 --device cpu")
        assert done.returncode not in (0, None) and str(model) in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_the_image_pins_what_it_installs() -> None:
    """In the place of the tutorial's `pip freeze`."""
    root = Path(__file__).parents[2]
    pins = [
        line
        for line in (root / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == [
        "torch>=2.11,<2.14"
    ] and len(pins) > 50
    installs = re.findall(r"pip install .*", (root / "Dockerfile").read_text())
    assert all("-c constraints.txt" in line or "--no-deps" in line for line in installs)
