"""One whole stack on this node, started and watched by the program that uses it, behind a port of
the loopback interface. Knows nothing of Ray."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

import aiohttp
from msgspec import structs
from pagewire_protocol.agreed import LAUNCHER_AGENT
from yarl import URL

from ..launch import stack
from ..launch.background import BackgroundServices, find_files
from ..launch.progress import State, parse
from ..launch.serve import check_frontend
from ..process.listening import listening_socket
from .forwarding import (
    NOT_FORWARDED,
    NOT_RETURNED,
    ForwardedRequest,
    Head,
    StackUnreachable,
    kept,
)

HOST: Final = "127.0.0.1"
POLL_S: Final = 0.1
PROBE_TIMEOUT_S: Final = 5.0
REPAIR_S: Final = 60.0
"""For so long a stack may be without a worker or tokenizer, which it starts again by itself, before
it counts as unhealthy. Its frontends keep requests waiting as long."""
SPACING_S: Final = 1e-3
"""Least time between two pieces of one answer, for each answer under way: a piece costs Ray's
processes about as much, which would be more than there is for each token of hundreds of streams.
Tokens that come meanwhile go in one piece. First pieces do not wait."""
ADDED_BY_CLIENT: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that aiohttp would add to a request that lacks them."""


class StackFailed(RuntimeError):
    """The stack could not be started or kept running; the message holds the last words of the
    service that failed."""


class LocalStack:
    """`start` it, `answer` requests, `close` it. Belongs to one event loop, but for `stop`."""

    def __init__(
        self,
        config: stack.StackConfig,
        log: Callable[[str], None],
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`log` gets each line that a service prints, after the service's name. `on_failure` is
        called in another thread, with the reason, when the services of a stack that has started are
        gone for good."""
        self._config = config
        self._log = log
        self._on_failure = on_failure
        self._has_started = False
        self._run_dir = stack.new_run_dir()
        self._listener: socket.socket | None = None
        self._services: BackgroundServices | None = None
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._under_way = 0
        """Answers."""
        self._healthy_at = 0.0
        """When it was last seen to serve: monotonic seconds."""

    async def start(self) -> None:
        """Returns when requests can be served. Raises StackFailed, hub.ModelNotFound, or ValueError
        for a setting."""
        config = self._config
        assert config.frontend is not None
        check_frontend(config.frontend)
        model = await asyncio.to_thread(find_files, config, self._log)
        # A frontend that is started again inherits the socket once more, so it stays open.
        self._listener = listening_socket(HOST, 0)
        port = self._listener.getsockname()[1]
        frontend = structs.replace(
            config.frontend, host=HOST, port=port, socket_fd=self._listener.fileno()
        )
        run = structs.replace(config.run, run_dir=str(self._run_dir))
        self._url = f"http://{HOST}:{port}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),
            skip_auto_headers=ADDED_BY_CLIENT,
        )
        self._services = BackgroundServices(
            structs.replace(config, run=run, frontend=frontend),
            model,
            self._on_services_ended,
            lambda name, line: self._log(f"{name:<12} {line}"),
        )
        await self._wait_ready(self._services)
        self._services.mark_ready()
        self._healthy_at = time.monotonic()
        self._has_started = True

    async def check_health(self) -> None:
        """Raises StackFailed when the services are gone for good, and when the stack could not
        serve for REPAIR_S."""
        services = self._services
        if services is None or not services.alive:
            raise StackFailed(
                services.failure if services else "the stack was not started, or was stopped"
            )
        state = await self._probe()
        now = time.monotonic()
        if state.ready:
            self._healthy_at = now
        elif now - self._healthy_at > REPAIR_S:
            raise StackFailed(
                f"the stack has served nothing for {now - self._healthy_at:.0f} s: {state.stage}"
            )

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[Head | bytes, None]:
        """The answer's Head, then the rest of its body in pieces as they come. Raises
        StackUnreachable before the Head where the frontend ended, and aiohttp.ClientError where it
        ends later."""
        assert self._session is not None
        try:
            response = await self._session.request(
                request.method,
                URL(self._url + request.target, encoded=True),
                headers=kept(request.headers, NOT_FORWARDED),
                data=request.body or None,
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            raise StackUnreachable(_words(error)) from None
        async with response:
            try:
                # The head goes with the first piece: until then another replica can answer instead.
                chunk = await response.content.readany()
            except aiohttp.ClientError as error:
                raise StackUnreachable(_words(error)) from None
            headers = kept(response.headers.items(), NOT_RETURNED)
            self._under_way += 1
            try:
                yield Head(response.status, headers, chunk)
                sent_at = time.monotonic()
                while chunk := await response.content.readany():
                    wait_s = sent_at + self._under_way * SPACING_S - time.monotonic()
                    if wait_s > SPACING_S:
                        await asyncio.sleep(wait_s)
                        chunk += response.content.read_nowait()
                    yield chunk
                    sent_at = time.monotonic()
            finally:
                self._under_way -= 1

    def stop(self) -> None:
        """End the services and remove what they left. Safe from any thread; returns when all have
        ended. Does nothing the second time."""
        services = self._services
        self._services = None
        if services is not None:
            services.stop()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        stack.remove_run_dir(self._run_dir)

    async def close(self) -> None:
        """`stop`, without keeping the event loop waiting, and close connections."""
        await asyncio.to_thread(self.stop)
        if self._session is not None:
            await self._session.close()

    def pids(self) -> dict[str, int]:
        """The services' process ids by name."""
        return self._services.pids() if self._services else {}

    def _on_services_ended(self) -> None:
        services = self._services
        if services is not None and self._has_started:
            self._on_failure(services.failure)

    async def _wait_ready(self, services: BackgroundServices) -> None:
        stage = ""
        while services.alive:
            state = await self._probe()
            if state.ready:
                return
            if state.stage != stage:
                stage = state.stage
                self._log(stage)
            await asyncio.sleep(POLL_S)
        raise StackFailed(services.failure)

    async def _probe(self) -> State:
        """What /health says."""
        assert self._session is not None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with self._session.get(
                f"{self._url}/health",
                headers={"User-Agent": LAUNCHER_AGENT},
                timeout=aiohttp.ClientTimeout(PROBE_TIMEOUT_S),
            ) as response:
                if response.status == 200:
                    return State(ready=True)
                return parse(json.loads(await response.read()))
        return State(stage="the frontend does not answer")


def _words(error: aiohttp.ClientError) -> str:
    return f"the stack's frontend did not answer: {error or type(error).__name__}"
