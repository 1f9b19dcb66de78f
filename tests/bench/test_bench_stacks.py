"""`pagewire bench` against stacks with a hash for a model: what it prints, writes and draws."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pagewire.bench.servers import metrics, started

FAKE = (
    "--device",
    "fake",
    "--fake-step-ms",
    "1",
    "--max-model-len",
    "1024",
    "--log-level",
    "warning",
)


def bench(*arguments: str, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pagewire", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A stack with the demo's tokenizer."""
    with started([*FAKE]) as address:
        yield address


def test_serve_starts_a_stack_and_measures_its_own_ceiling_first(tmp_path: Path) -> None:
    file, picture = tmp_path / "serve.json", tmp_path / "serve.png"
    loads = (
        "--loads",
        "1x8/6,3x8/6+8,poisson20x8/6",
        "--scale",
        "0.1",
        "--runs",
        "2",
        "--clients",
        "2",
    )
    result = bench("serve", *loads, "--json", str(file), "--plot", str(picture), *FAKE)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert "ceiling, 256x128/128 without a model" in lines[0]
    report: dict[str, Any] = json.loads(file.read_text())
    assert set(report["loads"]) == {"1x8/6", "3x8/6+8", "poisson20x8/6"}
    for load in report["loads"].values():
        assert (
            len(load["runs"]) == 2
            and load["median"]["failed"] == 0
            and load["median"]["out tok/s"] > 0
        )
        assert load["median"]["TTFT p50"] > 0 and len(load["distribution"]["TTFT"]) == len(
            report["grid"]
        )
    assert report["ready_s"] > 0 and report["ceiling"]["out tok/s"] > 0 and report["kv_blocks"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_against_another_server_prints_the_ratio(url: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    result = bench(
        "serve",
        "--url",
        url,
        "--against",
        url,
        "--no-ceiling",
        "--loads",
        "2x8/20",
        "--runs",
        "1",
        "--json",
        str(file),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(file.read_text())
    ours, theirs = (
        report["loads"][name]["median"]["out tok/s"] for name in ("2x8/20", "2x8/20 (against)")
    )
    row = next(
        line.split()
        for line in result.stdout.splitlines()
        if "2x8/20" in line and "out tok/s" in line and "[" not in line
    )
    header = next(
        line.split()
        for line in result.stdout.splitlines()
        if line.split()[:2] == ["load", "figure"]
    )
    assert header[-2:] == ["against", "ratio"] and row[-1] == f"{ours / theirs:.2f}"


def test_prompts_that_do_not_fit_are_a_failed_load_and_nothing_else(url: str) -> None:
    result = bench(
        "serve",
        "--url",
        url,
        "--no-ceiling",
        "--loads",
        "2x2000/8,2x8/8",
        "--runs",
        "1",
        "--vocab",
        "1000",
    )
    assert result.returncode == 1
    table = result.stdout.partition("latencies in ms")[2].splitlines()
    assert any("2x2000/8" in line and "2 of 2 answers were not as asked" in line for line in table)
    assert any(line.split()[:4][:1] == ["2x8/8"] and "out tok/s" in line for line in table)


def test_metrics_of_a_server(url: str) -> None:
    assert metrics(url)["vllm:request_success_total"] >= 0
    assert metrics("http://127.0.0.1:9") == {}


def test_no_server_is_one_line() -> None:
    result = bench("serve", "--url", "http://127.0.0.1:9")
    assert (
        result.returncode == 1
        and "no server answers at" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )


def test_offline(tmp_path: Path) -> None:
    file = tmp_path / "offline.json"
    result = bench(
        "offline",
        "--skip-tokenizer-init",
        "--scale",
        "0.01",
        "--runs",
        "2",
        "--json",
        str(file),
        *FAKE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(file.read_text())
    assert list(report["workloads"]) == ["single", "mixed", "wide", "long", "shared"]
    assert all(
        len(entry["runs"]) == 2 and entry["median"]["out tok/s"] > 0
        for entry in report["workloads"].values()
    )
    assert report["kv_tokens"] > 0 and report["machine"]["cores"] > 0
    assert "vLLM" not in result.stdout, "nothing is known of a hash's speed"
    assert result.stdout.splitlines()[-1].split()[:3] == ["shared", "out", "tok/s"]


def test_offline_says_which_workload_does_not_fit() -> None:
    result = bench(
        "offline", "--skip-tokenizer-init", "--workloads", "long,2x4/4", "--runs", "1", *FAKE
    )
    assert result.returncode == 1
    assert "long" in result.stdout and "8192" in result.stdout.replace(",", "")
    assert result.stdout.splitlines()[-1].split()[0] == "2x4/4"


def test_latency(tmp_path: Path) -> None:
    file, picture = tmp_path / "latency.json", tmp_path / "latency.png"
    result = bench(
        "latency",
        "--skip-tokenizer-init",
        "--sizes",
        "8/4,8/16",
        "--runs",
        "4",
        "--json",
        str(file),
        "--plot",
        str(picture),
        *FAKE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    loads = json.loads(file.read_text())["loads"]
    short, long = (loads[size]["median"] for size in ("8/4", "8/16"))
    assert 1 < short["TTFT"] < short["total"] < long["total"] and long["TPOT"] >= 0.9, (
        "a step takes 1 ms"
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "unknown kind 'nonsense'"),
        (("serve", "--loads", "16x8"), "--loads: workload '16x8'"),
        (("serve", "--url", "x", "--device", "cpu"), "unknown with --url: --device cpu"),
        (("offline", "--workloads", "widest"), "--workloads: workload 'widest'"),
        (("offline", "--scale", "2"), "--scale: 2: more than 0 and at most 1"),
        (("latency", "--sizes", "8"), "--sizes: 8: lengths like"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = bench(*arguments)
    assert (
        result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    )


def test_a_plot_without_matplotlib_is_refused_before_anything_starts() -> None:
    program = (
        "import importlib.util as u, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a);"
        "from pagewire.bench import main; sys.exit(main(['serve', '--plot', 'x.png']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == 2 and "pip install 'pagewire[bench]'" in result.stderr
