"""What a rank's actor does: starts the rank as its child, and ends it with the proxy. Only the
standard library is imported here."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from typing import Final

from ...process.group import PLACE_VARIABLE, Place
from ...process.liveness import PAGE_VARIABLE
from ...process.parent import PARENT_VARIABLE
from . import handover
from .handover import RankDescriptors, RankProcess

CONNECT_S: Final = 30.0
"""How long an actor waits for the proxy of its rank, which was started at the same time as that of
rank 0."""
RETRY_S: Final = 0.1


class NoProxy(ConnectionError):
    """The proxy of the rank cannot be reached from the actor's process; the message says why."""


def run_rank(path: str, devices: str | None) -> None:
    """Start the rank whose proxy listens at `path`; returns when it has ended. It ends at the
    latest when this thread does, or the proxy. devices: for CUDA_VISIBLE_DEVICES; None: as the
    proxy has it. Raises NoProxy and, for a program that cannot be started, OSError."""
    with _connect(path) as proxy:
        process, descriptors = handover.receive(proxy)
        child = _start(process, descriptors, devices)
        try:
            _watch(child, proxy)
        finally:
            _signal(child, signal.SIGKILL)
            status = child.wait()
        with contextlib.suppress(OSError):
            handover.send_status(proxy, status)


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                connection.close()
                raise NoProxy(
                    f"the actor (user {os.getuid()}) cannot reach {path} ({error.strerror}): Ray's "
                    "node must have been started by the same user, and see the same directories"
                ) from None
        time.sleep(RETRY_S)


def _start(
    process: RankProcess, descriptors: RankDescriptors, devices: str | None
) -> "subprocess.Popen[bytes]":
    place = Place.read(process.place).with_fds(descriptors.place)
    variables = {
        **process.variables,
        PARENT_VARIABLE: str(os.getpid()),
        PAGE_VARIABLE: str(descriptors.page),
        PLACE_VARIABLE: place.as_variable(),
    }
    if devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = devices
    try:
        return subprocess.Popen(
            process.command,
            stdin=subprocess.DEVNULL,
            stdout=descriptors.output,
            stderr=subprocess.STDOUT,
            cwd=process.directory,
            env=variables,
            pass_fds=(descriptors.page, *descriptors.place),
            process_group=0,
        )
    finally:
        handover.close_all(descriptors)


def _watch(child: "subprocess.Popen[bytes]", proxy: socket.socket) -> None:
    """Until the child has ended, or the proxy is gone: pass signals on."""
    end = os.pidfd_open(child.pid)
    try:
        while True:
            readable, _, _ = select.select([end, proxy], [], [])
            if end in readable:
                return
            numbers = proxy.recv(16)
            if not numbers:
                return
            for number in numbers:
                _signal(child, number)
    except ConnectionError:
        return
    finally:
        os.close(end)


def _signal(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
