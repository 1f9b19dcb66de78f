"""How a stack starts and ends: what it leaves behind, and what it says when it cannot start."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pagewire_protocol.structs import SILENCE_S

FAKE = (
    "--device",
    "fake",
    "--skip-tokenizer-init",
    "--num-frontends",
    "1",
    "--num-tokenizers",
    "1",
)


def run(
    *arguments: str, timeout_s: float = 60.0, **environment: str
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pagewire", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_leaves_nothing(
    number: signal.Signals, start_stack: Callable[..., Any], watch_gone: Callable[..., bool]
) -> None:
    stack = start_stack(*FAKE).wait_ready()
    children, run_dir = list(stack.children()), stack.run_dir()
    assert len(children) == 4 and any(run_dir.glob("*.sock"))
    began = time.monotonic()
    stack.process.send_signal(number)
    assert stack.process.wait(10) == 0, "\n".join(stack.lines)
    assert time.monotonic() - began < 5, "\n".join(stack.lines)
    assert watch_gone(children, 0.1)
    assert not run_dir.exists()


def test_kill_9_of_the_launcher_leaves_no_process(
    start_stack: Callable[..., Any], watch_gone: Callable[..., bool]
) -> None:
    stack = start_stack(*FAKE).wait_ready()
    children, run_dir = list(stack.children()), stack.run_dir()
    os.kill(stack.process.pid, signal.SIGKILL)
    assert watch_gone(children, 2)
    stack.end()
    start_stack(*FAKE).wait_ready().end()
    assert not run_dir.exists(), "the next start removes what a killed one left"


def test_two_stacks_run_beside_each_other(fake_stack: Any, start_stack: Callable[..., Any]) -> None:
    other = start_stack(
        *FAKE, "--num-tokenizers", "2", "--num-workers", "2", "--num-frontends", "2"
    ).wait_ready()
    assert sorted(other.children().values()) == [
        "frontend",
        "frontend",
        "scheduler",
        "tokenizer",
        "tokenizer",
        "worker",
        "worker",
    ]
    assert other.run_dir() != fake_stack.run_dir()
    assert other.end() == 0


def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", *FAKE, "--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert (
        str(taken)
        and "choose another --port" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )


def test_a_model_that_is_not_there_is_one_line() -> None:
    result = run("serve", "/no/such/model", "--port", "0")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "/no/such/model does not exist" in result.stderr


def test_a_worker_that_cannot_start_ends_the_stack(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    result = run(
        "serve",
        str(tmp_path),
        "--skip-tokenizer-init",
        "--port",
        "0",
        "--device",
        "cpu",
        "--load-format",
        "dummy",
    )
    assert result.returncode != 0
    assert "no-such-family" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--no-such-flag"), "--no-such-flag"),
        (("serve", "-tp", "0"), "--tensor-parallel-size 0: at least 1 is needed"),
        (("serve", "-pp", "0"), "--pipeline-parallel-size 0: at least 1 is needed"),
        (("serve", "--quantization", "quip"), "--quantization quip"),
        (("serve", "--max-num-seqs", "0"), "--max-num-seqs"),
        (("serve", "--num-workers", "0"), "--num-workers: 0: a whole number"),
        (("serve", "one", "--model", "two"), "two models"),
        (("worker", "--block-size", "-1"), "--block-size"),
        (("serve", "--port", "99999"), "--port 99999: at most 65535 is allowed"),
        (("serve", "--device", "gpu"), "--device"),
        (("serve", "one", "two"), "one argument too many: two"),
        (("serve", "--api-keys", "x"), "unknown flag --api-keys; did you mean --api-key?"),
        (("bench", "offline", "--runs", "0"), "--runs: 0: a whole number of at least 1"),
        (("bench", "serve", "--vocab", "100"), "--vocab: 100: 0 or more than 100"),
        (("fetch", "one", "--model", "two"), "two models"),
        (("bench", "sreve"), "unknown kind 'sreve'; did you mean serve?"),
        (("chat", "--tempreature", "0"), "unknown flag --tempreature; did you mean --temperature?"),
        (("chat", "--url", "localhost:8OOO"), "--url localhost:8OOO: an address like http://"),
        (("complete", "--url", "ftp://host"), "--url ftp://host: an address like http://"),
        (("bench", "serve", "--url", "localhost:x"), "--url localhost:x"),
        (("nonsense",), "unknown command"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_second_stack_in_a_run_directory_disturbs_nobody(start_stack: Callable[..., Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="pw-") as run_dir:
        stack = start_stack(*FAKE, "--run-dir", run_dir).wait_ready()
        stack.wait_line("curl ")
        before = len(stack.lines)
        result = run("serve", *FAKE, "--port", "0", "--run-dir", run_dir)
        assert result.returncode == 1
        assert (
            "a scheduler is already running" in result.stderr
            and len(result.stderr.splitlines()) == 1
        )
        assert stack.lines[before:] == []
        assert stack.end() == 0


def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("serve", *FAKE, "--port", "0", "--run-dir", str(tmp_path / "file" / "run"))
    assert result.returncode == 1
    assert (
        "cannot be made: Not a directory; choose another with --run-dir" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )


def test_the_example_asks_for_a_key_from_the_environment(start_stack: Callable[..., Any]) -> None:
    stack = start_stack(*FAKE, environment={"PAGEWIRE_API_KEY": "secret"}).wait_ready()
    assert "Authorization: Bearer YOUR_KEY" in stack.wait_line("curl ")
    assert stack.end() == 0


def test_version_and_help() -> None:
    from pagewire import __version__

    assert run("--version").stdout.strip() == f"pagewire {__version__}"
    for word in ("-V", "-v", "version"):
        assert run(word).stdout == run("--version").stdout
    assert "pagewire serve" in run("--help").stdout == run("help").stdout
    assert run("help", "chat").stdout == run("chat", "--help").stdout != ""
    assert run("help", "bench", "path").stdout == run("bench", "path", "--help").stdout != ""
    assert run("help", "serve", "port").stdout == run("serve", "--help=port").stdout != ""
    assert run("bench", "help").stdout == run("bench", "--help").stdout != ""
    assert "`pagewire serve`" in run("help", "serv").stderr
    close = run("serv")
    assert close.returncode == 2 and "`pagewire serve`" in close.stderr


def test_the_help_of_serve_has_groups_and_shows_parts_of_itself() -> None:
    whole = run("serve", "--help").stdout
    for title in ("model:", "HTTP:", "scheduling:", "device and memory:", "processes and logs:"):
        assert f"\n{title}\n" in whole
    assert "('" not in whole and len(whole.partition("\n\n")[0].splitlines()) == 1
    port = run("serve", "--help=port").stdout
    assert port.strip() == "--port INT  port to listen on (default: 8000)"
    assert run("serve", "--help=--max_num_seqs").stdout.startswith("  --max-num-seqs INT")
    some = run("serve", "--help=prefix").stdout
    assert "--enable-prefix-caching" in some and "--port" not in some
    group = run("serve", "--help=http").stdout
    assert "--ssl-keyfile" in group and "--max-num-seqs" not in group
    assert "(a rank)" in run("serve", "--help=tensor-parallel-size").stdout
    unknown = run("serve", "--help=prot")
    assert unknown.returncode == 2 and "did you mean --port?" in unknown.stderr


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "aiohttp")
    script = (
        "import sys, pagewire.launch.serve, pagewire.cli; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_step_may_take_longer_than_silence_is_tolerated(start_stack: Callable[..., Any]) -> None:
    """A long prompt of a large model on a CPU is one step, during which the worker says that it
    lives."""
    slow = str(1000 * (SILENCE_S + 1.5))
    stack = start_stack(*FAKE, "--fake-step-ms", slow).wait_ready()
    answer = stack.client().completions.create(
        model=stack.get("/v1/models")["data"][0]["id"], prompt=[1, 2, 3], max_tokens=1
    )
    assert answer.usage.completion_tokens == 1
    assert stack.get("/load") is not None and not any("silent" in line for line in stack.lines)
