"""The frontend process: its event loop, its listening socket, its inbox, its end. Knows no
endpoint."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncGenerator, Generator
from functools import partial
from typing import Final

import uvloop
from aiohttp import web
from pagewire_protocol.messages import Deltas, Roster, ToFrontend, Tokenized
from pagewire_protocol.structs import Role

from pagewire.config import FrontendConfig, ModelConfig, RunConfig
from pagewire.process import alive, last_words
from pagewire.process.listening import BACKLOG, listening_socket
from pagewire.process.node import MANY_OBJECTS, Node, settle_gc
from pagewire.process.parent import Started

from ..requests.counter_exchange import CounterExchange
from ..requests.counters import Counters
from ..requests.errors import unavailable
from ..requests.owner import RequestOwner
from .admission import Admission
from .api_keys import KeysFile
from .app import make_app
from .auth import Auth, configured_keys
from .body import LargeBodies
from .connection import HEAD_S, Connection, Connections, prepare_listener
from .cors import cors_of
from .key_limits import KeyLimits
from .sse import Flusher
from .stack import Stack
from .state import State
from .tls import context_of

log = logging.getLogger("pagewire.frontend")
TICK_S: Final = 0.1
IDLE_TICK_S: Final = 0.5
"""While there is no request."""
LARGE_BODIES: Final = 8
"""Bodies of the largest size that may be held at a time."""
CHECK_S: Final = 1.0
"""How often connections are looked for whose clients take too long."""
SHARE_COUNTERS_S: Final = 1.0
"""How often the other frontends of a stack get this one's counters."""
IDLE_SHARE_COUNTERS_S: Final = 3.0
"""The same while no request was generated since the last time: only probes and processor time count."""
ACCEPTED_S: Final = 0.5
"""How long a frontend that is told to end waits for the heads of requests on new connections."""
SETTLE_S: Final = 0.02
_DRAIN_LIMIT: Final = 16
"""Messages handled before the event loop runs other tasks."""


def run(run: RunConfig, model: ModelConfig, config: FrontendConfig) -> int:
    """Serve HTTP until SIGTERM or SIGINT; 0 then, 1 when it could not start."""
    try:
        uvloop.run(_main(run, model, config))
    except (OSError, ValueError) as error:
        last_words.say("frontend", str(error))
        return 1
    return 0


async def _main(run: RunConfig, model: ModelConfig, config: FrontendConfig) -> None:
    keys = configured_keys(config.api_key)
    names = config.served_model_name or (model.model,)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with contextlib.closing(_listener(config)) as listener:
        service = Service(run, names, Auth(keys), config, model)
        async with service.serving(listener):
            host, port = listener.getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            log.info(
                "listening on %s for model %s, %s, at most %d connections",
                address,
                names[0],
                "with API keys" if service.state.auth.required else "without API keys",
                service.connections.limit,
            )
            settle_gc(MANY_OBJECTS)
            await stop.wait()
            await service.drain()


def _listener(config: FrontendConfig) -> socket.socket:
    """The socket that the launcher opened for all its frontends, or a new one."""
    if config.socket_fd >= 0:
        return socket.socket(fileno=config.socket_fd)
    return listening_socket(config.host, config.port)


class Service:
    """The parts of a frontend, wired to the event loop that runs."""

    def __init__(
        self,
        run: RunConfig,
        names: tuple[str, ...],
        auth: Auth,
        config: FrontendConfig,
        model: ModelConfig | None = None,
    ) -> None:
        """`model`: None where only its names are known. Raises ValueError for a flag whose value cannot be used."""
        self._loop = asyncio.get_running_loop()
        self._tls = context_of(config)
        self._keys_file = KeysFile(config.api_keys_file) if config.api_keys_file else None
        self._shutdown_timeout_s = config.shutdown_timeout
        self._shutdown_delay_s = run.shutdown_delay
        self._owns_listener = config.socket_fd < 0
        node: Node[ToFrontend] = Node(run.run_dir, Role.FRONTEND, run.name)
        self.inbox = node.inbox
        self.outbox = node.outbox
        self.membership = node.membership
        counters = Counters()
        owner = RequestOwner(
            self.inbox.address,
            self.outbox.send,
            time.monotonic,
            counters,
            joins_running_stack=Started.failures > 0,
        )
        self.state = State(
            log_requests=config.enable_log_requests,
            names=names,
            model_path=model.model if model else names[0],
            tokenizer_path=(model.tokenizer or model.model) if model else names[0],
            auth=auth,
            owner=owner,
            admission=Admission(owner),
            key_limits=KeyLimits(counters),
            stack=Stack(names),
            counters=counters,
            flusher=Flusher(self._loop, config.sse_keep_alive_interval),
            cors=cors_of(config),
            max_body=config.max_body_mb << 20,
            large_bodies=LargeBodies(LARGE_BODIES * (config.max_body_mb << 20)),
            force_usage=config.enable_force_include_usage,
            has_docs=not config.disable_fastapi_docs,
            keep_alive_s=config.sse_keep_alive_interval,
            request_timeout_s=config.request_timeout,
            started=int(time.time()),
            counter_exchange=CounterExchange(node.run_dir, node.incarnation, counters),
        )
        self._alive = alive.Alive(node.run_dir, "frontend", node.incarnation)
        if self.state.counter_exchange:
            self.state.counter_exchange.fold(lambda: alive.living(node.run_dir, "frontend"))
        if self._keys_file:
            self._use_keys(self._keys_file)
        self._tokenizer_inboxes: set[str] = set()
        self._next_tick = 0.0
        self._shared_at = float("-inf")
        self._shared_finished = 0
        self._next_check = 0.0
        self.connections = Connections()
        self._ticker: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def serving(self, listener: socket.socket) -> "AsyncGenerator[Service]":
        """As `joined`, and HTTP requests to `listener` are answered."""
        runner = web.AppRunner(
            make_app(self.state),
            handle_signals=False,
            handler_cancellation=True,
            shutdown_timeout=0.3,
        )
        await runner.setup()
        assert runner.server is not None
        connect = partial(
            Connection, runner.server, self._loop, self.state.counters, self.connections
        )
        prepare_listener(listener)
        self._server = await self._loop.create_server(
            connect,
            sock=listener,
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=HEAD_S if self._tls else None,
        )
        with self.joined():
            try:
                yield self
            finally:
                self._server.close()
                await runner.cleanup()

    @contextlib.contextmanager
    def joined(self) -> "Generator[None]":
        """Within the context, this process is a member of the stack and handles its messages."""
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
        """In this order: the health answers turn, so that a balancer sends new requests elsewhere;
        for --shutdown-delay those that come are served as before; the listening socket and idle
        connections are closed, and requests that come at once on connections that were taken
        already are served; later ones are answered with 503. What runs has --shutdown-timeout from
        the beginning of all this to finish, then it ends with an error that says why.

        A socket that a launcher holds open would only let clients wait where no other frontend
        takes from it: there it is kept, to answer with 503."""
        began = self._loop.time()
        self.state.stack.leaving = True
        self._alive.leave()
        await asyncio.sleep(self._shutdown_delay_s)
        if self._owns_listener or len(self.state.frontends()) > 1:
            self._server.close()
            self.connections.close_idle()
            await self._serve_accepted()
        self.state.stack.draining = True
        deadline = began + self._shutdown_timeout_s
        while (self.state.generating or len(self.state.owner)) and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        self._server.close()
        self.state.owner.fail_all(unavailable("The server is shutting down.", retry_after_s=5))
        self.state.flusher.flush()
        await asyncio.sleep(0)

    async def _serve_accepted(self) -> None:
        """Wait for the requests of connections that were accepted a moment ago, or whose heads are on
        their way."""
        until = self._loop.time() + ACCEPTED_S
        await asyncio.sleep(SETTLE_S)  # an accepted connection is known a turn of the loop later
        while self.connections.owe_heads() and self._loop.time() < until:
            await asyncio.sleep(SETTLE_S)

    def _close(self) -> None:
        if self._ticker:
            self._ticker.cancel()
        self._loop.remove_reader(self.inbox.fileno())
        self.membership.goodbye()
        self.outbox.close(linger_ms=200)
        self.inbox.close()
        self.state.body_readers.close()
        if self.state.counter_exchange:
            self.state.counter_exchange.publish()  # they stay when this process is gone
        self._alive.close()

    def _tick(self) -> None:
        now, state = self._loop.time(), self.state
        state.lag_s = max(0.0, now - self._next_tick)
        is_busy = state.generating or len(state.owner)
        self._next_tick = now + (TICK_S if is_busy else IDLE_TICK_S)
        self._ticker = self._loop.call_at(self._next_tick, self._tick)
        self.membership.busy = bool(len(state.owner))
        self.membership.progress += 1
        self.membership.tick(now)
        state.owner.tick()
        self._share_counters(now, bool(is_busy))
        if now >= self._next_check:
            self._next_check = now + CHECK_S
            self.connections.check(now)
            if self._keys_file and self._keys_file.changed():
                self._use_keys(self._keys_file)
        state.flusher.check()
        state.flusher.soon()

    def _use_keys(self, file: KeysFile) -> None:
        self.state.auth.add(key.tenant for key in file.keys)
        self.state.key_limits.replace(file.keys, self.state.clock())

    def _share_counters(self, now: float, is_busy: bool) -> None:
        """The other frontends read them, and those to come."""
        exchange = self.state.counter_exchange
        if not exchange or now < self._shared_at + SHARE_COUNTERS_S:
            return
        finished = sum(self.state.counters.reasons.values())
        # Limits of API keys count what the other frontends serve.
        is_idle = not (is_busy or self._keys_file) and finished == self._shared_finished
        if is_idle and now < self._shared_at + IDLE_SHARE_COUNTERS_S:
            return
        self._shared_at = now
        self._shared_finished = finished
        exchange.publish()
        if self._keys_file and len(self.state.frontends()) > 1:
            self.state.key_limits.share(self.state.all_counters().key_usage)

    def _on_inbox(self) -> None:
        """Handle the messages that wait. The inbox's descriptor is edge-triggered, so this goes on
        until the inbox is empty, a few messages at a time: between them other tasks run."""
        handled = 0
        for message in self.inbox.drain(_DRAIN_LIMIT):
            handled += 1
            try:
                self._handle(message)
            except Exception:
                # Whatever happens, the rest of the inbox is read: nobody would call again.
                log.exception("a %s could not be handled", type(message).__name__)
        self.state.flusher.soon()
        if handled:
            self._loop.call_soon(self._on_inbox)

    def _handle(self, message: ToFrontend) -> None:
        match message:
            case Deltas():
                try:
                    self.state.owner.on_deltas(message)
                except (ValueError, TypeError) as error:
                    self.state.counters.malformed += 1
                    log.warning("dropped a malformed message: %s", error)
            case Tokenized():
                self.state.owner.queries.on_answer(message)
            case Roster():
                self._on_roster(message)

    def _on_roster(self, roster: Roster) -> None:
        self.membership.on_roster(roster)
        self.state.stack.on_roster(roster, self.state.clock())
        self.state.owner.on_roster(roster)
        self.state.admission.on_roster(roster)
        inboxes = {
            peer.inbox for peer in roster.peers if peer.role is Role.TOKENIZER and peer.inbox
        }
        for inbox in self._tokenizer_inboxes - inboxes:
            self.outbox.forget(inbox)
        for inbox in inboxes - self._tokenizer_inboxes:
            self.outbox.reach(inbox)
        self._tokenizer_inboxes = inboxes
