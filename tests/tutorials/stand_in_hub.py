"""A Hugging Face hub of this machine, in little: repositories that are directories, branches, and
gates that a token opens."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "5" * 40
TOKEN = "hf_tutorial"


class StandInHub(ThreadingHTTPServer):
    """Repositories are added to `repositories` by name; those in `gated` are only for who has
    TOKEN."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Path] = {}
        self.revisions = {"main"}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and token of each request."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.asked.append((self.command, path, token))
        found = re.fullmatch(r"/api/models/(.+)/(?:revision|tree)/([^/]+)", path) or re.fullmatch(
            r"/(.+)/resolve/([^/]+)/(.+)", path
        )
        if found is None or found[1] not in self.server.repositories:
            return self._send(401, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        if found[1] in self.server.gated and token != TOKEN:
            return self._send(401, b"{}", with_body, {"X-Error-Code": "GatedRepo"})
        if found[2] not in {*self.server.revisions, COMMIT}:
            return self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
        folder = self.server.repositories[found[1]]
        if path.startswith("/api/"):
            return self._send(
                200,
                json.dumps(self._listing(found[1], folder, "/tree/" in path)).encode(),
                with_body,
                {},
            )
        content = (folder / found[3]).read_bytes()
        self._send(
            200,
            content,
            with_body,
            {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT},
        )

    def _listing(self, name: str, folder: Path, as_tree: bool) -> Any:
        files = [
            (str(file.relative_to(folder)), file.stat().st_size)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        if as_tree:
            return [
                {
                    "type": "file",
                    "path": path,
                    "size": size,
                    "oid": hashlib.sha1(path.encode()).hexdigest(),
                }
                for path, size in files
            ]
        return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path, _ in files]}

    def _send(self, status: int, content: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)
