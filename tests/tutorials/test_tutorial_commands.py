"""The third tutorial: the console script, DeepSeek's distilled Qwen from a directory, the arguments
after a container's image, curl."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEEPSEEK = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
SERVE = "pagewire serve {model} --tensor-parallel-size 1 --max-model-len 16384 --port 8102 {more} --enforce-eager"
ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QUESTION = [
    {"role": "system", "content": "你是一个数学助手，擅长计算和解释数字。"},
    {"role": "user", "content": "请计算：144500 ÷ 1156 等于多少？"},
]
STUB = """
def snapshot_download(model_id, revision=None, cache_dir=None, local_dir=None, local_files_only=False):
    import os
    if model_id not in os.environ["TUTORIAL_MODELS"].split(":")[0]:
        raise ValueError(f"no {model_id}")
    return os.environ["TUTORIAL_MODELS"].split(":")[1]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, downloaded: Callable[..., Path]) -> Path:
    return downloaded(DEEPSEEK, tmp_path_factory.mktemp("coderepo") / DEEPSEEK)


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any], directory: Path) -> Any:
    return serve(SERVE.format(model=directory, more=""))


def curl(url: str, model: str) -> Any:
    body = json.dumps(
        {"model": model, "messages": QUESTION, "max_tokens": 1024, "temperature": 0.7},
        ensure_ascii=False,
        indent=2,
    )
    command = [
        "curl",
        "-sS",
        f"{url}/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    )


def check_answer(answer: Any, model: str) -> None:
    assert (
        answer["object"] == "chat.completion"
        and answer["id"].startswith("chatcmpl-")
        and answer["model"] == model
    )
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and isinstance(
        choice["message"]["content"], str
    )
    assert choice["finish_reason"] in ("stop", "length") and answer["usage"]["prompt_tokens"] > 20


def test_the_console_script_is_on_the_path() -> None:
    found = shutil.which("pagewire", path=str(Path(sys.executable).parent))
    assert found and Path(found).parent == Path(sys.executable).parent


def test_an_installation_from_source_compiles_nothing() -> None:
    """`pip install -e .` gave up on a compiler in the tutorial; what is installed here is that, and
    for any platform."""
    distribution = importlib.metadata.distribution("pagewire")
    where = json.loads(distribution.read_text("direct_url.json") or "{}")
    assert where["dir_info"] == {"editable": True} and "Tag: py3-none-any" in (
        distribution.read_text("WHEEL") or ""
    )


@pytest.mark.parametrize("package", ["aiohttp", "numpy", "tokenizers", "torch"])
def test_an_installation_without_the_packages_of_a_service_is_told_what_to_install(
    package: str,
) -> None:
    """`pip install pagewire` alone. The package is made to be missing from a service that needs
    it."""
    service = {
        "aiohttp": "frontend",
        "numpy": "scheduler",
        "tokenizers": "tokenizer",
        "torch": "worker",
    }[package]
    code = (
        "import sys, importlib.abc, pagewire.cli\n"
        "class Without(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == sys.argv[1]: raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "exit(pagewire.cli.main(sys.argv[2:]))"
    )
    with tempfile.TemporaryDirectory(prefix="pw-") as run_dir:
        (Path(run_dir) / "config.json").write_text(json.dumps(LLAMA))
        flags = [
            "--run-dir",
            run_dir,
            *(["--model", run_dir] if service in ("worker", "tokenizer") else []),
            *(["--load-format", "dummy"] if service == "worker" else []),
        ]
        command = [sys.executable, "-c", code, package, service, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"pagewire {service}: {package} is not installed; `pip install 'pagewire[all]'`"
    )


def test_a_model_from_modelscope_in_a_directory_of_its_own(
    tmp_path: Path, directory: Path, run: Callable[..., Any]
) -> None:
    """Its package is stood in for: what counts is that the directory that it prints can be
    served."""
    (tmp_path / "modelscope.py").write_text(STUB)
    code = f"from modelscope import snapshot_download; print(snapshot_download('{DEEPSEEK}', local_dir='/x', revision='master'))"
    found = run(
        f'python -c "{code}"', PYTHONPATH=str(tmp_path), TUTORIAL_MODELS=f"{DEEPSEEK}:{directory}"
    )
    assert found.stdout.strip() == str(directory), found.stderr
    assert (Path(found.stdout.strip()) / "config.json").is_file()


def test_the_server_with_the_tutorial_s_flags(server: Any, directory: Path) -> None:
    (model,) = server.get("/v1/models")["data"]
    assert (model["id"], model["max_model_len"]) == (str(directory), 16384)
    check_answer(curl(server.url, str(directory)), str(directory))


def test_the_server_with_quantization_while_loading(
    serve: Callable[..., Any], directory: Path
) -> None:
    more = "--quantization bitsandbytes --load-format bitsandbytes"
    stack = serve(SERVE.format(model=directory, more=more))
    stack.wait_line("weights are rounded to bitsandbytes")
    check_answer(curl(stack.url, str(directory)), str(directory))


def test_the_server_with_a_kv_cache_of_8_bits(serve: Callable[..., Any], directory: Path) -> None:
    stack = serve(SERVE.format(model=directory, more="--kv-cache-dtype fp8"))
    stack.wait_line("KV cache in fp8 (e4m3): the checkpoint has no scales for it, 1.0 is used")
    check_answer(curl(stack.url, str(directory)), str(directory))


def image_command(*arguments: str) -> str:
    """What a container runs: the entry point of the image, and the arguments after the image's
    name."""
    last = (ROOT / "Dockerfile").read_text().rstrip().splitlines()[-1]
    return " ".join([*json.loads(last.removeprefix("ENTRYPOINT ")), *arguments])


def test_arguments_after_the_image_s_name(
    serve: Callable[..., Any], downloaded: Callable[..., Path]
) -> None:
    """docker run ... -v CACHE:... --env HUGGING_FACE_HUB_TOKEN=... -p 8000:8000 IMAGE --model
    mistralai/Mistral-7B-v0.1"""
    downloaded("mistralai/Mistral-7B-v0.1")
    stack = serve(
        image_command("--model", "mistralai/Mistral-7B-v0.1"), HUGGING_FACE_HUB_TOKEN="<secret>"
    )
    assert stack.client().models.list().data[0].id == "mistralai/Mistral-7B-v0.1"
    assert (
        stack.client()
        .completions.create(model="mistralai/Mistral-7B-v0.1", prompt="Hi", max_tokens=4)
        .choices[0]
        .text
        is not None
    )


def test_a_directory_mounted_into_the_hub_s_cache(
    serve: Callable[..., Any], home: Path, downloaded: Callable[..., Path]
) -> None:
    """Not in the form that the hub's cache has, but given by its path."""
    path = downloaded(DEEPSEEK, home / "hub" / "models--DeepSeek-R1-Distill-Qwen-1.5B")
    stack = serve(image_command("--model", str(path)))
    check_answer(curl(stack.url, str(path)), str(path))


def test_a_cache_mounted_in_root_s_home_is_the_image_s_own() -> None:
    """`-v ~/.cache/huggingface:` and the path that the tutorial gives: a link in the image leads to
    its cache. No engine is asked here."""
    base = (ROOT / "Dockerfile").read_text().partition("FROM base AS builder")[0]
    assert (
        "ln -s /cache ~root/.cache" in base
        and "HF_HOME=/cache/huggingface" in base
        and "chmod 0711 ~root" in base
    )
