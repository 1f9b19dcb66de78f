"""The fourth tutorial: Phi-1.5 served and offline, LangChain, the tables of parameters, Llama 2,
batches, streams, stop words, advice."""

import contextlib
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pagewire
import pytest
from openai import OpenAI
from pagewire import LLM, SamplingParams
from pagewire.offline.engine import EngineError

PHI = "microsoft/phi-1_5"
AWQ = "TheBloke/Llama-2-7B-Chat-AWQ"
PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
LLM_TABLE: dict[str, Any] = {
    "model": PHI,
    "tokenizer": PHI,
    "tokenizer_mode": "auto",
    "trust_remote_code": False,
    "tensor_parallel_size": 1,
    "dtype": "auto",
    "quantization": None,
    "gpu_memory_utilization": 0.9,
    "max_model_len": None,
    "seed": 0,
    "download_dir": None,
    "load_format": "auto",
    "revision": None,
}
SAMPLING_TABLE: dict[str, Any] = {
    "n": 1,
    "best_of": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "logprobs": None,
    "prompt_logprobs": None,
    "skip_special_tokens": True,
}
BEAMS = {"use_beam_search": True, "n": 2, "best_of": 3, "temperature": 0}
OTHER_VALUES: list[dict[str, Any]] = [
    {"n": 3},
    {"n": 2, "best_of": 4},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"repetition_penalty": 1.1},
    {"repetition_penalty": 1.5},
    *({"temperature": value} for value in (0.0, 0.1, 0.7, 0.8, 1.2, 1.5, 2.0)),
    {"top_p": 0.9},
    {"top_p": 0.95},
    {"top_k": 40},
    {"top_k": 100},
    {"min_p": 0.1},
    BEAMS,
    {**BEAMS, "length_penalty": 0.5},
    {**BEAMS, "early_stopping": True},
    {**BEAMS, "early_stopping": "never"},
    {"stop": ["<|endoftext|>", "\n\n", "###"]},
    {"stop_token_ids": [7, 8]},
    {"ignore_eos": True},
    {"max_tokens": 5},
    {"logprobs": 2},
    {"prompt_logprobs": 2},
    {"skip_special_tokens": False},
]


@pytest.fixture(scope="module")
def phi(in_process: None, downloaded: Callable[..., Path]) -> Iterator[LLM]:
    """Made with every line of the tutorial's table."""
    downloaded(PHI)
    with LLM(**LLM_TABLE) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any], downloaded: Callable[..., Path]) -> Any:
    downloaded(PHI)
    return serve(f"pagewire serve {PHI} --trust-remote-code --host 0.0.0.0 --port 8000")


# --- installation ---


def test_a_virtual_environment(tmp_path: Path) -> None:
    """`python3 -m venv venv`, `source venv/bin/activate`; the package is lent to it instead of
    downloaded again."""
    venv.create(tmp_path / "venv", with_pip=False)
    path = f"{tmp_path}/venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/lent.pth"
    Path(path).write_text("\n".join(entry for entry in sys.path if entry))
    command = (
        "cd $0 && . venv/bin/activate && python -c 'import pagewire; print(pagewire.__version__)'"
    )
    done = subprocess.run(
        ["sh", "-c", command, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.strip() == pagewire.__version__, done.stderr


def test_versions(run: Callable[..., Any]) -> None:
    done = run("python -c 'import pagewire; print(pagewire.__version__)'")
    assert (
        done.stdout.strip() == pagewire.__version__
        and run("pagewire --version").stdout.split()[-1] == pagewire.__version__
    )


def test_another_system_is_refused_in_one_line(run: Callable[..., Any]) -> None:
    """The tutorial's macOS and Windows: there it runs in its container, or in WSL2, which is
    Linux."""
    start = "exit(pagewire.cli.main(['serve', '--port', '0', '--device', 'fake']))"
    code = f"import platform, pagewire.cli; platform.system = lambda: 'Darwin'; {start}"
    done = run(f'python -c "{code}"')
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and "runs on Linux, and this is Darwin" in done.stderr
    )


# --- the server ---


def test_a_completion_and_a_chat(server: Any) -> None:
    client = OpenAI(api_key="EMPTY", base_url=server.url)
    completion = client.completions.create(
        model=PHI, prompt="San Francisco is a", max_tokens=50, temperature=0.8, top_p=0.95
    )
    assert completion.choices[0].text is not None and completion.usage.completion_tokens <= 50
    messages: Any = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    chat = client.chat.completions.create(model=PHI, messages=messages, temperature=0.7)
    assert (
        chat.choices[0].message.content is not None and chat.choices[0].message.role == "assistant"
    )
    assert chat.choices[0].finish_reason in ("stop", "length") and chat.usage.prompt_tokens > 10


def test_a_stream(server: Any) -> None:
    client = OpenAI(api_key="EMPTY", base_url=server.url)
    messages: Any = [{"role": "user", "content": "写一首关于春天的诗"}]
    asked: dict[str, Any] = {
        "model": PHI,
        "messages": messages,
        "max_tokens": 200,
        "temperature": 0,
    }
    chunks = list(client.chat.completions.create(**asked, stream=True))
    said = "".join(
        chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content
    )
    assert (
        chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    )
    assert [
        chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason
    ] in (["stop"], ["length"])
    assert said == client.chat.completions.create(**asked).choices[0].message.content != ""


def test_a_mistake_is_an_exception_with_words(server: Any) -> None:
    with pytest.raises(openai.APIStatusError, match="maximum context length is 2048 tokens"):
        server.client().completions.create(model=PHI, prompt="a", max_tokens=5000)
    for body in (
        {"model": PHI},
        {"model": PHI, "prompt": "a", "temperature": "hot"},
        {"model": PHI, "prompt": "a", "no_such": 1},
    ):
        answer = server.post("/completions", body)
        assert (
            answer.status_code == 400
            and answer.json()["error"]["message"] == answer.json()["message"]
        )


def test_flags_of_the_table(serve: Callable[..., Any], downloaded: Callable[..., Path]) -> None:
    """The table of the server's flags, over the example with Llama 2."""
    downloaded("meta-llama/Llama-2-7b-chat-hf")
    stack = serve(
        "pagewire serve meta-llama/Llama-2-7b-chat-hf --host HOST --port 8000 --trust-remote-code --tensor-parallel-size 1"
        " --pipeline-parallel-size 1 --gpu-memory-utilization 0.85 --max-model-len 4096 --dtype bfloat16 --max-num-seqs 64"
        " --max-num-batched-tokens 4096 --disable-log-requests --served-model-name meta-llama/Llama-2-7b-chat-hf"
    )
    messages: Any = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "解释什么是量子计算"},
    ]
    client = OpenAI(api_key="EMPTY", base_url=stack.url)
    response = client.chat.completions.create(
        model="meta-llama/Llama-2-7b-chat-hf", messages=messages, temperature=0.7, max_tokens=500
    )
    assert (
        response.choices[0].message.content is not None and response.usage.completion_tokens <= 500
    )
    assert any("--disable-log-requests has no effect: " in line for line in stack.lines)


def test_a_model_in_pipeline_stages(
    serve: Callable[..., Any], downloaded: Callable[..., Path]
) -> None:
    downloaded("meta-llama/Llama-2-7b-chat-hf")
    stack = serve(
        "pagewire serve meta-llama/Llama-2-7b-chat-hf --pipeline-parallel-size 2 --trust-remote-code"
    )
    client = OpenAI(api_key="EMPTY", base_url=stack.url)
    answer = client.completions.create(
        model="meta-llama/Llama-2-7b-chat-hf", prompt="Hello", max_tokens=5
    )
    assert answer.usage is not None and answer.usage.completion_tokens <= 5
    assert any("divided among 2 pipeline stages" in line for line in stack.lines)


def test_a_quantized_model_is_served(
    serve: Callable[..., Any], downloaded: Callable[..., Path]
) -> None:
    downloaded(AWQ)
    stack = serve(f"pagewire serve {AWQ} --quantization awq --dtype half")
    stack.wait_line("awq (gemm, 4 bits, groups of 32)")
    body = {"model": AWQ, "prompt": "Hello", "max_tokens": 5}
    answer = stack.post("/completions", body).json()
    assert answer["usage"]["completion_tokens"] in range(1, 6)


@pytest.mark.usefixtures("in_process")
def test_a_quantized_model_offline(downloaded: Callable[..., Path]) -> None:
    downloaded(AWQ)
    with LLM(model=AWQ, quantization="awq") as llm:
        (output,) = llm.generate("Hello", SamplingParams(max_tokens=5))
    assert 1 <= len(output.outputs[0].token_ids) <= 5
    for method in ("gptq", "squeezellm"):
        with pytest.raises(EngineError, match=f"--quantization {method}, but .* with awq"):
            LLM(model=AWQ, quantization=method)


@pytest.mark.usefixtures("in_process")
def test_a_kv_cache_of_8_bits_offline(downloaded: Callable[..., Path]) -> None:
    downloaded(AWQ)
    with LLM(model=AWQ, kv_cache_dtype="fp8") as llm:
        (output,) = llm.generate("Hello", SamplingParams(max_tokens=5))
    assert 1 <= len(output.outputs[0].token_ids) <= 5
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8_e5m2': one of auto, fp8, fp8_e4m3"):
        LLM(model=AWQ, kv_cache_dtype="fp8_e5m2")


# --- offline ---


def test_a_batch(phi: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = phi.generate(PROMPTS, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=100))
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        (one,) = output.outputs
        assert (
            isinstance(one.text, str)
            and one.finish_reason in ("stop", "length")
            and len(one.token_ids) <= 100
            and output.finished
        )
        assert (
            output.prompt_token_ids
            and output.request_id
            and output.prompt_logprobs is None
            and output.num_cached_tokens is not None
        )
        assert one.stop_reason is None and one.logprobs is None and one.index == 0
    assert "Processed prompts: 100%" in capsys.readouterr().err


def test_a_hundred_prompts_come_back_in_order(phi: LLM) -> None:
    prompts = [
        f"Write a story about {topic}"
        for topic in ["space", "ocean", "forest", "city", "mountain"] * 20
    ]
    outputs = phi.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=100))
    assert [output.prompt for output in outputs] == prompts and len(
        {output.outputs[0].text for output in outputs}
    ) > 50


def test_the_defaults_are_those_of_the_table() -> None:
    made = SamplingParams(**SAMPLING_TABLE)
    assert made == SamplingParams() and set(SAMPLING_TABLE) <= set(SamplingParams.__annotations__)


@pytest.mark.parametrize(
    "other", OTHER_VALUES, ids=lambda other: "-".join(f"{k}={v}" for k, v in other.items())[:60]
)
def test_each_line_of_the_table(other: dict[str, Any], phi: LLM) -> None:
    given = {**SAMPLING_TABLE, **other}
    (output,) = phi.generate("The capital of France is", SamplingParams(**given), use_tqdm=False)
    assert len(output.outputs) == given["n"]
    for one in output.outputs:
        assert 1 <= len(one.token_ids) <= given["max_tokens"] and one.finish_reason in (
            "stop",
            "length",
        )
        assert (one.logprobs is not None) == (given["logprobs"] is not None)
    if given["logprobs"]:
        assert all(2 <= len(row) <= 3 for row in output.outputs[0].logprobs)
    if given["prompt_logprobs"]:
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(
            output.prompt_token_ids
        )
    if given["ignore_eos"]:
        assert len(output.outputs[0].token_ids) == 16


def test_words_that_stop(phi: LLM) -> None:
    """A piece of what the model says as a stop word: the text ends before it."""
    whole = (
        phi.generate(
            "Stop", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), use_tqdm=False
        )[0]
        .outputs[0]
        .text
    )
    word = whole[20:23]
    stops = ["<|endoftext|>", "\n\n\n\n", word]
    (output,) = phi.generate(
        "Stop",
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=stops),
        use_tqdm=False,
    )
    assert output.outputs[0].text == whole[: whole.index(word)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", word)


def test_langchain(run: Callable[..., Any], downloaded: Callable[..., Path]) -> None:
    downloaded(PHI)
    done = run("python langchain_vllm.py")
    assert done.returncode == 0, done.stderr
    response, result = done.stdout.splitlines()
    assert response != "''" and result != "''"


def test_a_private_model(downloaded: Callable[..., Path], tmp_path: Path, in_process: None) -> None:
    """By its path; tokenizer_mode slow, seed, download_dir, load_format and revision given other
    values than their defaults."""
    path = downloaded("gpt2", tmp_path / "local" / "model")
    settings: dict[str, Any] = {
        "tokenizer_mode": "slow",
        "seed": 3,
        "download_dir": str(tmp_path),
        "load_format": "safetensors",
    }
    with LLM(
        model=str(path), dtype="half", gpu_memory_utilization=0.75, max_model_len=128, **settings
    ) as llm:
        (output,) = llm.generate("Hello", SamplingParams(max_tokens=4), use_tqdm=False)
        assert len(output.outputs[0].token_ids) <= 4
        with pytest.raises(ValueError, match="maximum context length is 128 tokens"):
            llm.generate("Hello", SamplingParams(max_tokens=500), use_tqdm=False)


# --- advice ---


def test_latency_and_throughput_can_be_watched(server: Any) -> None:
    with contextlib.closing(server.client()) as client:
        client.completions.create(model=PHI, prompt="a", max_tokens=3)
    text = server.client()._client.get(server.url.removesuffix("/v1") + "/metrics").text
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "kv_cache_usage_perc",
        "num_requests_waiting",
    ):
        assert re.search(rf"^vllm:{name}", text, re.M), name
