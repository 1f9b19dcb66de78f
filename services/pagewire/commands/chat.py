"""`pagewire chat` and `pagewire complete`: talk to a running server in the terminal; answers are
printed as they come.

A plain client of the HTTP interface. What is typed is read by `terminal.py`.
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
from pathlib import Path
from typing import Any, Final

from ..cli import new_parser
from .terminal import Lines, Waiting

DEFAULT_URL = "http://localhost:8000"
CONNECT_S = 5
ANSWER_S = 600
"""Longest silence of the server within an answer."""
MAX_TOKENS: Final = 1024
"""Of an answer, where the command line says nothing: a small model may go on for ever."""
TEMPERATURE: Final = 0.7
"""Where neither the command line nor the model says one: 1, which servers take, is too hot for
small models."""
INTERRUPTED: Final = 130
"""The exit status after Ctrl-C, as shells have it."""
COMMAND = re.compile(r"/[a-z]+")
HELP: Final = {
    # command: (what follows it, what it does)
    "/help": ("", "this list"),
    "/clear": ("", "begin anew; the system prompt stays"),
    "/system": ("[TEXT]", "show the system prompt, or begin anew with another one"),
    "/set": (
        "[NAME [VALUE]]",
        "show the parameters, or set one, as in /set temperature 0; without VALUE unset it",
    ),
    "/save": ("FILE", "write the conversation to FILE as JSON"),
    "/exit": ("", "end, as Ctrl-D does"),
}


class ChatError(Exception):
    """The server cannot be used; the message is shown to the user."""


def _address(url: str) -> tuple[urllib.parse.SplitResult, int | None]:
    """The parts of an address, which may lack http://, and its port. Raises ValueError."""
    with contextlib.suppress(ValueError):  # a port that is no number, a bracket that is not closed
        address = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        port = address.port
        if address.scheme in ("http", "https") and address.hostname:
            return address, port
    raise ValueError(f"--url {url}: an address like {DEFAULT_URL} is needed")


class Client:
    """Requests to one server, a connection each."""

    def __init__(self, url: str, key: str) -> None:
        """`key` may be empty. Raises ValueError for what is no URL."""
        address, port = _address(url)
        self.url = f"{address.scheme}://{address.netloc}"
        self._is_secure = address.scheme == "https"
        self._host = address.hostname or ""
        self._port = port
        self._path = address.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def model(self) -> dict[str, Any]:
        """What the server says of the first name of its model. Raises ChatError."""
        with contextlib.closing(self._connect()) as connection:
            body = json.loads(self._send(connection, "GET", "/v1/models", None).read())
        return body["data"][0]

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
    commands = frozenset(HELP)

    def __init__(self, client: Client, model: str, system: str, options: dict[str, Any]) -> None:
        """`options`: parameters of every request, by name."""
        self._client = client
        self._model = model
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    @property
    def system(self) -> str:
        """The system prompt; empty for none."""
        return next((m["content"] for m in self.messages if m["role"] == "system"), "")

    def begin(self, system: str) -> None:
        """Forget all turns; `system` is the system prompt from now on."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def turn(self, text: str) -> int:
        """Send the user's text and print the answer. Returns 0, 1 after an error, or INTERRUPTED:
        Ctrl-C ends the answer. The part of an answer that came stays in the conversation."""
        pieces: list[str] = []
        status = 0
        body = {"model": self._model, **self.options, **self._request(text)}
        try:
            answer = self._client.answer(self.path, body)
            with contextlib.closing(answer) as received, Waiting() as waiting:  # type: ignore[type-var]
                for piece in received:
                    if piece:
                        waiting.end()
                        pieces.append(piece)
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
            status = INTERRUPTED
        except (ChatError, OSError, http.client.HTTPException, ValueError) as error:
            print(f"{os.linesep if pieces else ''}error: {error}", file=sys.stderr, flush=True)
            status = 1
        if pieces or status != 1:
            self._keep(text, "".join(pieces))
        if status != 1:
            print(flush=True)
        return status

    def _request(self, text: str) -> dict[str, Any]:
        return {"messages": [*self.messages, {"role": "user", "content": text}]}

    def _keep(self, text: str, answer: str) -> None:
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]


class Continuation(Conversation):
    """Completions: each turn is a text of its own, which the model continues."""

    path = "/v1/completions"
    commands = frozenset(HELP) - {"/clear", "/system"}

    def _request(self, text: str) -> dict[str, Any]:
        return {"prompt": text}


def main(arguments: list[str]) -> int:
    """`pagewire chat`."""
    about = (
        "Talk to a running server. Ctrl-C ends an answer, Ctrl-D the chat; /help lists commands."
    )
    return run("chat", about, Conversation, arguments)


def run(
    command: str, about: str, conversation_type: type[Conversation], arguments: list[str]
) -> int:
    """The command line of both commands, which differ in `conversation_type`. Returns the exit
    status."""
    options = parse(command, about, arguments)
    parameters = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    try:
        client = Client(options.url, options.api_key)
    except ValueError as error:
        print(f"pagewire {command}: {error}", file=sys.stderr)
        return 2
    try:
        card = client.model()
    except (ChatError, OSError, http.client.HTTPException, LookupError) as error:
        print(f"pagewire {command}: {error}", file=sys.stderr)
        return 1
    model = options.model or str(card["id"])
    recommended = (card.get("sampling_defaults") or {}).get("temperature")
    if options.temperature is None and recommended is None:
        parameters["temperature"] = TEMPERATURE
    parameters = {name: value for name, value in parameters.items() if value is not None}
    conversation = conversation_type(client, model, options.system, parameters)
    if options.quick is not None:
        return conversation.turn(options.quick)
    lines = Lines(command)
    if lines.interactive:
        print(
            f'{model} at {client.url} · Ctrl-C ends an answer, Ctrl-D the {command}; """ before and after several lines; /help'
        )
    return _loop(conversation, lines)


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
        help=f"0: always the most probable token; default: what the model recommends, else {TEMPERATURE}",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        help=f"longest answer in tokens (default: {MAX_TOKENS})",
    )
    parser.add_argument(
        "-q", "--quick", default=None, metavar="TEXT", help="one turn with this text, then end"
    )
    return parser.parse_args(arguments)


def _loop(conversation: Conversation, lines: Lines) -> int:
    """Turns until the input ends. With input from a pipe, a program reads the exit status: one
    error makes it 1, and Ctrl-C ends it."""
    status = 0
    while True:
        try:
            text = lines.read()
        except EOFError:
            return status
        except KeyboardInterrupt:
            if not lines.interactive:
                return INTERRUPTED
            print()
            continue
        word = text.split(maxsplit=1)[0] if text.strip() else ""
        if word in ("/exit", "/quit") and text.strip() == word:
            return status
        if COMMAND.fullmatch(word) and "\n" not in text:
            print(_command(conversation, word, text.strip()[len(word) :].strip()))
        elif word:
            with lines.kept():
                ended = conversation.turn(text)
            if not lines.interactive:
                if ended == INTERRUPTED:
                    return INTERRUPTED
                status = max(status, ended)


def _command(conversation: Conversation, word: str, argument: str) -> str:
    """Obey a line that begins with a slash. Returns what to print."""
    if word not in conversation.commands:
        return f"there is no command {word}; /help lists them"
    match word:
        case "/help":
            rows = ((name, *HELP[name]) for name in HELP if name in conversation.commands)
            return "\n".join(f"  {f'{name} {usage}':<20} {about}" for name, usage, about in rows)
        case "/clear":
            conversation.begin(conversation.system)
            return "(a new conversation)"
        case "/system":
            if argument:
                conversation.begin(argument)
                return "(a new conversation, with this system prompt)"
            return conversation.system or "(no system prompt)"
        case "/set":
            return _set(conversation.options, argument)
        case _:
            return _save(conversation, argument)


def _set(options: dict[str, Any], argument: str) -> str:
    name, _, text = argument.partition(" ")
    if text.strip():
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text.strip()
    elif name and options.pop(name, None) is None:
        return f"({name} is not set; /set {name} VALUE sets it)"
    lines = (f"{key} = {json.dumps(value)}" for key, value in options.items())
    return "\n".join(lines) or "(everything as the server has it)"


def _save(conversation: Conversation, name: str) -> str:
    if not name:
        return "a file is needed: /save FILE"
    body = {"messages": conversation.messages, "parameters": conversation.options}
    try:
        Path(name).expanduser().write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"{name} could not be written: {error.strerror or error}"
    return f"({len(conversation.messages)} messages in {name})"
