"""A rank on another host as its proxy and its actor have it: over a connection of this machine, without
Ray, between two directories."""

import mmap
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pagewire.launch import stack
from pagewire.launch.ray_ranks import handshake, relay, remote_child
from pagewire.launch.ray_ranks.handover import RankProcess
from pagewire.launch.ray_ranks.relay import Relay
from pagewire.launch.ray_ranks.remote_child import Assignment
from pagewire.process import liveness
from pagewire.process.group import GroupMemory, RingWriter
from pagewire.process.hosts import Hosts
from pagewire.process.liveness import Watched
from pagewire_protocol.channels import Inbox, Outbox
from pagewire_protocol.messages import Goodbye, Heartbeat, Hello, Role, Roster

PROGRAM = """
import os, signal, sys, time
from pagewire.process import liveness
from pagewire.process.group import Place, RingReader
from pagewire.process.hosts import Hosts
from pagewire.process.parent import die_with_parent
from pagewire.process.stream_node import Stream, StreamNode
die_with_parent()
liveness.own.settle(60)
liveness.own.inherit()
place = Place.inherited()
run_dir = next(word for word in sys.argv if word.startswith("--run-dir=")).partition("=")[2]
node = StreamNode(Stream.inherited(), run_dir, "w.2", place.group, place.rank, place.size)
print("rank", place.rank, "of", place.size, *Hosts.inherited().nodes, os.getcwd(), run_dir, flush=True)
node.membership.hello()
node.membership.ready()
ring = RingReader(place)
while (record := ring.read(0.01)) != b"last":
    node.membership.tick(time.monotonic())
    if record is not None:
        print(len(record), record[:8].decode(), flush=True)
    for message in node.inbox.drain():
        print(type(message).__name__, node.membership.on_roster(message), flush=True)
node.membership.goodbye()
node.close(500)
sys.exit(7)
"""
WAIT_S = 30.0


class RemoteRank:
    """Rank 2 of three in the place of an actor, and its proxy, each in a thread; what a supervisor
    and a scheduler have of it."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = stack.prepare_run_dir(str(directory / "run"))
        self.scheduler: Inbox[Any] = Inbox(self.run_dir, Role.SCHEDULER, 1)  # type: ignore[arg-type]
        self.to_rank = Outbox()
        self.memory = GroupMemory("w", 3)
        place = self.memory.place(2)
        alone = replace(place, filled_fds=place.filled_fds[1:], freed_fds=place.freed_fds[1:])
        self.ring = RingWriter(alone)  # rank 1 reads nothing here
        self.page_fd = liveness.new_page()
        read, self.theirs = os.pipe()
        self.output = os.fdopen(read, "r")
        listener = handshake.listen("127.0.0.1")
        port = listener.getsockname()[1]
        opened = handshake.AuthenticatedListener(listener, bytes(32))
        hosts = Hosts((0, 0, 1), "127.0.0.1", "127.0.0.1", 1)
        assignment = Assignment("127.0.0.1", port, bytes(32), None, hosts)
        self.actor = threading.Thread(target=remote_child.run_rank, args=(assignment,))
        self.actor.start()
        connection = opened.accept(WAIT_S)
        assert connection is not None
        opened.close()
        self.connection = connection
        self.hello = relay.receive_hello(connection)
        self.relay = Relay(connection, place, self.run_dir, self.page_fd, self.theirs)
        self.process = RankProcess(
            ("no-such-python", "-c", PROGRAM, f"--run-dir={self.run_dir}"),
            str(directory / "only-there"),
            {"PAGEWIRE_FAILURES": "2", "PATH": "/of/the/other/host"},
            place.as_variable(),
        )
        self.status: list[int | None] = []
        self.proxy = threading.Thread(target=self._run)
        self.proxy.start()

    def _run(self) -> None:
        self.status.append(self.relay.run(self.process))
        os.close(self.theirs)

    def hear(self, kind: type[Any]) -> Any:
        """The next message of this kind that the scheduler gets."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            self.scheduler.wait(0.1)
            for message in self.scheduler.drain(1):
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} came")

    def ended(self) -> int | None:
        self.actor.join(WAIT_S)
        self.proxy.join(WAIT_S)
        (status,) = self.status
        return status

    def close(self) -> None:
        self.connection.shut()
        self.ended()
        self.connection.close()
        self.scheduler.close()
        self.to_rank.close()
        self.memory.close()
        self.output.close()
        os.close(self.page_fd)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteRank]:
    monkeypatch.setattr(remote_child, "LAST_WORDS_S", 10.0)  # on a busy machine
    with tempfile.TemporaryDirectory(prefix="pw-") as directory:  # a short path, for sockets
        made = RemoteRank(Path(directory))
        yield made
        made.close()


def test_what_ranks_of_one_host_share_goes_both_ways(rank: RemoteRank) -> None:
    assert rank.hello is not None and rank.hello.host == socket.gethostname()
    hello = rank.hear(Hello)
    assert (hello.peer.group, hello.peer.rank, hello.peer.group_size) == ("w", 2, 3)
    assert hello.peer.inbox.startswith(f"ipc://{rank.run_dir}/worker-")
    assert hello.peer.failures == 2
    words = rank.output.readline().split()
    assert words[:6] == ["rank", "2", "of", "3", "0", "0"]
    assert words[-2] == os.path.expanduser("~") and words[-1] != str(rank.run_dir)
    rank.ring.write(b"a record")
    assert rank.output.readline() == "8 a record\n"
    rank.ring.write(b"b" * 3_000_000)
    assert rank.output.readline() == "3000000 bbbbbbbb\n"
    assert rank.to_rank.send(hello.peer.inbox, Roster(3, (), 0, 0, (), False, False))
    assert rank.output.readline() == "Roster True\n"
    assert rank.hear(Heartbeat).incarnation == hello.peer.incarnation
    page = mmap.mmap(rank.page_fd, liveness.PAGE_BYTES)
    watched = Watched(page, os.getpid(), time.monotonic())
    end = time.monotonic() + WAIT_S
    while not watched.was_ready:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert watched.incarnation == hello.peer.incarnation
    assert watched._pid == os.getpid(), "a process id of another host is none here"
    watched.close()
    assert Path(words[-1]).exists()
    rank.ring.write(b"last")
    assert rank.hear(Goodbye).incarnation == hello.peer.incarnation
    assert rank.ended() == 7
    assert rank.output.read() == ""
    assert not Path(words[-1]).exists()


def test_a_signal_reaches_the_rank_and_how_it_ended_comes_back(rank: RemoteRank) -> None:
    rank.hear(Hello)
    rank.relay.signal(signal.SIGTERM)
    assert rank.ended() == -signal.SIGTERM


def test_a_rank_ends_with_the_connection_and_so_does_its_proxy(rank: RemoteRank) -> None:
    rank.hear(Hello)
    rank.connection.shut()
    assert rank.ended() is None


def test_a_rank_that_a_signal_has_stopped_is_ended_where_it_runs(rank: RemoteRank) -> None:
    """The supervisor cannot look at a process of another host."""
    rank.hear(Hello)
    rank.output.readline()
    rank.relay.signal(signal.SIGSTOP)
    assert "made no progress for" in rank.output.readline()
    assert rank.ended() == -signal.SIGKILL
