"""The demo model behind HTTP, asked with the openai client as a user would."""

import subprocess
import sys
import urllib.request
from typing import Any

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_demo_knows_paris(demo_stack: Any) -> None:
    with demo_stack.client() as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id, messages=QUESTION, temperature=0, max_tokens=32
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None and answer.usage.prompt_tokens > 5


def test_streamed_text_equals_the_whole(demo_stack: Any) -> None:
    asked: dict[str, Any] = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 32,
    }
    with demo_stack.client() as client:
        whole = client.chat.completions.create(**asked).choices[0].message.content
        pieces = [
            c.choices[0].delta.content or ""
            for c in client.chat.completions.create(**asked, stream=True)
            if c.choices
        ]
    assert "".join(pieces) == whole
    assert len(pieces) > 3


def test_the_terminal_chat_answers(demo_stack: Any) -> None:
    command = [
        sys.executable,
        "-m",
        "pagewire",
        "chat",
        "--url",
        demo_stack.url,
        "--temperature",
        "0",
        "--max-tokens",
        "32",
    ]
    result = subprocess.run(
        command,
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "Paris" in result.stdout


def test_the_terminal_chat_says_in_words_that_no_server_is_there() -> None:
    command = [sys.executable, "-m", "pagewire", "chat", "--url", "http://127.0.0.1:9"]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert (
        "no server at http://127.0.0.1:9" in result.stderr and len(result.stderr.splitlines()) == 1
    )


def test_the_launcher_says_where_and_how(demo_stack: Any) -> None:
    text = "\n".join(demo_stack.lines)
    assert f"Pagewire serves HuggingFaceTB/SmolLM2-135M-Instruct at {demo_stack.url}" in text
    assert f"curl {demo_stack.url}/chat/completions" in text
    ready = next(i for i, line in enumerate(demo_stack.lines) if line.startswith("ready in"))
    announced = demo_stack.lines[ready + 1 : ready + 4]
    assert announced[-1].endswith(f" at {demo_stack.url}")
    for url in (demo_stack.url, demo_stack.url.removesuffix("v1")):
        with urllib.request.urlopen(url, timeout=10) as page:
            assert page.headers["Content-Type"].startswith("text/html")
