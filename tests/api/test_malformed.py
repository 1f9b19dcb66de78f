"""What is no valid HTTP: an answer like any other error, a closed connection, one line in the log
without a traceback and without the client's bytes, which may hold a key."""

import json
import logging
import socket
import time

import pytest
from api.conftest import Server

BODY = b'{"prompt":"hi","max_tokens":1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /live HTTP/1.1\r\nHost: x\r\n"
SECRET = "sk-secret"
MALFORMED = {
    "a garbage line": (b"hello sk-secret\r\n\r\n", 400, "not valid HTTP"),
    "bytes": (b"\x00\x01\xff\xfe\r\n\r\n", 400, "not valid HTTP"),
    "NUL in a header": (
        GET + b"Authorization: Bearer sk-secret\0\r\n\r\n",
        400,
        "Invalid header value",
    ),
    "a space in a header's name": (GET + b"X : a\r\n\r\n", 400, "Invalid header token"),
    "a URL too long": (b"GET /" + b"sk-secret" * 2000 + b" HTTP/1.1\r\n\r\n", 431, "8190 bytes"),
    "a header too long": (GET + b"X: " + b"sk-secret" * 2000 + b"\r\n\r\n", 431, "8190 bytes"),
    "too many headers": (
        GET + b"".join(b"X-%d: a\r\n" % i for i in range(200)) + b"\r\n",
        431,
        "128 are allowed",
    ),
    "no such version": (b"GET /live HTTP/3.7\r\n\r\n", 400, "HTTP version"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400, "HTTP/1.1"),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + b"\1" * 190, 400, "use http://"),
    "a URL that is none": (b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "URL"),
    "a chunk without a length": (
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n0\r\n\r\n",
        400,
        "chunk size",
    ),
    "two kinds of length": (
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "Content-Length",
    ),
    "two lengths": (
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        400,
        "Content-Length",
    ),
    "a negative length": (POST + b"Content-Length: -5\r\n\r\nabcdef", 400, "Content-Length"),
    "more than its length": (POST + b"Content-Length: 10\r\n\r\n" + BODY, 400, "not valid HTTP"),
    "garbage after a request": (GET + b"\r\nhello\r\n\r\n", 400, "not valid HTTP"),
}
REFUSED = {
    "no version": (b"GET /live\r\n\r\n", 400, "no HTTP version"),
    "an expectation": (
        POST + b"Expect: nonsense\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
        417,
        "nonsense",
    ),
    "another type": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: text/plain\r\n"
        b"Content-Length: 2\r\n\r\n{}",
        415,
        "text/plain",
    ),
    "a type that is no text": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: \xff\xfe\r\n"
        b"Content-Length: 2\r\n\r\n{}",
        415,
        "application/json",
    ),
}
"""Valid HTTP that no handler answers."""


def exchange(server: Server, *pieces: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.frontend.port), 20) as client:
        answer = b""
        for piece in pieces:
            client.sendall(piece)
        while received := client.recv(65536):
            answer += received
    return answer


def check(answer: bytes, status: int, part: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *headers = head.decode().splitlines()
    assert first.split()[1] == str(status), answer
    assert "Server: pagewire" in headers and "Content-Type: application/json" in headers
    error = json.loads(body)
    assert error["code"] == error["error"]["code"] == status
    assert part in error["message"]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http(server, caplog: pytest.LogCaptureFixture, name: str) -> None:
    data, status, part = MALFORMED[name]
    answer = exchange(server, data)
    check(answer, status, part)
    assert SECRET.encode() not in answer
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert record.name == "pagewire.frontend" and record.exc_info is None
    line = record.getMessage()
    assert line.startswith("closed the connection of 127.0.0.1: ") and part in line
    assert SECRET not in line and "\n" not in line


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_handler(server, caplog: pytest.LogCaptureFixture, name: str) -> None:
    data, status, part = REFUSED[name]
    check(exchange(server, data), status, part)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_body_that_goes_wrong_later(server, caplog: pytest.LogCaptureFixture) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{" + b'"pro' + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.frontend.port), 20) as client:
        client.sendall(head)
        time.sleep(0.2)  # the handler waits for the rest by now; if it does not, all the better
        client.sendall(b"ZZ\r\n")
        answer = b""
        while received := client.recv(65536):
            answer += received
    check(answer, 400, "Invalid character in chunk size")
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert record.exc_info is None and "chunk size" in record.getMessage()


def test_a_client_that_leaves_early_is_no_error(server, caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"", b"GET /live HT", POST + b"Content-Length: 100\r\n\r\n" + BODY):
        with socket.create_connection(("127.0.0.1", server.frontend.port), 20) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(65536) == b""
    assert server.http.get("/live").status_code == 200
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_malformed_requests_are_counted(server) -> None:
    counters = server.frontend.service.state.counters
    before = counters.responses.get("unknown unknown 400", 0)
    exchange(server, MALFORMED["a garbage line"][0])
    assert counters.responses["unknown unknown 400"] == before + 1
