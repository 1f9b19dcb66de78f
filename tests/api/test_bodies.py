"""How request bodies arrive: at once, in pieces, or never."""

import json
import socket

import pytest
from api.conftest import serve
from pagewire.frontend import body

BODY = json.dumps({"model": "alias", "prompt": "hi", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def answer(port: int, *pieces: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
        found = b""
        while piece := client.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize("cut", [0, 1, len(BODY) // 2, len(BODY)])
def test_a_body_may_come_with_its_head_or_after_it(server, cut: int) -> None:
    head = HEAD % len(BODY)
    found = answer(
        server.frontend.port, head + BODY[:cut], *([BODY[cut:]] if cut < len(BODY) else [])
    )
    assert found.startswith(b"HTTP/1.1 200") and b'"text_completion"' in found


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
        ("/tokenize", {"prompt": "hi"}),
    ],
)
def test_a_byte_order_mark_is_passed_over(server, path: str, fields: dict[str, object]) -> None:
    """Editors on Windows begin files with one, and curl sends files as they are."""
    content = json.dumps(fields).encode("utf-8-sig")
    assert server.http.post(path, content=content).status_code == 200
    assert "is empty" in server.http.post(path, content=b"\xef\xbb\xbf").text


def test_a_body_that_stops_coming_is_not_waited_for(
    server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "BODY_S", 0.2)
    found = answer(server.frontend.port, HEAD % len(BODY), BODY[:9])
    assert found.startswith(b"HTTP/1.1 408") and b"did not arrive within" in found


def test_a_tokenizer_is_reached_before_the_first_request() -> None:
    with serve() as fresh:
        service = fresh.frontend.service
        fresh.settle(lambda: bool(service._tokenizer_inboxes))
        assert service._tokenizer_inboxes <= set(service.outbox._sockets)
