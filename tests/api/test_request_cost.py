"""What a request costs the frontend beside its tokens, counted in calls of its own functions: unlike
times, these are the same on every machine."""

import socket
import sys
from collections import Counter
from types import FrameType

import pytest
from pagewire.frontend.connection import UNSENT

MOST_CALLS = {"/v1/completions": 240, "/v1/chat/completions": 268}
"""Of a streamed answer of one token. A new check of every request may add to it; what few requests
need should not."""
ROUNDS = 5


def calls_of(server, path: str, body: dict[str, object]) -> Counter[str]:
    """Calls of the frontend's own functions for one request, resumed coroutines included."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and "/pagewire/" in code.co_filename:
            calls[f"{code.co_filename.rpartition('/pagewire/')[2]}:{code.co_qualname}"] += 1

    loop = server.frontend._loop
    loop.call_soon_threadsafe(sys.setprofile, note)
    try:
        assert server.post(path, stream=True, max_tokens=1, **body).status_code == 200
    finally:
        loop.call_soon_threadsafe(sys.setprofile, None)
    server.settle(lambda: len(server.owner) == 0)
    return calls


@pytest.mark.parametrize("path", MOST_CALLS)
def test_a_plain_request_takes_few_calls(server, path: str) -> None:
    body: dict[str, object] = {"prompt": "hi"}
    if path.startswith("/v1/chat"):
        body = {"messages": [{"role": "user", "content": "hi"}]}
    calls_of(server, path, body)
    # Now and then the process has something else to do as well: the least counts.
    calls = min((calls_of(server, path, body) for _ in range(ROUNDS)), key=Counter.total)
    listed = "\n".join(f"{count} {name}" for name, count in calls.most_common())
    assert calls.total() <= MOST_CALLS[path], f"{calls.total()} calls:\n{listed}"


def test_a_connection_inherits_its_options(server) -> None:
    """They are not set on each, and still hold."""
    with socket.create_connection(("127.0.0.1", server.frontend.port), 10) as client:
        connections = server.frontend.service.connections._connections
        port = client.getsockname()[1]

        def accepted() -> socket.socket | None:
            sockets = [one.transport.get_extra_info("socket") for one in list(connections)]
            return next((one for one in sockets if one.getpeername()[1] == port), None)

        server.settle(lambda: accepted() is not None)
        served = accepted()
        assert served is not None
        assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT
        assert served.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
