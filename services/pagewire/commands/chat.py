"""`pagewire chat` and `pagewire complete`: talk to a running server in the terminal; answers are
printed as they come.

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
CONNECT_S = 5
ANSWER_S = 600
"""Longest silence of the server within an answer."""
COMMAND = re.compile(r"/[a-z]+")


class ChatError(Exception):
    """The server cannot be used; the message is shown to the user."""


class Client:
    """Requests to one server, a connection each."""

    def __init__(self, url: str, key: str) -> None:
        """`key` may be empty. Raises ValueError for what is no URL."""
        address = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"--url {url}: an address like {DEFAULT_URL} is needed")
        self.url = f"{address.scheme}://{address.netloc}"
        self._is_secure = address.scheme == "https"
        self._host = address.hostname
        self._port = address.port
        self._path = address.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def model(self) -> str:
        """The first name of the server's model. Raises ChatError."""
        with contextlib.closing(self._connect()) as connection:
            body = json.loads(self._send(connection, "GET", "/v1/models", None).read())
        return str(body["data"][0]["id"])

    def answer(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        """The pieces of the answer's text. Closing the iterator ends the generation on the server.
        Raises ChatError."""
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
        connect = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = connect(self._host, self._port, timeout=CONNECT_S)
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
    """An HTTP error as a line that says what to do."""
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
    """A chat: the model sees all turns so far."""

    path = "/v1/chat/completions"

    def __init__(self, client: Client, model: str, system: str, options: dict[str, Any]) -> None:
        self._client, self._options = client, {"model": model, **options}
        self._messages = [{"role": "system", "content": system}] if system else []

    def turn(self, text: str) -> bool:
        """Send the user's text and print the answer; False after an error. Ctrl-C ends the answer,
        not the chat. The part of an answer that came stays in the conversation."""
        pieces: list[str] = []
        try:
            answer = self._client.answer(self.path, {**self._options, **self._request(text)})
            with contextlib.closing(answer) as received:  # type: ignore[type-var]
                for piece in received:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except (ChatError, OSError, http.client.HTTPException, ValueError) as error:
            print(f"{os.linesep if pieces else ''}error: {error}", file=sys.stderr, flush=True)
            if pieces:
                self._keep(text, "".join(pieces))
            return False
        self._keep(text, "".join(pieces))
        print()
        return True

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._messages = [message for message in self._messages if message["role"] == "system"]

    def _request(self, text: str) -> dict[str, Any]:
        return {"messages": [*self._messages, {"role": "user", "content": text}]}

    def _keep(self, text: str, answer: str) -> None:
        self._messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]


class Continuation(Conversation):
    """Completions: each turn is a text of its own, which the model continues."""

    path = "/v1/completions"

    def _request(self, text: str) -> dict[str, Any]:
        return {"prompt": text}

    def _keep(self, text: str, answer: str) -> None:
        pass


def main(arguments: list[str]) -> int:
    """`pagewire chat`."""
    about = "Talk to a running server. Ctrl-C ends an answer, Ctrl-D the chat; /clear forgets the conversation."
    return run("chat", about, Conversation, arguments)


def run(command: str, about: str, kind: type[Conversation], arguments: list[str]) -> int:
    """The command line of both commands, which differ in `kind`. Returns the exit status."""
    options = parse(command, about, arguments)
    parameters = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    try:
        client = Client(options.url, options.api_key)
        model = options.model or client.model()
    except (ChatError, OSError, http.client.HTTPException, LookupError) as error:
        print(f"pagewire {command}: {error}", file=sys.stderr)
        return 1
    parameters = {name: value for name, value in parameters.items() if value is not None}
    conversation = kind(client, model, options.system, parameters)
    if options.quick is not None:
        return 0 if conversation.turn(options.quick) else 1
    if sys.stdin.isatty():
        print(
            f"{model} at {client.url} · Ctrl-C ends an answer, Ctrl-D the {command}, /clear starts anew"
        )
    return _loop(conversation)


def parse(command: str, about: str, arguments: list[str]) -> argparse.Namespace:
    """The options of both commands."""
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
        help="0: always the most probable token; default: the server's",
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


def _loop(conversation: Conversation) -> int:
    """Turns until the input ends. With input from a pipe, a program reads the exit status: one
    error makes it 1."""
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
            conversation.clear()
            print("(a new conversation)")
        elif COMMAND.fullmatch(text):
            print(f"there is no command {text}; /clear starts anew, Ctrl-D ends the chat")
        elif text and not conversation.turn(text) and not prompt:
            status = 1
