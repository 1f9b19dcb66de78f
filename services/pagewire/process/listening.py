"""The listening socket of an HTTP endpoint: the one place that opens it, and the words for why it
cannot be opened."""

import os
import socket
from typing import Final

BACKLOG: Final = 4096
"""Connections that may wait to be accepted: as many as may arrive at once."""


def listening_socket(host: str, port: int) -> socket.socket:
    """A new TCP socket that listens, not blocking. `host`: a name or address, empty for all;
    `port` 0: any that is free. Raises OSError with a line that names both and says what to do."""
    try:
        addresses = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, socket_type, protocol, _, address = addresses[0]
        listener = socket.socket(family, socket_type, protocol)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}: {error.strerror or error}; choose another --host"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or 0)
        raise OSError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from None
    return listener
