"""CPU time of a streamed request in the HTTP frontend, in microseconds: what it costs beside its
tokens.

    PYTHONPATH=protocol:services python bench/request_path.py [--chat] [--new-connections]

The frontend service runs in this process. Its clients and a stack that answers each request with
two tokens run in two others. Counted is the time of the frontend's thread, the system's work for
its sockets included; the least and the median of all rounds are printed. To compare two trees, run
this same file with each tree's PYTHONPATH in turns.
"""

import argparse
import asyncio
import contextlib
import cProfile
import json
import multiprocessing
import pstats
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import uvloop
from pagewire.config import FrontendConfig, RunConfig
from pagewire.frontend.auth import Auth
from pagewire.frontend.service import Service
from pagewire.process.listening import listening_socket
from pagewire.process.node import MANY_OBJECTS, settle_gc
from pagewire_protocol.channels import Inbox, Outbox
from pagewire_protocol.columns import Epoch, Incarnation, pack
from pagewire_protocol.messages import Deltas, Generate, Hello, Roster
from pagewire_protocol.structs import End, Finish, Peer, Role, Started

MODEL = "model"
DONE = b"data: [DONE]\n\n"
END = DONE + b"\r\n0\r\n\r\n"
TEXT = "word " * 32
ROSTER_S = 0.5


# --- the stack: a scheduler that names its peers, and a tokenizer that answers ---


def answer(generates: list[Generate], first_execution: int) -> Iterator[Deltas]:
    """The output of requests of one frontend: a token, then one more and the end."""
    count = len(generates)
    handles = [generate.handle for generate in generates]
    for position in range(2):
        yield Deltas(
            pack("I", handles),
            pack("I", [1] * count),
            pack("Q", range(first_execution, first_execution + count)),
            pack("i", [position] * count),
            pack("i", [1] * count),
            pack("i", [100] * count),
            (" word",) * count,
            started=() if position else tuple(Started(handle, 1, 32, 0) for handle in handles),
            ended=tuple(End(handle, 1, Finish.LENGTH) for handle in handles) if position else (),
        )


def run_stack(run_dir: Path, pipe: Connection) -> None:
    """Until the pipe says so."""
    scheduler = Inbox(run_dir, Role.SCHEDULER, Incarnation(0))
    tokenizer = Inbox(run_dir, Role.TOKENIZER, Incarnation(1))
    outbox = Outbox()
    peers = [
        Peer(Role.TOKENIZER, "t", tokenizer.address, Incarnation(1), True),
        Peer(Role.WORKER, "w", "ipc:///nowhere", Incarnation(2), True),
    ]
    executions = 0
    next_roster = 0.0
    while not pipe.poll():
        tokenizer.wait(0.05)
        for hello in scheduler.drain():
            if isinstance(hello, Hello) and hello.peer not in peers:
                peers[2:] = [hello.peer]
                next_roster = 0.0
        if len(peers) > 2 and time.monotonic() > next_roster:
            next_roster = time.monotonic() + ROSTER_S
            outbox.send(
                peers[2].inbox, Roster(Epoch(1), tuple(peers), 4096, 1000, (2,), True, True)
            )
        generates = [message for message in tokenizer.drain() if isinstance(message, Generate)]
        if generates:
            for deltas in answer(generates, (1 << 43) + executions):
                outbox.send(generates[0].reply_to, deltas)
            executions += len(generates)
    for inbox in (scheduler, tokenizer):
        inbox.close()
    outbox.close()


# --- the clients ---


class Client(asyncio.Protocol):
    """Sends one request after the other, while any of `left[0]` are left."""

    def __init__(self, request: bytes, left: list[int], ended: asyncio.Future[None]) -> None:
        self._request = request
        self._left = left
        self._ended = ended
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        if self._left[0]:
            self._left[0] -= 1
            self._tail = b""
            self._transport.write(self._request)
        else:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._tail += data
        if self._tail.endswith(END):
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if DONE not in self._tail:
            self._ended.set_exception(OSError(f"an answer broke off: {self._tail!r}"))
        elif not self._ended.done():
            self._ended.set_result(None)


class ClosingClient(Client):
    """A connection for one request."""

    def data_received(self, data: bytes) -> None:
        self._tail += data


def request_bytes(chat: bool, close: bool) -> bytes:
    """What each client sends."""
    form = {"messages": [{"role": "user", "content": TEXT}]} if chat else {"prompt": TEXT}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(
        {"model": MODEL, "max_tokens": 2, "temperature": 0.0, "ignore_eos": True, **form, **options}
    ).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"{'Connection: close' if close else 'Connection: keep-alive'}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def play_round(port: int, request: bytes, requests: int, at_a_time: int, close: bool) -> None:
    """So many requests."""
    loop = asyncio.get_running_loop()
    left = [requests]

    async def lane() -> None:
        while left[0]:
            ended: asyncio.Future[None] = loop.create_future()
            if close:
                left[0] -= 1
                connect = partial(ClosingClient, request, [1], ended)
            else:
                connect = partial(Client, request, left, ended)
            await loop.create_connection(connect, "127.0.0.1", port)
            await ended

    await asyncio.gather(*(lane() for _ in range(at_a_time)))


def run_clients(options: argparse.Namespace, pipe: Connection) -> None:
    """A round for each port that comes; ends with 0."""
    request = request_bytes(options.chat, options.new_connections)
    while port := pipe.recv():
        uvloop.run(
            play_round(port, request, options.requests, options.at_a_time, options.new_connections)
        )
        pipe.send(True)


# --- the frontend ---


async def measure(run_dir: Path, options: argparse.Namespace, pipe: Connection) -> list[float]:
    """The seconds of this thread that a request took, for each round."""
    loop = asyncio.get_running_loop()
    profile = cProfile.Profile(time.thread_time)
    costs: list[float] = []
    with contextlib.closing(listening_socket("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = FrontendConfig(max_body_mb=1)
        service = Service(RunConfig(run_dir=str(run_dir)), (MODEL,), Auth(()), config)
        async with service.serving(listener):
            while not service.state.stack.ready(service.state.clock()):
                await asyncio.sleep(0.05)
            settle_gc(MANY_OBJECTS)
            for number in range(options.rounds + 1):
                if number == 1 and options.profile:
                    profile.enable()
                done = asyncio.Event()
                loop.add_reader(pipe.fileno(), done.set)
                began = time.thread_time()
                pipe.send(port)
                await done.wait()
                used = time.thread_time() - began
                loop.remove_reader(pipe.fileno())
                pipe.recv()
                if number:  # the first warms up
                    costs.append(used / options.requests)
            if options.profile:
                profile.disable()
                profile.dump_stats(options.profile)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--chat", action="store_true", help="chat completions")
    parser.add_argument("--new-connections", action="store_true", help="one for each request")
    parser.add_argument("--requests", type=int, default=400, help="of a round")
    parser.add_argument("--at-a-time", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", metavar="FILE", help="write a profile of cProfile's")
    options = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="pw", dir="/tmp") as name:
        ours, clients_pipe = fork.Pipe()
        stack_pipe, stacks_pipe = fork.Pipe()
        processes = [
            fork.Process(target=run_clients, args=(options, clients_pipe), daemon=True),
            fork.Process(target=run_stack, args=(Path(name), stacks_pipe), daemon=True),
        ]
        for process in processes:
            process.start()
        costs = sorted(uvloop.run(measure(Path(name), options, ours)))
        ours.send(0)
        stack_pipe.send(True)
        for process in processes:
            process.join(5)
    least, median = (1e6 * costs[at] for at in (0, len(costs) // 2))
    print(f"{least:.1f} us a request at least, median {median:.1f}")
    if options.profile:
        pstats.Stats(options.profile).sort_stats("tottime").print_stats(70)


if __name__ == "__main__":
    main()
