"""The process that reads bodies, one after the other, from the socket that it inherits. It ends with
its parent, or when the socket does."""

import gc
import os
import resource
import socket
import sys

import msgspec

from pagewire.process.parent import die_with_parent

from ..requests.errors import RequestError
from .body_readers import (
    ANSWER,
    MEMORY,
    REQUEST,
    BodyError,
    BodyHeader,
    encode_header,
)
from .errors import ApiError, as_api_error
from .reading import read

NICE = 5
"""Those that serve everybody go before."""
_decode_header = msgspec.msgpack.Decoder(BodyHeader).decode


def main() -> None:
    """`argv`: the descriptor of the socket."""
    die_with_parent()
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    gc.disable()  # a body has no cycles, and many objects
    with socket.socket(fileno=int(sys.argv[1])) as client:
        while (head := _receive(client, REQUEST.size)) is not None:
            header_bytes, body_bytes = REQUEST.unpack(head)
            header = _receive(client, header_bytes)
            body = _receive(client, body_bytes)
            if header is None or body is None:
                return
            is_plan, answer = _answer(_decode_header(header), body)
            client.sendall(ANSWER.pack(is_plan, len(answer)))
            client.sendall(answer)


def _answer(header: BodyHeader, body: bytes) -> tuple[bool, bytes]:
    try:
        return True, encode_header(read(header.body_type, body, header.served))
    except (ApiError, RequestError) as error:
        failure = as_api_error(error)
    except MemoryError:
        failure = ApiError(413, "Reading the request body takes too much memory.")
    return False, encode_header(
        BodyError(failure.status, failure.message, failure.param, failure.type)
    )


def _receive(client: socket.socket, size: int) -> bytes | None:
    """`size` bytes; None where the socket ends."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        received = client.recv_into(view)
        if not received:
            return None
        view = view[received:]
    view.release()
    return bytes(data)


if __name__ == "__main__":
    main()
