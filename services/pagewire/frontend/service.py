"""The frontend process: its event loop, its listening socket, its inbox, its end. Knows no
endpoint."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Generator
from typing import Final

import uvloop
from aiohttp import web
from pagewire_protocol.channels import Inbox, Outbox, new_incarnation, prepare_run_dir
from pagewire_protocol.messages import Deltas, Roster, ToFrontend, Tokenized
from pagewire_protocol.structs import Role

from pagewire.config import FrontendConfig, ModelConfig, RunConfig
from pagewire.process.membership import Membership

from ..requests.counter_exchange import CounterExchange
from ..requests.counters import Counters
from ..requests.errors import unavailable
from ..requests.owner import RequestOwner
from .app import make_app
from .auth import Auth, configured_keys
from .cors import cors_of
from .sse import Flusher
from .stack import Stack
from .state import State
from .tls import context_of

log = logging.getLogger("pagewire.frontend")
TICK_S: Final = 0.1
LEAVE_S: Final = 1.0
BACKLOG: Final = 4096
KEEP_ALIVE_S: Final = 75.0
_DRAIN_LIMIT: Final = 16
"""Messages handled before the loop gets a turn."""


class StartError(RuntimeError):
    """The process cannot start, for a reason that its user can mend."""


def run(run: RunConfig, model: ModelConfig, config: FrontendConfig) -> int:
    """Serve HTTP until SIGTERM or SIGINT; 0 then, 1 when it could not start."""
    logging.basicConfig(
        level=run.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    try:
        uvloop.run(_main(run, model, config))
    except (StartError, OSError, ValueError) as error:
        print(f"pagewire frontend: {error}", file=sys.stderr)
        return 1
    return 0


async def _main(run: RunConfig, model: ModelConfig, config: FrontendConfig) -> None:
    keys, names = configured_keys(config.api_key), config.served_model_name or (model.model,)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with contextlib.closing(listening_socket(config)) as listener:
        async with Service(run, names, Auth(keys), config).serving(listener) as service:
            host, port = listener.getsockname()[:2]
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            log.info(
                "listening on %s for model %s, %s",
                where,
                names[0],
                "with API keys" if keys else "without API keys",
            )
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 50, 50)
            await stop.wait()
            await service.drain()


def listening_socket(config: FrontendConfig) -> socket.socket:
    """The inherited socket, or a new one. Raises StartError naming the port when it is taken."""
    if config.socket_fd >= 0:
        return socket.socket(fileno=config.socket_fd)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StartError(
            f"cannot listen on {config.host}:{config.port}: {reason}; choose another --port or --host"
        ) from None


class Service:
    """The parts of a frontend, wired to the event loop that runs."""

    def __init__(
        self, run: RunConfig, names: tuple[str, ...], auth: Auth, config: FrontendConfig
    ) -> None:
        """Raises ValueError for a flag whose value cannot be used."""
        self._loop = asyncio.get_running_loop()
        self._tls, self._shutdown_timeout_s = context_of(config), config.shutdown_timeout
        run_dir, incarnation = prepare_run_dir(run.run_dir), new_incarnation()
        self.inbox: Inbox[ToFrontend] = Inbox(run_dir, Role.FRONTEND, incarnation)
        self.outbox = Outbox()
        name = run.name or f"frontend-{os.getpid()}"
        self.membership = Membership(
            Role.FRONTEND, name, incarnation, self.inbox, self.outbox, run_dir
        )
        tally, keep_alive_s = Counters(), config.sse_keep_alive_interval
        owner = RequestOwner(self.inbox.address, self.outbox.send, time.monotonic, tally)
        flusher = Flusher(self._loop, keep_alive_s)
        self.state = State(
            names,
            auth,
            owner,
            Stack(),
            tally,
            flusher,
            cors_of(config),
            config.max_body_mb << 20,
            config.enable_force_include_usage,
            keep_alive_s,
            config.request_timeout,
            started=int(time.time()),
        )
        self.state.together = CounterExchange(run_dir, incarnation, tally)
        self._inboxes: set[str] = set()
        self._next_tick = self._next_leave = 0.0
        self._ticker: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def serving(self, listener: socket.socket) -> "AsyncGenerator[Service]":
        """Joined, and answering HTTP requests."""
        runner = web.AppRunner(
            make_app(self.state),
            handle_signals=False,
            access_log=None,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=KEEP_ALIVE_S,
            shutdown_timeout=0.3,
        )
        await runner.setup()
        self._site = web.SockSite(runner, listener, backlog=BACKLOG, ssl_context=self._tls)
        await self._site.start()
        with self.joined():
            try:
                yield self
            finally:
                await runner.cleanup()

    @contextlib.contextmanager
    def joined(self) -> "Generator[None]":
        """A member of the stack, whose messages are handled."""
        self.membership.hello()
        self.membership.ready()
        self._loop.add_reader(self.inbox.fileno(), self._on_inbox)
        self._on_inbox()
        self._next_tick = self._loop.time()
        self._tick()
        try:
            yield
        finally:
            self._close()

    async def drain(self) -> None:
        """Answer new requests with 503; give those that run their time, then end them in words."""
        self.state.stack.draining = True
        deadline = self._loop.time() + self._shutdown_timeout_s
        while (self.state.generating or len(self.state.owner)) and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        await self._site.stop()
        self.state.owner.fail_all(unavailable("The server is shutting down.", retry_after_s=5))
        self.state.flusher.flush()
        await asyncio.sleep(0)

    def _close(self) -> None:
        if self._ticker:
            self._ticker.cancel()
        self._loop.remove_reader(self.inbox.fileno())
        self.membership.goodbye()
        self.outbox.close(linger_ms=200)
        self.inbox.close()
        if self.state.together:
            self.state.together.remove()

    def _tick(self) -> None:
        now, state = self._loop.time(), self.state
        state.lag_s = max(0.0, now - self._next_tick)
        self._next_tick = now + TICK_S
        self._ticker = self._loop.call_at(self._next_tick, self._tick)
        self.membership.busy = bool(len(state.owner))
        self.membership.progress += 1
        self.membership.tick(now)
        state.owner.tick()
        self._leave_counts(now)
        state.flusher.check()
        state.flusher.soon()

    def _leave_counts(self, now: float) -> None:
        """Once a second, where there are other frontends to read them."""
        if now >= self._next_leave and self.state.together and len(self.state.frontends()) > 1:
            self._next_leave = now + LEAVE_S
            self.state.together.publish()

    def _on_inbox(self) -> None:
        """The inbox's descriptor is edge-triggered: go on until it is empty, in turns with the rest
        of the loop."""
        handled = 0
        for message in self.inbox.drain(_DRAIN_LIMIT):
            handled += 1
            self._handle(message)
        self.state.flusher.soon()
        if handled:
            self._loop.call_soon(self._on_inbox)

    def _handle(self, message: ToFrontend) -> None:
        match message:
            case Deltas():
                try:
                    self.state.owner.on_deltas(message)
                except (ValueError, TypeError) as error:
                    self.state.tally.malformed += 1
                    log.warning("dropped a malformed message: %s", error)
            case Tokenized():
                self.state.owner.queries.on_answer(message)
            case Roster():
                self._on_roster(message)

    def _on_roster(self, roster: Roster) -> None:
        self.membership.on_roster(roster)
        self.state.stack.on_roster(roster, self.state.clock())
        self.state.owner.on_roster(roster)
        inboxes = {peer.inbox for peer in roster.peers if peer.role is Role.TOKENIZER}
        for gone in self._inboxes - inboxes:
            self.outbox.forget(gone)
        for new in inboxes - self._inboxes:
            self.outbox.reach(new)
        self._inboxes = inboxes
