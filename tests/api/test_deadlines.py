"""What a client has only so much time for, and how many connections there may be."""

import socket
import time

import pytest
from api.conftest import Server
from pagewire.frontend import connection, service

HEAD = b"GET /live HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, server: Server) -> Server:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    monkeypatch.setattr(service, "CHECK_S", 0.05)
    server.frontend.service._next_check = 0.0
    return server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.frontend.port), 10)


def rest(client: socket.socket) -> bytes:
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


@pytest.mark.parametrize("sent", [b"", b"G", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(quick: Server, sent: bytes):
    with connect(quick) as client:
        client.sendall(sent)
        assert rest(client).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_trickles_in_is_not_waited_for(quick: Server):
    with connect(quick) as client:
        began = time.monotonic()
        with pytest.raises(OSError):
            while True:
                client.sendall(b"a")
                time.sleep(0.02)
                assert time.monotonic() - began < 10, "it is still read"


def test_the_next_head_on_a_connection_has_a_deadline_too(quick: Server):
    with connect(quick) as client:
        client.sendall(HEAD + b"\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(0.6)  # idle between two requests: no head has begun
        client.sendall(HEAD)
        assert rest(client).startswith(b"HTTP/1.1 408 ")


def test_whoever_waits_for_an_answer_has_no_deadline(quick: Server):
    answer = quick.post("/v1/completions", prompt="mum", max_tokens=2)
    assert answer.status_code == 200


def test_half_open_connections_are_gone_and_nobody_noticed(quick: Server):
    clients = [connect(quick) for _ in range(400)]
    try:
        for client in clients:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        assert quick.complete("hi").status_code == 200
        for client in clients:
            assert b" 408 " in rest(client)
        quick.settle(lambda: len(quick.frontend.service.connections) <= 2)
    finally:
        for client in clients:
            client.close()


def test_more_connections_than_the_process_can_have_are_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    with connect(server) as present:
        present.sendall(HEAD + b"\r\n")
        assert present.recv(4096).startswith(b"HTTP/1.1 200")
        with monkeypatch.context() as patch:
            patch.setattr(server.frontend.service.connections, "limit", 0)
            with connect(server) as late:
                assert is_closed(late)
            present.sendall(HEAD + b"\r\n")
            assert present.recv(4096).startswith(b"HTTP/1.1 200")
    assert server.http.get("/live").status_code == 200


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(10) == b""
    except ConnectionResetError:
        return True
