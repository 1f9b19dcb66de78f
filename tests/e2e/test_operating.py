"""What an operator relies on: a closed terminal, command lines without secrets, logs that can be read
and collected."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from e2e.conftest import Stack
from e2e.test_stack_life import FAKE
from prometheus_client.parser import text_string_to_metric_families

KEYS = ("a-first-secret", "a-second-secret")
LOGGED = ("--enable-log-requests", "--fake-step-ms", "20")
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"


def command_lines(stack: Stack) -> str:
    """Of the stack's services."""
    pids = stack.children()
    assert len(pids) >= 4
    return " ".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)


def ask(stack: Stack, key: str = "", **body: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    whole = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, **body}
    return requests.post(f"{stack.url}/completions", json=whole, headers=headers, timeout=60)


@pytest.mark.parametrize("how", ["flags", "config"])
def test_keys_are_in_no_service_s_command_line(
    how: str, start_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    flags = [f"--api-key={key}" for key in KEYS]
    if how == "config":
        config = tmp_path / "pagewire.yaml"
        config.write_text(json.dumps({"api-key": list(KEYS)}))
        flags = ["--config", str(config)]
    stack = start_stack(*FAKE, *flags).wait_ready()
    lines = command_lines(stack)
    assert not any(key in lines for key in KEYS)
    assert [ask(stack, key).status_code for key in (*KEYS, "another", "")] == [200, 200, 401, 401]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := what():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


@pytest.mark.parametrize("nohup", [True, False])
def test_a_terminal_that_is_closed(nohup: bool, tmp_path: Path) -> None:
    """With nohup the stack serves on; without, it ends in order."""
    log = tmp_path / "log"
    words = [sys.executable, "-m", "pagewire", "serve", *FAKE]
    pid, terminal = pty.fork()
    if not pid:
        # The terminal's leader: the kernel sends it SIGHUP when the terminal goes.
        # Whatever these tests were started with is inherited.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execv(words[0], words)
    try:
        url = wait(lambda: re.search(r" at (http\S+)", log.read_text() if log.exists() else ""))[1]
        os.close(terminal)
        if nohup:
            time.sleep(0.5)
            body = {"prompt": [1, 2], "max_tokens": 2, "ignore_eos": True}
            answer = requests.post(f"{url}/completions", json=body, timeout=60)
            assert answer.status_code == 200 and is_alive(pid)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert "stopping" in log.read_text()
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def test_requests_in_the_log(start_stack: Callable[..., Stack]) -> None:
    stack = start_stack(*FAKE, *LOGGED, "--api-key", KEYS[0]).wait_ready()
    assert ask(stack, KEYS[0]).status_code == 200
    line = stack.wait_line("status=200")
    assert re.search(
        rf"^frontend-\d+ +{STAMP} I pagewire\.frontend\.requests: request_id=\w+ ", line
    )
    for field in ("method=POST", "route=/v1/completions", "prompt_tokens=3", "cached_tokens=0"):
        assert f" {field} " in line
    assert re.search(r" output_tokens=4 ttft_s=[\d.]+ reason=length$", line)
    with requests.post(
        f"{stack.url}/completions",
        json={"prompt": [1], "max_tokens": 1000, "ignore_eos": True, "stream": True},
        headers={"Authorization": f"Bearer {KEYS[0]}"},
        stream=True,
        timeout=60,
    ) as stream:
        next(stream.iter_lines())
    assert re.search(
        r"output_tokens=[1-9]\d* ttft_s=.* reason=cancelled", stack.wait_line("status=499")
    )
    ask(stack)
    assert stack.wait_line("status=401").endswith(" reason=refused")
    ask(stack, KEYS[0], top_p=7)
    assert stack.wait_line("status=400").endswith(" reason=refused")
    requests.get(stack.url.removesuffix("/v1") + "/no/such/route", timeout=60)
    assert "/no/such/route" not in "\n".join(stack.lines)
    assert not any("route=/health" in line for line in stack.lines)


def test_every_line_is_json(start_stack: Callable[..., Stack]) -> None:
    stack = start_stack(*FAKE, "--log-format", "json", "--enable-log-requests")
    ready = json.loads(stack.wait_line("Pagewire serves"))
    stack.url = ready["message"].split()[-1]
    assert ready["process"] == "launcher" and ready["level"] == "info"
    assert ask(stack).status_code == 200
    entry = json.loads(stack.wait_line('"status": 200'))
    assert entry["route"] == "/v1/completions" and entry["output_tokens"] == 4
    assert entry["process"] == "frontend-0" and entry["ttft_s"] <= entry["total_s"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+[+-]\d\d:\d\d", entry["time"])
    stack.end()
    lines = [line for line in stack.lines if line != "<end>"]
    assert len(lines) > 5 and all(isinstance(json.loads(line), dict) for line in lines)


def test_debug_says_more_than_info(start_stack: Callable[..., Stack]) -> None:
    stack = start_stack(*FAKE, "--log-level", "debug").wait_ready()
    assert ask(stack).status_code == 200
    assert " D pagewire.frontend: request " in stack.wait_line("1 choice(s) of 1 prompt(s)")
    assert " D pagewire.scheduler: execution " in stack.wait_line("of 3 prompt tokens cached")


def test_no_line_without_the_flag(start_stack: Callable[..., Stack]) -> None:
    stack = start_stack(*FAKE).wait_ready()
    assert ask(stack).status_code == 200
    subprocess.run(["sleep", "0.2"], check=True)
    assert not any("status=" in line or " D " in line for line in stack.lines)


def test_metrics_of_a_running_stack(start_stack: Callable[..., Stack]) -> None:
    """Each name once, with a type and words of its own; the launcher's own questions are no
    traffic."""
    stack = start_stack(*FAKE).wait_ready()
    assert ask(stack).status_code == 200
    url = stack.url.removesuffix("/v1") + "/metrics"

    def scraped() -> dict[str, Any]:
        text = requests.get(url, timeout=60).text
        return {family.name: family for family in text_string_to_metric_families(text)}

    def total(name: str) -> float:
        return sum(
            sample.value for sample in scraped()[name].samples if sample.name.endswith("_count")
        )

    assert wait(lambda: total("vllm:iteration_tokens_total")) >= 4
    assert wait(lambda: total("vllm:request_num_preemptions")) == 1
    families = scraped()
    answers = families["pagewire:frontend_http_responses"].samples
    assert {(s.labels["method"], s.labels["route"], s.labels["code"]) for s in answers} == {
        ("POST", "/v1/completions", "200"),
        ("GET", "/metrics", "200"),
    }
    (config,) = families["vllm:cache_config_info"].samples
    assert config.labels["block_size"] == "16" and config.labels["enable_prefix_caching"] == "True"
    assert families["process_cpu_seconds"].samples[0].value > 0
    assert families["pagewire:scheduler_steps"].type == "counter"
