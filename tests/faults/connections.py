"""Connections of the simulated network: each brings messages in their order, and of two from the same
sender neither knows of the other, as with ZeroMQ."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pagewire_protocol.messages import Message


@dataclass(eq=False, slots=True)
class Connection:
    """From one process to one address, until its sender drops it. `messages`: on their way, each with
    the time it was sent; `last_arrival`: when the last of them arrives."""

    sender: Any
    address: str
    messages: deque[tuple[float, Message]] = field(default_factory=deque)
    last_arrival: float = 0.0


@dataclass(slots=True)
class Inbox:
    """What has arrived at a process and was not read, in the order of its arrival."""

    _messages: deque[tuple[Connection | None, Message]] = field(default_factory=deque)

    def put(self, connection: Connection | None, message: Message) -> None:
        """connection: None for what comes by none that could be dropped."""
        self._messages.append((connection, message))

    def take(self) -> deque[Message]:
        """All of it."""
        messages = deque(message for _, message in self._messages)
        self._messages.clear()
        return messages

    def take_from(self, connection: Connection) -> list[Message]:
        """What this connection has brought; the rest stays."""
        taken = [message for origin, message in self._messages if origin is connection]
        self._messages = deque(each for each in self._messages if each[0] is not connection)
        return taken
