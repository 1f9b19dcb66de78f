"""The scheduler's process: sockets and the clock around the state machine.

Knows nothing of requests; everything that is decided is decided in `state.py`.
"""

import gc
import logging
import os
import signal
import sys
import time
from collections import deque
from typing import Final

from pagewire_protocol.channels import AlreadyRunning, Inbox, Outbox, prepare_run_dir, take_epoch
from pagewire_protocol.messages import Message, Role, ToScheduler

from pagewire.config import ModelConfig, RunConfig, SchedulerConfig

from .state import Output, Scheduler, Tick, Unreachable

log = logging.getLogger("pagewire.scheduler")
WAIT_S: Final = 0.25


class Loop:
    def __init__(self, state: Scheduler, inbox: Inbox[ToScheduler], outbox: Outbox) -> None:
        self.state, self.inbox, self.outbox = state, inbox, outbox
        self.stopping = False
        state.at_once = self._send

    def stop(self, *_: object) -> None:
        self.stopping = True
        self.inbox.wake()

    def forever(self) -> None:
        self.deliver(self.state.handle(Tick(time.monotonic())))
        while not self.stopping:
            self.inbox.wait(self._pause_s())
            for message in self.inbox.drain():
                self.deliver(self.state.handle(message))
            self.deliver(self.state.handle(Tick(time.monotonic())))

    def _pause_s(self) -> float:
        """Until the next step is due, in whole milliseconds, which is what a wait is counted in.
        What became due since the last tick has not been tried yet."""
        due = self.state.engine.due(self.state.now)
        return min(WAIT_S, max(0.0, due - time.monotonic()) + 0.001)

    def deliver(self, outputs: list[Output]) -> None:
        """Send. A peer that cannot be reached is one more event, whose outputs are sent as well."""
        todo = deque(outputs)
        while todo:
            address, message = todo.popleft()
            if message is None:
                self.outbox.forget(address)
            elif not self._send(address, message):
                todo.extend(self.state.handle(Unreachable(address)))

    def _send(self, address: str, message: Message) -> bool:
        try:
            return self.outbox.send(address, message)
        except (
            Exception
        ) as error:  # an address that ZeroMQ refuses must not stop the scheduler for everyone else
            log.error("cannot send a %s to %s: %s", type(message).__name__, address, error)
            return False


def run(run: RunConfig, model: ModelConfig, config: SchedulerConfig) -> int:
    """Schedule until SIGTERM or SIGINT. Returns the exit code; 1 when the run directory belongs to
    someone else or is in use."""
    del model
    try:
        run_dir = prepare_run_dir(run.run_dir)
        epoch, lock = take_epoch(run_dir)
    except (AlreadyRunning, OSError, ValueError) as error:
        print(f"pagewire scheduler: {error}", file=sys.stderr)
        return 1
    inbox: Inbox[ToScheduler] = Inbox(run_dir, Role.SCHEDULER, 0)
    loop = Loop(Scheduler(epoch, config), inbox, Outbox())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, loop.stop)
    gc.collect()
    gc.freeze()
    log.info("epoch %d, listening on %s", epoch, inbox.address)
    try:
        loop.forever()
    finally:
        loop.outbox.close()
        inbox.close()
        os.close(lock)
    return 0
