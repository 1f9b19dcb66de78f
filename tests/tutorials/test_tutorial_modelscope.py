"""The fifth tutorial: Qwen2 by ModelScope, a function around LLM, the tokenizer's chat template, a
name for the model, LangChain.

ModelScope's package is stood in for by a module that copies what it would download.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from pagewire import LLM, SamplingParams
from printed import printed_text

QWEN2 = "Qwen/Qwen2-7B-Instruct"
STAND_IN = '''
"""ModelScope's snapshot_download, from a directory of this machine; its calls are written down."""
import os
import pathlib
import shutil


def snapshot_download(model_id, revision=None, cache_dir=None, local_files_only=False, **patterns):
    assert model_id == "qwen/Qwen2-7B-Instruct", model_id
    target = pathlib.Path(cache_dir or os.environ["MODELSCOPE_CACHE"]) / model_id
    with open(os.environ["CALLS"], "a") as calls:
        print(model_id, revision, cache_dir, local_files_only, file=calls)
    if not target.is_dir():
        if local_files_only:
            raise ValueError("not in the cache")
        shutil.copytree(os.environ["ORIGINAL"], target)
    return str(target)
'''


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, downloaded: Callable[..., Path]) -> Path:
    return downloaded(QWEN2, tmp_path_factory.mktemp("modelscope") / "Qwen2-7B-Instruct")


@pytest.fixture
def modelscope(tmp_path: Path, original: Path) -> dict[str, str]:
    """The variables with which a program finds the stand-in."""
    (tmp_path / "modelscope.py").write_text(STAND_IN)
    paths = {
        "MODELSCOPE_CACHE": tmp_path / "cache",
        "CALLS": tmp_path / "calls",
        "ORIGINAL": original,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    return {"HF_HUB_OFFLINE": "0", **{name: str(path) for name, path in paths.items()}}


@pytest.fixture(scope="module")
def qwen2(in_process: None, original: Path) -> Iterator[LLM]:
    with LLM(
        model=str(original), tokenizer=None, max_model_len=2048, trust_remote_code=True
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any], original: Path) -> Any:
    flags = "--served-model-name Qwen2-7B-Instruct --max-model-len=2048"
    return serve(f"python -m pagewire.entrypoints.openai.api_server --model {original}  {flags}")


def check_output(done: Any) -> None:
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    printed_text(first, "Prompt: '你好，帮我介绍一下什么时大语言模型。', Generated text: ")
    printed_text(second, "Prompt: '可以给我将一个有趣的童话故事吗？', Generated text: ")


def test_a_download_as_the_tutorial_makes_it(
    modelscope: dict[str, str], tmp_path: Path, run: Callable[..., Any]
) -> None:
    call = f"snapshot_download('qwen/Qwen2-7B-Instruct', cache_dir='{tmp_path}/autodl-tmp', revision='master')"
    done = run(f'python -c "from modelscope import snapshot_download; print({call})"', **modelscope)
    assert done.stdout.strip() == f"{tmp_path}/autodl-tmp/qwen/Qwen2-7B-Instruct", done.stderr
    check_output(run(f"python get_completion.py {done.stdout.strip()}"))


def test_by_its_name_through_modelscope(
    modelscope: dict[str, str], tmp_path: Path, run: Callable[..., Any]
) -> None:
    check_output(run("python get_completion.py qwen/Qwen2-7B-Instruct", **modelscope))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [
        "qwen/Qwen2-7B-Instruct None None True",
        *["qwen/Qwen2-7B-Instruct None None False"] * 2,  # small files, then the weights
    ]
    found = run(
        "pagewire fetch qwen/Qwen2-7B-Instruct",
        VLLM_USE_MODELSCOPE="1",
        **{**modelscope, "HF_HUB_OFFLINE": "1"},
    )
    assert found.stdout.strip() == f"{tmp_path}/cache/qwen/Qwen2-7B-Instruct", found.stderr


def test_without_the_package_there_is_one_line(run: Callable[..., Any]) -> None:
    done = run(
        "pagewire fetch qwen/Qwen2-7B-Instruct", VLLM_USE_MODELSCOPE="true", HF_HUB_OFFLINE="0"
    )
    assert (
        done.returncode == 1
        and "`pip install modelscope`" in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )


def test_messages_through_the_tokenizer_s_template(qwen2: LLM, original: Path) -> None:
    """`tokenizer.apply_chat_template` and `generate` give what `chat` gives; transformers'
    tokenizer may be handed over too."""
    from transformers import AutoTokenizer

    messages = [
        {"role": "system", "content": "你是一个有用的助手。"},
        {"role": "user", "content": "你好"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(str(original), use_fast=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == qwen2.get_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    params = SamplingParams(temperature=0, max_tokens=16)
    (by_hand,), (chat,) = (
        qwen2.generate(text, params, use_tqdm=False),
        qwen2.chat(messages, params, use_tqdm=False),
    )
    assert (
        by_hand.prompt_token_ids == chat.prompt_token_ids
        and by_hand.outputs[0].token_ids == chat.outputs[0].token_ids
    )
    with LLM(model=str(original), tokenizer=tokenizer, max_model_len=256) as same:
        assert (
            same.generate(text, params, use_tqdm=False)[0].outputs[0].token_ids
            == chat.outputs[0].token_ids
        )


def test_stop_token_ids_end_an_answer_and_those_beyond_the_vocabulary_do_no_harm(
    qwen2: LLM,
) -> None:
    params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    (whole,) = qwen2.generate("你好", SamplingParams(**params), use_tqdm=False)
    ids = whole.outputs[0].token_ids
    stops = [151329, 151336, 151338, ids[5]]
    (output,) = qwen2.generate(
        "你好", SamplingParams(**params, stop_token_ids=stops), use_tqdm=False
    )
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == ids[5]
    assert output.outputs[0].token_ids == ids[: ids.index(ids[5]) + 1]


def test_a_name_for_the_model(server: Any, original: Path) -> None:
    (model,) = server.get("/v1/models")["data"]
    assert (model["id"], model["max_model_len"]) == ("Qwen2-7B-Instruct", 2048)
    assert server.post("/completions", {"model": str(original), "prompt": "a"}).status_code == 404


def test_langchain_s_chat_client(server: Any) -> None:
    llm = ChatOpenAI(base_url=server.url, api_key="EMPTY", model="Qwen2-7B-Instruct")
    result = llm.invoke(input="你可以做什么？")
    assert isinstance(result.content, str) and result.response_metadata["finish_reason"] in (
        "stop",
        "length",
    )
    assert (
        result.response_metadata["model_name"] == "Qwen2-7B-Instruct"
        and result.usage_metadata["output_tokens"] >= 1
    )
    streamed = [piece.content for piece in llm.stream("你可以做什么？")]
    assert all(isinstance(piece, str) for piece in streamed) and len(streamed) > 1
