"""How far a starting stack is: asks the frontend's /health and draws it for a person.

A bar on a terminal, a line for each new stage elsewhere.
"""

import contextlib
import http.client
import json
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any, TextIO

from pagewire_protocol.agreed import LAUNCHER_AGENT

from ..process.logs import json_entry

POLL_S = 0.1
BAR_WIDTH = 24


@dataclass(frozen=True)
class State:
    ready: bool = False
    stage: str = "starting"
    fraction: float = 0.0


class Health:
    """Polls /health in a thread of its own, because a frontend that is still starting lets a
    connection wait."""

    def __init__(self, host: str, port: int, certificate: tuple[str, str] = ("", "")) -> None:
        """`certificate`: files of the frontend's own and of its key, where it serves HTTPS; shown
        to it where it asks for one."""
        self.state = State()
        self._certificate = certificate
        self._address = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def _poll(self) -> None:
        while not self._ended.is_set() and not self.state.ready:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self.state = self._ask()
            self._ended.wait(POLL_S)

    def _ask(self) -> State:
        connection = self._connect()
        try:
            connection.request("GET", "/health", headers={"User-Agent": LAUNCHER_AGENT})
            answer = connection.getresponse()
            body = answer.read()
            return State(ready=True) if answer.status == 200 else parse(json.loads(body))
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        """The certificate is not checked: it names a host and not this address."""
        certificate, key = self._certificate
        if not certificate:
            return http.client.HTTPConnection(*self._address, timeout=5)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.load_cert_chain(certificate, key or None)
        return http.client.HTTPSConnection(*self._address, timeout=5, context=context)


def parse(body: Any) -> State:
    """What a 503 body says is loading."""
    loading = body.get("loading") if isinstance(body, dict) else None
    rows = [row for row in loading if isinstance(row, dict)] if isinstance(loading, list) else []
    stages = [f"{row.get('role', '')} {row.get('stage', '')}".strip() for row in rows]
    fraction = min((float(row.get("fraction", 0.0)) for row in rows), default=0.0)
    return State(stage=", ".join(filter(None, stages)) or "starting", fraction=fraction)


class Display:
    """The only writer of a launcher's error stream: the services' lines, and below them one bar."""

    def __init__(self, stream: TextIO, log_format: str = "text") -> None:
        """log_format "json": every line is a JSON object, also those that a service or the launcher
        writes in plain text."""
        self._stream = stream
        self._json = log_format == "json"
        self._bar = stream.isatty() and not self._json
        self._shown = ""

    def log(self, name: str, line: str) -> None:
        self._clear()
        if not self._json:
            self._write(f"{name:<12} {line}\n")
        elif line.startswith('{"time": '):
            self._write(f"{line}\n")
        else:
            self._write_entry(name, line)

    def show(self, stage: str, fraction: float) -> None:
        if self._bar:
            filled = round(BAR_WIDTH * fraction)
            text = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {fraction:4.0%} {stage}"
            if text != self._shown:
                self._clear()
                self._write(text)
                self._shown = text
        elif stage != self._shown:
            self._shown = stage
            self.end(stage)

    def end(self, line: str) -> None:
        self._clear()
        if self._json:
            self._write_entry("launcher", line)
        else:
            self._write(f"{line}\n")

    def _write_entry(self, process: str, line: str) -> None:
        entry = json_entry(process, line, "info", time.time())
        self._write(f"{json.dumps(entry, ensure_ascii=False)}\n")

    def _clear(self) -> None:
        if self._bar and self._shown:
            self._write("\r\x1b[K")
            self._shown = ""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
