"""What a rank's actor does: starts the rank as its child, and ends it with the proxy. Only the
standard library is imported here."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace

from ...process.group import PLACE_VARIABLE, Place
from ...process.hosts import HOSTS_VARIABLE, Hosts
from ...process.liveness import PAGE_VARIABLE
from ...process.parent import PARENT_VARIABLE
from . import handover
from .handover import RankDescriptors, RankProcess
from .handshake import CONNECT_S, RETRY_S, NoProxy


def run_rank(
    path: str,
    devices: str | None,
    hosts: Hosts | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Start the rank whose proxy listens at `path`; returns when it has ended. It ends at the
    latest when this thread does, or the proxy. devices: for CUDA_VISIBLE_DEVICES; None: as the
    proxy has it. hosts, and of rank 0 the socket that listens: of a group that spans several hosts.
    Raises NoProxy and, for a program that cannot be started, OSError."""
    variables: dict[str, str] = {}
    fds: tuple[int, ...] = ()
    if hosts is not None and listener is not None:
        hosts = replace(hosts, listen_fd=listener.fileno())
        fds = (listener.fileno(),)
    if hosts is not None:
        variables[HOSTS_VARIABLE] = hosts.as_variable()
    with _connect(path) as proxy:
        process, descriptors = handover.receive(proxy)
        child = start(process, descriptors, devices, variables, fds)
        if listener is not None:
            listener.close()
        try:
            _watch(child, proxy)
        finally:
            signal_group(child, signal.SIGKILL)
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


def start(
    process: RankProcess,
    descriptors: RankDescriptors,
    devices: str | None,
    variables: Mapping[str, str],
    fds: tuple[int, ...],
) -> "subprocess.Popen[bytes]":
    """The process of a rank, as a child of this one, with `variables` and `fds` beside those of
    `process` and `descriptors`; the latter are closed here."""
    place = Place.read(process.place).with_fds(descriptors.place)
    variables = {
        **process.variables,
        **variables,
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
            pass_fds=(descriptors.page, *descriptors.place, *fds),
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
                signal_group(child, number)
    except ConnectionError:
        return
    finally:
        os.close(end)


def signal_group(child: "subprocess.Popen[bytes]", number: int) -> None:
    """To the rank and its children, if it has not ended."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
