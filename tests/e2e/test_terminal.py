"""Clients of a running server: `pagewire chat` and `pagewire complete` in a terminal, and
LangChain's client."""

import subprocess
import sys
from typing import Any

import pytest


def run(*words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagewire", *words],
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_texts_are_continued(demo_stack: Any) -> None:
    flags = ("--url", demo_stack.url, "--temperature", "0", "--max-tokens", "4")
    result = run("complete", *flags, said="The capital of France is\nThe capital of Italy is\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Paris" in result.stdout and "Rome" in result.stdout
    assert run("complete", *flags, "-q", "The capital of France is").stdout.startswith(" Paris")


def test_one_question(demo_stack: Any) -> None:
    question = (
        "-q",
        "What is the capital of France?",
        "--system-prompt",
        "You are terse.",
        "--model-name",
        "",
    )
    result = run(
        "chat", "--url", demo_stack.url, "--temperature", "0", "--max-tokens", "24", *question
    )
    assert (result.returncode, result.stderr) == (0, "") and "Paris" in result.stdout
    assert (
        run("chat", "--url", demo_stack.url, "--model-name", "no-such", "-q", "hello").returncode
        == 1
    )


def test_another_name_of_a_command() -> None:
    result = run("collect-env", "--no-generation", "--device", "fake", "--skip-tokenizer-init")
    assert "versions" in result.stdout and "pagewire" in result.stdout


@pytest.mark.filterwarnings("ignore")
def test_langchain_s_client(demo_stack: Any) -> None:
    module = pytest.importorskip("langchain_openai")
    llm = module.ChatOpenAI(
        base_url=demo_stack.url,
        api_key="EMPTY",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        temperature=0,
        max_tokens=24,
    )
    assert "Paris" in llm.invoke("What is the capital of France?").content
    assert "Paris" in "".join(
        piece.content for piece in llm.stream("What is the capital of France?")
    )
