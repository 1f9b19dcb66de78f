"""The deployment in front of the stacks: passes each HTTP request to the replica that Ray chooses,
its answer back piece by piece, and tries a request again whose replica died before it answered.

It looks into neither requests nor answers.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Final, cast
from urllib.parse import quote

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError
from ray.serve import metrics
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..frontend.errors import JSON, ApiError
from .forwarding import NOT_FORWARDED, ForwardedRequest, Head, StackUnreachable, kept
from .metrics import CONTENT_TYPE, merged_page

log = logging.getLogger("ray.serve")

ATTEMPTS: Final = 5
"""Replicas that may die of one request."""
FIRST_PAUSE_S: Final = 0.1
"""Before the second attempt; twice as long before each further one. Ray learns of a death
meanwhile."""
UNAVAILABLE: Final = 503
METRICS: Final = "/metrics"
METRICS_TIMEOUT_S: Final = 5.0
REPLICA_LOST: Final = (RayActorError, NodeDiedError, ObjectLostError, StackUnreachable)
"""The replica's process or node ended or cannot be reached, or its frontends ended."""


class Ingress:
    """A deployment's class: Ray makes one in each replica's process."""

    def __init__(self, stacks: DeploymentHandle, max_body_bytes: int) -> None:
        """`stacks`: the deployment of Stack. `max_body_bytes`: the largest body that they take."""
        self._stacks = stacks
        self._call = stacks.options(method_name="answer", stream=True)
        self._max_body_bytes = max_body_bytes
        self._retries = metrics.Counter(
            "pagewire_requests_retried",
            description="Requests tried again because their replica died before it answered.",
        )
        self._cuts = metrics.Counter(
            "pagewire_answers_cut",
            description="Answers broken off because their replica died while it sent them.",
        )

    async def __call__(self, request: Request) -> Response:
        """Any request below the application's route prefix."""
        if request.method == "GET" and path_of(request.scope) == METRICS:
            return await self._metrics()
        forwarded = await forwarded_request(request, self._max_body_bytes)
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            pieces = cast("DeploymentResponseGenerator[Any]", self._call.remote(forwarded))
            try:
                head: Head = await anext(pieces)
            except REPLICA_LOST as error:
                reason = _reason(error)
            except BackPressureError:
                return _error(ApiError(429, "Too many requests wait already.", retry_after_s=1))
            except DeploymentUnavailableError:
                return _error(ApiError(UNAVAILABLE, "No replica of the model can be started."))
            else:
                if head.status != UNAVAILABLE or attempt == ATTEMPTS:
                    return StreamedAnswer(head, pieces, self._note_cut)
                pieces.cancel()
                reason = "its stack says 503"
            if attempt < ATTEMPTS:
                log.warning("%s %s is tried again: %s", request.method, request.url.path, reason)
                self._retries.inc()
                await asyncio.sleep(pause_s)
                pause_s *= 2
        return _error(
            ApiError(
                UNAVAILABLE,
                f"{ATTEMPTS} replicas in a row ended before they answered this request.",
                retry_after_s=1,
            )
        )

    async def _metrics(self) -> Response:
        """Those of all stacks: one replica's alone would be another's at each scrape."""
        calls = self._stacks.broadcast("metrics")
        pages = await calls.results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
        by_replica = dict(page for page in pages if not isinstance(page, BaseException))
        return Response(merged_page(by_replica), headers={"Content-Type": CONTENT_TYPE})

    def _note_cut(self, error: Exception) -> None:
        log.error("an answer was cut: %s", _reason(error))
        self._cuts.inc()


class StreamedAnswer(Response):
    """The answer of a stack, as it comes. Where its replica dies, the connection is broken, which
    tells clients that the answer is not whole."""

    def __init__(self, head: Head, pieces: AsyncIterator[Any], on_cut: Any) -> None:
        super().__init__(status_code=head.status)
        self.raw_headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in head.headers
        ]
        self._first = head.chunk
        self._pieces = pieces
        self._on_cut = on_cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await send(_body(self._first, more=True))
        try:
            async for piece in self._pieces:
                await send(_body(piece, more=True))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Without its last message the server closes the connection.
            return self._on_cut(error)
        await send(_body(b"", more=False))


async def forwarded_request(request: Request, max_body_bytes: int) -> ForwardedRequest:
    """The request with its body, of which at most one byte more is read than the stacks take: they
    refuse it then, in their words."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_body_bytes:
            del body[max_body_bytes + 1 :]
            break
    return ForwardedRequest(
        request.method,
        target_of(request.scope),
        kept(request.headers.items(), NOT_FORWARDED),
        bytes(body),
    )


def target_of(scope: Scope) -> str:
    """Path and query below the route prefix, still encoded."""
    query = scope.get("query_string", b"").decode("latin-1")
    return f"{path_of(scope)}?{query}" if query else path_of(scope)


def path_of(scope: Scope) -> str:
    """The path below the route prefix, still encoded."""
    raw_path = scope.get("raw_path")
    path = raw_path.decode("latin-1") if raw_path else quote(scope["path"])
    return path.removeprefix(scope.get("root_path", "").rstrip("/")) or "/"


def _body(piece: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": piece, "more_body": more}


def _error(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers(), JSON)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
