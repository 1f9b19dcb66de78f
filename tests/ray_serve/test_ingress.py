"""The ingress, on a handle whose replicas answer, die or say 503 as each test wants."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pagewire.ray import ingress
from pagewire.ray.forwarding import ForwardedRequest, Head, StackUnreachable
from pagewire.ray.ingress import ATTEMPTS, Ingress, target_of
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request

DIED = ActorDiedError()
UNREACHABLE = StackUnreachable("the stack's frontend did not answer: gone")
OK = Head(200, (("content-type", "text/plain"),), b"first ")
BUSY = Head(503, (("content-type", "application/json"),), b"{}")


class Pieces:
    """What one replica says: items, or errors that it raises."""

    def __init__(self, items: list[Any]) -> None:
        self._items = iter(items)
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        item = next(self._items, None)
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment whose next replicas say `answers`."""

    def __init__(self, *answers: list[Any]) -> None:
        self.left = [Pieces(items) for items in answers]
        self.requests: list[ForwardedRequest] = []

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, request: ForwardedRequest) -> Pieces:
        self.requests.append(request)
        return self.left.pop(0)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "FIRST_PAUSE_S", 0.0)


def scope_of(path: str = "/llm/v1/models", prefix: str = "/llm") -> dict[str, Any]:
    path_part, _, query = path.partition("?")
    return {
        "type": "http",
        "method": "POST",
        "path": path_part,
        "raw_path": path_part.encode(),
        "root_path": prefix,
        "query_string": query.encode(),
        "headers": [(b"x-test", b"1"), (b"connection", b"close"), (b"content-length", b"4")],
        "server": ("localhost", 80),
    }


def answer(handle: Handle, body: bytes = b"body", limit: int = 1 << 20) -> list[dict[str, Any]]:
    """The ASGI messages that the ingress sends."""
    messages: list[dict[str, Any]] = []
    pieces = [body[at : at + 10] for at in range(0, len(body), 10)]

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        messages.append(message)

    async def run() -> None:
        scope = scope_of()
        app: Any = Ingress(handle, limit)  # type: ignore[arg-type]
        response = await app(Request(scope, receive))
        await response(scope, receive, send)

    asyncio.run(run())
    return messages


def body_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(message["body"] for message in messages[1:])


def test_an_answer_goes_through_piece_by_piece() -> None:
    handle = Handle([OK, b"second ", b"third"])
    messages = answer(handle)
    assert messages[0]["status"] == 200
    assert messages[0]["headers"] == [(b"content-type", b"text/plain")]
    assert [m["body"] for m in messages[1:]] == [b"first ", b"second ", b"third", b""]
    assert [m["more_body"] for m in messages[1:]] == [True, True, True, False]
    (request,) = handle.requests
    assert request == ForwardedRequest("POST", "/v1/models", (("x-test", "1"),), b"body")


@pytest.mark.parametrize("death", [DIED, UNREACHABLE], ids=["replica", "frontend"])
def test_a_request_is_tried_again_before_its_first_byte(death: Exception) -> None:
    handle = Handle([death], [death], [OK])
    messages = answer(handle)
    assert messages[0]["status"] == 200 and body_of(messages) == b"first "
    assert handle.requests == handle.requests[:1] * 3


def test_an_answer_that_is_cut_does_not_end_as_if_it_were_whole() -> None:
    handle = Handle([OK, b"second ", DIED], [OK])
    messages = answer(handle)
    assert body_of(messages) == b"first second "
    assert all(message["more_body"] for message in messages[1:])
    assert len(handle.requests) == 1


def test_after_the_last_attempt_the_client_is_told() -> None:
    handle = Handle(*[[DIED]] * ATTEMPTS)
    messages = answer(handle)
    assert messages[0]["status"] == 503
    assert (b"retry-after", b"1") in messages[0]["headers"]
    assert b"5 replicas in a row ended before they answered this request." in body_of(messages)


def test_another_replica_is_asked_where_a_stack_cannot_serve() -> None:
    handle = Handle([BUSY], [OK])
    first = handle.left[0]
    assert body_of(answer(handle)) == b"first "
    assert first.is_cancelled


def test_a_stacks_own_503_reaches_the_client_when_all_say_it() -> None:
    messages = answer(Handle(*[[BUSY]] * ATTEMPTS))
    assert messages[0]["status"] == 503 and body_of(messages) == b"{}"


def test_a_full_queue_is_429() -> None:
    messages = answer(Handle([BackPressureError(8, 8)]))
    assert messages[0]["status"] == 429
    assert b"RateLimitError" in body_of(messages)


def test_of_a_body_that_is_too_large_enough_is_read_for_the_stack_to_refuse_it() -> None:
    handle = Handle([OK])
    answer(handle, body=b"x" * 100, limit=25)
    assert len(handle.requests[0].body) == 26


@pytest.mark.parametrize(
    ("path", "prefix", "target"),
    [
        ("/llm/v1/models?a=%20b", "/llm", "/v1/models?a=%20b"),
        ("/v1/models/a%2Fb", "", "/v1/models/a%2Fb"),
        ("/llm", "/llm", "/"),
        ("/", "/", "/"),
    ],
)
def test_the_target_is_what_stands_below_the_prefix(path: str, prefix: str, target: str) -> None:
    assert target_of(scope_of(path, prefix)) == target
