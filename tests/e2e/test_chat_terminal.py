"""`pagewire chat` in a terminal: what is typed, pasted and interrupted, against a server of the
test's own that answers with the number of the request."""

import contextlib
import http.server
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

READS = "\x1b[?2004h"
"""Sent when a text can be typed: from now on the terminal shall mark what is pasted, as PASTE does."""
NO_MARKS = "\x1b[?2004l"
PASTE = "\x1b[200~{}\x1b[201~"


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.wait_s = 0.0
        self.endless = False
        self.defaults: dict[str, Any] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def texts(self) -> list[str]:
        """What the user asked, request by request."""
        return [body["messages"][-1]["content"] for body in self.bodies]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        card = {"id": "tiny", "sampling_defaults": self.server.defaults}
        self.wfile.write(json.dumps({"data": [card]}).encode())

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        number = len(self.server.bodies)
        self.send_response(200)
        self.end_headers()
        time.sleep(self.server.wait_s)
        with contextlib.suppress(OSError):
            self.event(f"answer {number}")
            while self.server.endless:
                self.event(" more")
                time.sleep(0.05)
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, text: str) -> None:
        chunk = {"choices": [{"delta": {"content": text}}]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.endless = False
        server.shutdown()


class Terminal:
    """`pagewire chat` with a pseudo-terminal for its input and output."""

    def __init__(self, server: Server, home: Path, *flags: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pagewire", "chat", "--url", server.url, *flags],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={
                **os.environ,
                "XDG_STATE_HOME": str(home),
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            },
        )
        self.descriptor = slave
        self.shown = ""
        self._modes = ""
        """Whatever was shown, for the last of READS and NO_MARKS."""

    def wait(self, text: str, seconds: float = 30) -> None:
        """Until `text` is shown, after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other side is closed
                    received = os.read(self._master, 65536).decode(errors="replace")
                    self.shown += received
                    self._modes += received
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        left = text.encode()
        while left:
            left = left[os.write(self._master, left) :]

    def paste(self, text: str) -> None:
        """As a terminal does: lines end as if Enter had been pressed, and have marks around them where
        they are wanted now."""
        is_marked = self._modes.rfind(READS) > self._modes.rfind(NO_MARKS)
        text = text.replace("\n", "\r")
        keys = PASTE.format(text) if is_marked else text
        # the kernel takes a few KiB, the rest as it is read
        threading.Thread(target=self.type, args=(keys,), daemon=True).start()

    def end(self) -> int:
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self._master)
            os.close(self.descriptor)


def test_pasted_lines_are_one_question_and_commands_are_obeyed(
    server: Server, tmp_path: Path
) -> None:
    terminal = Terminal(server, tmp_path)
    terminal.wait("/help")
    terminal.wait(READS)
    terminal.type(PASTE.format("first line\nsecond line") + "\r")
    terminal.wait("answer 1")
    terminal.wait(READS)
    terminal.type('"""one\r')
    terminal.wait(READS)
    terminal.type('two"""\r')
    terminal.wait("answer 2")
    assert server.texts() == ["first line\nsecond line", "one\ntwo"]
    assert len(server.bodies[1]["messages"]) == 3
    assert (server.bodies[0]["temperature"], server.bodies[0]["max_tokens"]) == (0.7, 1024)
    for typed, shown in (
        ("/help", "/save FILE"),
        ("/set temperature 0", "temperature = 0"),
        ("/set top_k", "not set"),
        ("/sing", "no command /sing"),
        ("/system Be terse.", "new conversation"),
    ):
        terminal.wait(READS)
        terminal.type(f"{typed}\r")
        terminal.wait(shown)
    terminal.wait(READS)
    terminal.type("third\r")
    terminal.wait("answer 3")
    assert server.bodies[2]["temperature"] == 0
    assert [m["content"] for m in server.bodies[2]["messages"]] == ["Be terse.", "third"]
    file = tmp_path / "saved.json"
    terminal.wait(READS)
    terminal.type(f"/save {file}\r")
    terminal.wait("3 messages")
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["parameters"] == {"temperature": 0, "max_tokens": 1024}
    for typed, shown in (
        ("/clear", "new conversation"),
        ("/system", "Be terse."),
        ("/set temperature", "max_tokens = 1024"),
        ("/save", "a file is needed"),
        ("/save /no/such/directory/x", "could not be written"),
    ):
        terminal.wait(READS)
        terminal.type(f"{typed}\r")
        terminal.wait(shown)
    terminal.wait(READS)
    terminal.type("fourth\r")
    terminal.wait("answer 4")
    assert [m["content"] for m in server.bodies[3]["messages"]] == ["Be terse.", "fourth"]
    assert "temperature" not in server.bodies[3]
    terminal.wait(READS)
    terminal.type("/exit\r")
    assert terminal.end() == 0


def test_history_lasts_over_sessions(server: Server, tmp_path: Path) -> None:
    for keys in ("remember this\r", "\x1b[A\r"):
        terminal = Terminal(server, tmp_path)
        terminal.wait(READS)
        terminal.type(keys)
        terminal.wait("answer")
        terminal.wait(READS)
        terminal.type("\x04")
        assert terminal.end() == 0
    assert server.texts() == ["remember this", "remember this"]
    (history,) = (tmp_path / "pagewire").iterdir()
    assert history.stat().st_mode & 0o077 == 0


def test_a_sign_while_the_first_token_is_awaited(server: Server, tmp_path: Path) -> None:
    server.wait_s = 1.0
    terminal = Terminal(server, tmp_path, "-q", "hello")
    terminal.wait("…")
    terminal.wait("answer 1")
    assert terminal.end() == 0


def test_ctrl_c_ends_an_answer_but_not_the_chat(server: Server, tmp_path: Path) -> None:
    server.endless = True
    terminal = Terminal(server, tmp_path)
    terminal.wait(READS)
    terminal.type("go on\r")
    terminal.wait("more")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait("[stopped]")
    server.endless = False
    terminal.wait(READS)
    terminal.type("again\r")
    terminal.wait("answer 2")
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.bodies[1]["messages"][1]["content"].startswith("answer 1 more")
    terminal.wait(READS)
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.parametrize("lines", [3, 400])
def test_what_is_pasted_while_an_answer_is_written_is_one_question(
    lines: int, server: Server, tmp_path: Path
) -> None:
    """Not shown amid the answer, and of any length. What was typed before it is in front of it."""
    pasted = "\n".join(f"line {number} {'.' * 40}" for number in range(lines))
    server.endless = True
    terminal = Terminal(server, tmp_path)
    terminal.wait(READS)
    terminal.type("go on\r")
    terminal.wait("more")
    terminal.type("see ")
    terminal.paste(pasted + "\n")
    for _ in range(3):
        terminal.wait("more")
        assert "line 0" not in terminal.shown and "200~" not in terminal.shown
    server.endless = False
    terminal.wait(READS)
    terminal.wait(f"line {lines - 1} ")
    terminal.type("\r")
    terminal.wait("answer 2")
    terminal.wait(READS)
    terminal.type("\x04")
    assert terminal.end() == 0
    assert server.texts() == ["go on", f"see {pasted}"]


def test_keys_pressed_while_an_answer_is_written_are_the_next_questions(
    server: Server, tmp_path: Path
) -> None:
    server.endless = True
    terminal = Terminal(server, tmp_path)
    before = termios.tcgetattr(terminal.descriptor)
    terminal.wait(READS)
    terminal.type("go on\r")
    terminal.wait("more")
    terminal.type("second\rthird\r")
    terminal.wait("more")
    server.endless = False
    terminal.wait("answer 3")
    terminal.wait(READS)
    terminal.type("/exit\r")
    terminal.wait(NO_MARKS)
    assert terminal.process.wait(20) == 0
    assert termios.tcgetattr(terminal.descriptor)[:4] == before[:4]
    terminal.end()
    assert server.texts() == ["go on", "second", "third"]


def test_one_question_that_is_interrupted_exits_as_shells_expect(
    server: Server, tmp_path: Path
) -> None:
    server.endless = True
    terminal = Terminal(server, tmp_path, "-q", "go on")
    terminal.wait("more")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait("[stopped]")
    assert terminal.end() == 130


def test_what_the_model_recommends_goes_before_the_chat_s_default(server: Server) -> None:
    server.defaults = {"temperature": 0.6}
    command = [sys.executable, "-m", "pagewire", "chat", "--url", server.url]
    result = subprocess.run(
        command, input="one\n/set\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert "answer 1" in result.stdout and "temperature" not in server.bodies[0]


def test_a_pipe_that_is_interrupted_ends_as_shells_expect(server: Server) -> None:
    server.endless = True
    command = [sys.executable, "-m", "pagewire", "chat", "--url", server.url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("go on\nand this\n")
        process.stdin.close()
        assert process.stdout.read(len("answer 1")) == "answer 1"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and len(server.bodies) == 1
        assert "Traceback" not in process.stderr.read()
