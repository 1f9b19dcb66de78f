"""`pagewire run-batch`: files of requests in and answers out, interrupted and gone on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pagewire.worker.fake import chain

VOCAB = 1000
FAKE = (
    "--model",
    "m",
    "--device",
    "fake",
    "--skip-tokenizer-init",
    "--fake-vocab-size",
    str(VOCAB),
)


def command(source: Path, target: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pagewire",
        "run-batch",
        "-i",
        str(source),
        "-o",
        str(target),
        *flags,
    ]


def run(source: Path, target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(source, target, *flags), capture_output=True, text=True, timeout=120, check=False
    )


def request(custom_id: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}
    )


def completions(count: int, length: int = 4) -> list[str]:
    return [
        request(f"r{i}", prompt=[i, i + 1], max_tokens=length, return_token_ids=True)
        for i in range(count)
    ]


def answers(target: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


def is_right(row: dict[str, Any], number: int, length: int = 4) -> bool:
    body = row["response"]["body"]
    tokens = body["choices"][0]["token_ids"]
    return (
        row["response"]["status_code"] == 200
        and row["error"] is None
        and tokens == chain([number, number + 1], length, VOCAB)
    )


def test_each_line_has_its_answer_or_its_error(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = {
        "other model": (
            request("other model", prompt=[1], model="x"),
            404,
            "The model `x` does not exist",
        ),
        "stream": (request("stream", prompt=[1], stream=True), 400, "`stream`"),
        "no prompt": (request("no prompt"), 400, "prompt"),
        "unknown": (request("unknown", prompt=[1], no_such=1), 400, "no_such"),
        "range": (request("range", prompt=[VOCAB]), 400, str(VOCAB)),
        "url": (request("url", url="/v1/embeddings"), 400, "/v1/embeddings"),
        "get": (request("get", prompt=[1]).replace("POST", "GET"), 400, "GET"),
        "no body": ('{"custom_id": "no body", "url": "/v1/completions"}', 400, "body"),
    }
    lines = [*completions(50), "", *(line for line, _, _ in bad.values()), "{ no json"]
    source.write_text("\n".join(lines))
    result = run(source, target, *FAKE)
    assert result.returncode == 1, result.stderr
    assert "again" not in result.stderr  # these errors would come again
    assert (
        "Running batch: 100%" in result.stderr
        and "59/59" in result.stderr
        and "50 answered, 9 with an error" in result.stderr
    )
    rows = answers(target)
    assert len(rows) == 59 and all(is_right(rows[f"r{i}"], i) for i in range(50))
    for name, (_, status, words) in bad.items():
        response, error = rows[name]["response"], rows[name]["error"]
        assert (response["status_code"], error["code"]) == (status, status) and words in error[
            "message"
        ]
        assert response["body"]["error"]["message"] == error["message"]
    assert "Line 60 is no request" in rows[None]["error"]["message"]  # type: ignore[index]
    body = rows["r7"]["response"]["body"]
    assert (
        body["object"] == "text_completion"
        and body["model"] == "m"
        and body["id"].endswith(rows["r7"]["response"]["request_id"])
    )
    assert body["usage"]["total_tokens"] == 6 and rows["r7"]["id"] == "batch_req_8"


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(completions(300, 8)) + "\n")
    slow = (*FAKE, "--fake-step-ms", "10", "--max-num-seqs", "16", "--no-progress")
    process = subprocess.Popen(command(source, target, *slow), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (target.exists() and target.read_bytes().count(b"\n") >= 40):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    written = target.read_bytes()
    whole = written[: written.rindex(b"\n") + 1]
    done = whole.count(b"\n")
    assert 40 <= done < 300
    target.write_bytes(whole + b'{"id":"batch_req_')  # an answer that was cut off
    result = run(source, target, *FAKE, "--no-progress")
    assert (
        result.returncode == 0
        and f"{300 - done} answered, 0 with an error, {done} done before" in result.stderr
    ), result.stderr
    assert target.read_bytes().startswith(whole)
    rows = answers(target)
    assert len(rows) == 300 and all(is_right(rows[f"r{i}"], i, 8) for i in range(300))
    again = run(source, target, "--model", "/no/such/model")  # nothing is left: nothing is started
    assert again.returncode == 0 and "0 answered, 0 with an error, 300 done before" in again.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_orderly_end_leaves_whole_answers_and_no_process(
    number: int, code: int, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(completions(300, 8)))
    process = subprocess.Popen(
        command(source, target, *FAKE, "--fake-step-ms", "10", "--max-num-seqs", "8"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
    )
    end = time.monotonic() + 60
    while not (target.exists() and target.stat().st_size):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    children = [
        path
        for path in Path("/proc").iterdir()
        if path.name.isdecimal() and _parent(path) == process.pid
    ]
    assert len(children) >= 3
    process.send_signal(number)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == code
    assert "of 300 lines done; the same command goes on with the rest" in printed.splitlines()[-1]
    assert target.read_bytes().endswith(b"\n") and 0 < len(answers(target)) < 300
    assert not [path for path in children if _parent(path) == process.pid]


def failed(number: int, status: int) -> str:
    error = {"message": "no", "type": "t", "param": None, "code": status}
    response = {"status_code": status, "request_id": "x", "body": {"error": error}}
    row = {"id": f"batch_req_{number}", "custom_id": f"r{number - 1}", "response": response}
    return json.dumps({**row, "error": error})


def test_errors_that_may_not_come_again_are_tried_again(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(completions(6)))
    statuses = {1: 408, 2: 429, 3: 500, 4: 503, 5: 400}
    rows = [failed(number, status) for number, status in statuses.items()]
    target.write_text("\n".join(rows) + "\n")
    kept = run(source, target, *FAKE, "--no-progress", "--no-retry-errors")
    assert kept.returncode == 1
    assert "1 answered, 0 with an error, 5 done before, 5 of them with an error" in kept.stderr
    target.chmod(0o640)
    result = run(source, target, *FAKE, "--no-progress")
    assert result.returncode == 1
    assert "4 answered, 0 with an error, 2 done before, 1 of them with an error" in result.stderr
    answered = answers(target)
    assert all(is_right(answered[f"r{i}"], i) for i in (0, 1, 2, 3, 5))
    assert answered["r4"]["response"]["status_code"] == 400
    assert target.stat().st_mode & 0o777 == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(completions(2)), encoding="utf-8-sig")
    result = run(source, target, *FAKE, "--no-progress")
    assert result.returncode == 0, result.stderr
    assert is_right(answers(target)["r0"], 0)


def test_the_help_has_no_flags_of_http_which_are_still_accepted(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "pagewire", "run-batch", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "--retry-errors" in shown and "--served-model-name" in shown
    assert not [flag for flag in ("--port", "--ssl", "--allowed", "--api-key") if flag in shown]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("")
    assert run(source, target, *FAKE, "--port", "8001").returncode == 0


def _heed_interrupts() -> None:
    """Tests that a shell runs in the background inherit SIGINT as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def test_more_lines_than_run_at_once_and_several_choices(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    beams = [
        request(
            f"b{i}",
            prompt=[i, i + 1],
            max_tokens=3,
            n=2,
            use_beam_search=True,
            temperature=0,
            return_token_ids=True,
        )
        for i in range(9)
    ]
    source.write_text("\n".join([*completions(200), *beams]))
    result = run(
        source, target, *FAKE, "--max-num-seqs", "4", "--max-queued-reqs", "3", "--no-progress"
    )
    assert result.returncode == 0, result.stderr
    rows = answers(target)
    assert all(is_right(rows[f"r{i}"], i) for i in range(200)) and all(
        is_right(rows[f"b{i}"], i, 3) for i in range(9)
    )
    assert all(len(rows[f"b{i}"]["response"]["body"]["choices"]) == 2 for i in range(9))


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("{}\n", "holds something else than answers"),
        (
            '{"id": "batch_req_1", "custom_id": "other"}\n',
            "answers another input: its line batch_req_1 is not 'r0'",
        ),
        ('{"id": "batch_req_99", "custom_id": "r0"}\n', "has no line for batch_req_99"),
    ],
)
def test_an_output_of_something_else_is_left_alone(kept: str, words: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(completions(1)[0])
    target.write_text(kept)
    result = run(source, target, *FAKE)
    assert result.returncode == 1 and words in result.stderr and target.read_text() == kept


def test_what_cannot_be_started_is_said_in_one_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(completions(1)[0])
    for flags, words in {
        ("--model", "/no/such/model"): "/no/such/model does not exist",
        (*FAKE, "--num-kv-blocks", "1", "--max-model-len", "4096"): "does not fit",
        (*FAKE, "-dp", "2"): "--data-parallel-size 2: --num-workers starts several copies",
    }.items():
        result = run(source, tmp_path / "out.jsonl", *flags)
        assert result.returncode in (1, 2) and words in result.stderr.splitlines()[-1]
    for input_file, output_file, words in (
        (tmp_path / "none", tmp_path / "out.jsonl", "none does not exist"),
        (tmp_path, tmp_path / "out.jsonl", "is a directory; a file of requests is needed"),
        (source, source, "is both the input and the output"),
        (source, tmp_path / "no" / "out.jsonl", "out.jsonl"),
        (source, tmp_path, str(tmp_path)),
    ):
        result = run(input_file, output_file, *FAKE)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("pagewire run-batch: ") and words in result.stderr
    for name in ("-i", "-o"):
        result = run(source, tmp_path / "out.jsonl", name, "https://a/b.jsonl", *FAKE)
        assert result.returncode == 2 and "is a URL, and files are needed" in result.stderr


def test_chats_on_the_demo_model(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    chat = {"messages": talk, "temperature": 0, "max_tokens": 16}
    source.write_text(
        "\n".join(
            request(name, url="/v1/chat/completions", model=None, **chat) for name in ("one", "two")
        )
    )
    result = run(source, target, "--max-model-len", "512", "--max-num-seqs", "4", "--no-progress")
    assert result.returncode == 0, result.stderr
    texts = [
        row["response"]["body"]["choices"][0]["message"]["content"]
        for row in answers(target).values()
    ]
    assert len(texts) == 2 and texts[0] == texts[1] and "Paris" in texts[0]
