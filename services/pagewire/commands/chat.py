"""`pagewire chat` and `pagewire complete`: a running server in the terminal, answers as they come.

A plain client of the HTTP interface, with nothing but the standard library.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

from ..cli import new_parser

DEFAULT_URL = "http://localhost:8000"
CONNECT_S, ANSWER_S = 5, 600
COMMAND = re.compile(r"/[a-z]+")


class ChatError(Exception):
    """Something a person can read."""


class Client:
    def __init__(self, url: str, key: str) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url {url}: an address like {DEFAULT_URL} is needed")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }

    def model(self) -> str:
        """The first name the server answers to."""
        with contextlib.closing(self._connect()) as connection:
            body = json.loads(self._send(connection, "GET", "/v1/models", None).read())
        return str(body["data"][0]["id"])

    def answer(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        """The pieces of the answer's text. Closing the iterator ends the generation on the
        server."""
        with contextlib.closing(self._connect()) as connection:
            response = self._send(connection, "POST", path, json.dumps({**body, "stream": True}))
            for line in response:
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                if line.startswith(b"data: "):
                    yield _piece(json.loads(data))
        raise ChatError("the server broke off the answer")

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as error:
            raise ChatError(
                f"no server at {self.url} ({error.strerror or error}); `pagewire serve` starts one"
            ) from None
        connection.sock.settimeout(ANSWER_S)
        return connection

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: str | None
    ) -> http.client.HTTPResponse:
        connection.request(method, self._path + path, body, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ChatError(explain(response.status, response.read()))
        return response


def _piece(event: dict[str, Any]) -> str:
    if "error" in event:
        raise ChatError(_message(event) or "the server reported an error")
    choices = event.get("choices") or [{}]
    return choices[0].get("text") or choices[0].get("delta", {}).get("content") or ""


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", "")) if isinstance(error, dict) else str(error)


def explain(status: int, raw: bytes) -> str:
    """An HTTP error in plain words."""
    try:
        message = _message(json.loads(raw))
    except ValueError:
        message = raw.decode(errors="replace").strip()[:200]
    lead = {
        401: "the server wants an API key: --api-key, or PAGEWIRE_API_KEY",
        404: "not found",
        429: "the server is full, try again in a moment",
        503: "the server is not ready yet, try again in a moment",
    }.get(status, f"the server answered {status}")
    return f"{lead} ({message})" if message else lead


class Conversation:
    """Each turn sees those before it."""

    path = "/v1/chat/completions"

    def __init__(self, client: Client, model: str, system: str, options: dict[str, Any]) -> None:
        self._client, self._options = client, {"model": model, **options}
        self._messages = [{"role": "system", "content": system}] if system else []

    def turn(self, text: str) -> bool:
        """One question and its printed answer; False after an error. Ctrl-C ends the answer, not
        the chat. What came of an answer stays part of the conversation."""
        said, whole = list[str](), True
        try:
            answer = self._client.answer(self.path, {**self._options, **self._asked(text)})
            with contextlib.closing(answer) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    said.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except (ChatError, OSError, http.client.HTTPException, ValueError) as error:
            print(f"{os.linesep if said else ''}error: {error}", file=sys.stderr, flush=True)
            whole = False
            if not said:
                return whole
        self._answered(text, "".join(said))
        if whole:
            print()
        return whole

    def clear(self) -> None:
        self._messages = [message for message in self._messages if message["role"] == "system"]

    def _asked(self, text: str) -> dict[str, Any]:
        return {"messages": [*self._messages, {"role": "user", "content": text}]}

    def _answered(self, text: str, said: str) -> None:
        self._messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": said},
        ]


class Continuation(Conversation):
    """Each turn is a text of its own, which the model continues."""

    path = "/v1/completions"

    def _asked(self, text: str) -> dict[str, Any]:
        return {"prompt": text}

    def _answered(self, text: str, said: str) -> None:
        pass


def main(arguments: list[str]) -> int:
    about = "Talk to a running server. Ctrl-C ends an answer, Ctrl-D the chat; /clear forgets the conversation."
    return run("chat", about, Conversation, arguments)


def run(command: str, about: str, kind: type[Conversation], arguments: list[str]) -> int:
    options = parse(command, about, arguments)
    chosen = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    try:
        client = Client(options.url, options.api_key)
        model = options.model or client.model()
    except (ChatError, OSError, http.client.HTTPException, LookupError) as error:
        print(f"pagewire {command}: {error}", file=sys.stderr)
        return 1
    talk = kind(
        client,
        model,
        options.system,
        {key: value for key, value in chosen.items() if value is not None},
    )
    if options.quick is not None:
        return 0 if talk.turn(options.quick) else 1
    if sys.stdin.isatty():
        print(
            f"{model} at {client.url} · Ctrl-C ends an answer, Ctrl-D the {command}, /clear starts anew"
        )
    return _loop(talk)


def parse(command: str, about: str, arguments: list[str]) -> argparse.Namespace:
    parser = new_parser(command, about)
    key = os.environ.get("PAGEWIRE_API_KEY") or os.environ.get("VLLM_API_KEY", "")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    parser.add_argument(
        "--model", "--model-name", default="", help="default: the first the server names"
    )
    if command == "chat":
        parser.add_argument("--system", "--system-prompt", default="", help="system prompt")
    else:
        parser.set_defaults(system="")
    parser.add_argument("--api-key", default=key, help="default: PAGEWIRE_API_KEY or VLLM_API_KEY")
    parser.add_argument(
        "--temperature",
        type=float,
        default=None,
        help="0: always the likeliest token; default: the server's",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=None,
        help="longest answer in tokens; default: the server's",
    )
    parser.add_argument(
        "-q", "--quick", default=None, metavar="TEXT", help="one turn with this text, then end"
    )
    return parser.parse_args(arguments)


def _loop(talk: Conversation) -> int:
    """Until the input ends. What comes from a pipe is a program's: then one error makes the exit
    code 1."""
    status = 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input())
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            print(end="\n" if prompt else "")
            return status
        except KeyboardInterrupt:
            print()
            continue
        if text == "/clear":
            talk.clear()
            print("(a new conversation)")
        elif COMMAND.fullmatch(text):
            print(f"there is no command {text}; /clear starts anew, Ctrl-D ends the chat")
        elif text and not talk.turn(text) and not prompt:
            status = 1
