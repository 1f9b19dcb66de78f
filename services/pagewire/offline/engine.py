"""The stack behind `LLM`: the services as child processes, and this program in the place of the
frontend.

The program owns its requests by the same rules as the HTTP frontend (`pagewire.requests.owner`), in
a synchronous loop: nothing moves between two calls of `pump`. `launch.background` keeps the
services running.
"""

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from msgspec import structs
from pagewire_protocol.messages import Deltas, Roster, ToFrontend, Tokenized
from pagewire_protocol.structs import Role

from ..launch import stack
from ..launch.background import BackgroundServices, find_files
from ..launch.progress import Display, parse
from ..process.node import Node
from ..requests.counters import Counters
from ..requests.errors import ErrorKind, RequestError
from ..requests.owner import RequestOwner
from ..requests.request import Job, OwnedRequest, Sink

PUMP_S = 0.2


class EngineError(RuntimeError):
    """The services could not be started or kept running; the message holds their last words."""


class Engine:
    """Services, inbox and owned requests of one `LLM`. Whoever uses it does so while it is `held`;
    `close` ends everything."""

    def __init__(
        self, config: stack.StackConfig, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self._began = time.monotonic()
        model = find_files(config, report)
        self.tokenizer_path = Path(model.tokenizer or model.model)
        self._pid = os.getpid()
        self._run_dir: Path = stack.new_run_dir()
        config = structs.replace(
            config, run=structs.replace(config.run, run_dir=str(self._run_dir))
        )
        node: Node[ToFrontend] = Node(self._run_dir, Role.FRONTEND, f"program-{self._pid}")
        self._inbox = node.inbox
        self._outbox = node.outbox
        self._membership = node.membership
        self.counters = Counters()
        self.owner = RequestOwner(
            self._inbox.address, self._outbox.send, time.monotonic, self.counters
        )
        self.lock = threading.RLock()
        self._has_fresh_roster = False
        self._closed = False
        # A program without a terminal may have no error stream at all.
        stream: TextIO | None = sys.stderr
        self._display = Display(stream or io.StringIO())
        self._shows_loading = config.run.log_level != "error"
        self._services = BackgroundServices(config, model, self._inbox.wake, self._display.log)

    @property
    def roster(self) -> Roster | None:
        """The latest one."""
        return self._membership.roster

    def wait_ready(self) -> Roster:
        """Block until a tokenizer and a worker are ready, and show how far they are. Raises
        EngineError when one cannot start."""
        self._membership.ready()
        while (roster := self._membership.roster) is None or not is_ready(roster):
            self.pump()
            waiting = waiting_for(self._membership.roster)
            if waiting and self._shows_loading:
                state = parse({"loading": waiting})
                self._display.show(state.stage, state.fraction)
        self._services.mark_ready()
        if self._shows_loading:
            self._display.end(f"ready in {time.monotonic() - self._began:.1f} s")
        return roster

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around whatever uses the services, for one thread at a time. Raises EngineError where
        they cannot be used."""
        # Before the lock too: in a forked copy it may be held by a thread that is not there.
        self.check_open()
        with self.lock:
            self.check_open()
            yield

    def check_open(self) -> None:
        """Raises EngineError after `close`, and in a forked copy of the program: the copy would
        read the answers of the original."""
        if os.getpid() != self._pid:
            raise EngineError(
                f"this LLM was made by process {self._pid}, of which this one ({os.getpid()}) is a forked copy: "
                "make an LLM of its own here, or start processes with multiprocessing's method 'spawn'"
            )
        if self._closed:
            raise EngineError("this LLM was shut down; make a new one")

    def refresh(self) -> None:
        """Renew this program's membership, lost when it did something else for a while; call before
        submitting."""
        self._has_fresh_roster = False
        self._membership.hello()
        while not self._has_fresh_roster:
            self.pump()

    def submit(self, job: Job, sink: Sink) -> OwnedRequest | None:
        """None when the stack cannot take it right now."""
        try:
            return self.owner.submit(job, sink)
        except RequestError as error:
            if error.kind is not ErrorKind.UNAVAILABLE:
                raise
            return None

    def pump(self, timeout_s: float = PUMP_S) -> None:
        """Wait for messages and apply them all. Raises EngineError when the services are gone for
        good."""
        self._inbox.wait(timeout_s)
        for message in self._inbox.drain():
            match message:
                case Deltas():
                    self._on_deltas(message)
                case Tokenized():
                    self.owner.queries.on_answer(message)
                case Roster():
                    self._membership.on_roster(message)
                    self.owner.on_roster(message)
                    self._has_fresh_roster = True
        self._membership.busy = len(self.owner) > 0
        self._membership.progress += 1
        self._membership.tick(time.monotonic())
        self.owner.tick()
        if not self._services.alive:
            raise EngineError(self._services.failure)

    def pids(self) -> dict[str, int]:
        """The services' process ids by name."""
        return self._services.pids()

    def close(self) -> None:
        """End the services and remove their run directory. Does nothing the second time, or in a
        forked copy of the program."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._services.stop()
        self._inbox.close()
        self._outbox.close()
        stack.remove_run_dir(self._run_dir)

    def _on_deltas(self, deltas: Deltas) -> None:
        try:
            self.owner.on_deltas(deltas)
        except (ValueError, TypeError):
            self.counters.malformed += 1


def is_ready(roster: Roster) -> bool:
    """A request can be served."""
    roles = {peer.role for peer in roster.peers if peer.ready}
    return Role.TOKENIZER in roles and Role.WORKER in roles


def waiting_for(roster: Roster | None) -> list[dict[str, Any]]:
    """The services that are not ready, as /health lists them."""
    peers = roster.peers if roster else ()
    return [
        {
            "role": peer.role.name.lower(),
            "stage": peer.stage or "starting",
            "fraction": peer.fraction,
        }
        for peer in peers
        if not peer.ready and peer.role is not Role.FRONTEND
    ]
