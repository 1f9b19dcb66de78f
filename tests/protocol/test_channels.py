"""Inbox, Outbox, the run directory and the scheduler's lock, over real sockets."""

import os
import pickle
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from pagewire_protocol import channels
from pagewire_protocol.channels import (
    AlreadyRunning,
    Inbox,
    Outbox,
    check_unused,
    inbox_address,
    living_inboxes,
    new_incarnation,
    prepare_run_dir,
    take_epoch,
)
from pagewire_protocol.messages import Goodbye, Role, Roster, Step

PATIENCE_S = 10.0


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short path: pytest's own temporary directories are too long for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="pw-") as name:
        yield prepare_run_dir(name)


@pytest.fixture
def inbox(run_dir: Path) -> Iterator["Inbox[Any]"]:
    box: Inbox[Any] = Inbox(run_dir, Role.SCHEDULER, 1)
    yield box
    box.close()


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    box = Outbox()
    yield box
    box.close()


@pytest.fixture
def raw() -> Iterator[Callable[[str], "zmq.Socket[bytes]"]]:
    """A PUSH socket that checks nothing: another program on the same path."""
    made: list[zmq.Socket[bytes]] = []

    def connect(address: str) -> "zmq.Socket[bytes]":
        socket = zmq.Context.instance().socket(zmq.PUSH)
        socket.connect(address)
        made.append(socket)
        return socket

    yield connect
    for connection in made:
        connection.close(linger=0)


def take(inbox: "Inbox[Any]", count: int) -> list[Any]:
    """The next `count` messages."""
    found: list[Any] = []
    while len(found) < count:
        assert inbox.wait(PATIENCE_S), f"{len(found)} of {count} messages came"
        found += inbox.drain()
    return found


def test_messages_arrive_in_order(inbox: "Inbox[Any]", outbox: Outbox) -> None:
    assert all(outbox.send(inbox.address, Goodbye(i)) for i in range(1, 301))
    assert take(inbox, 300) == [Goodbye(i) for i in range(1, 301)]
    assert inbox.undecodable == 0


def test_drain_stops_at_its_limit(inbox: "Inbox[Any]", outbox: Outbox) -> None:
    for i in range(1, 6):
        outbox.send(inbox.address, Goodbye(i))
    got: list[Any] = []
    while len(got) < 5:
        assert inbox.wait(PATIENCE_S)
        part = list(inbox.drain(limit=2))
        assert len(part) <= 2
        got += part
    assert got == [Goodbye(i) for i in range(1, 6)]


def test_a_closed_inbox_has_no_messages(inbox: "Inbox[Any]", outbox: Outbox) -> None:
    """A loop that was asked to look may come to it after its service closed; or a message is why."""
    for i in range(1, 4):
        outbox.send(inbox.address, Goodbye(i))
    assert inbox.wait(PATIENCE_S)
    messages = inbox.drain()
    assert next(messages) == Goodbye(1)
    inbox.close()
    assert list(messages) == [] and list(inbox.drain()) == []


def test_a_message_of_several_frames_is_refused(
    inbox: "Inbox[Any]", raw: Callable[[str], Any]
) -> None:
    frame = msgspec.msgpack.encode(Goodbye(1))
    sender = raw(inbox.address)
    sender.send_multipart([frame, frame, frame])
    sender.send(msgspec.msgpack.encode(Goodbye(2)))
    assert take(inbox, 1) == [Goodbye(2)]
    assert inbox.undecodable == 1


def test_a_pickle_is_dropped_and_never_run(
    inbox: "Inbox[Any]", raw: Callable[[str], Any], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    sender = raw(inbox.address)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        sender.send(pickle.dumps(Bomb(), protocol))
    sender.send(msgspec.msgpack.encode(Goodbye(3)))
    assert take(inbox, 1) == [Goodbye(3)]
    assert inbox.undecodable == pickle.HIGHEST_PROTOCOL + 1
    assert not canary.exists()


def test_another_services_message_is_dropped(inbox: "Inbox[Any]", outbox: Outbox) -> None:
    outbox.send(inbox.address, Step(1, 1))
    outbox.send(inbox.address, Goodbye(4))
    assert take(inbox, 1) == [Goodbye(4)]
    assert inbox.undecodable == 1


def test_an_oversize_frame_does_not_arrive_and_harms_no_one_else(
    run_dir: Path, raw: Callable[[str], Any], outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "MAX_FRAME", 4096)
    inbox: Inbox[Any] = Inbox(run_dir, Role.TOKENIZER, 7)
    try:
        raw(inbox.address).send(b"\xc4" + bytes(8192))
        outbox.send(inbox.address, a_roster())
        (got,) = take(inbox, 1)
        assert got.epoch == 5
        assert not inbox.undecodable
    finally:
        inbox.close()


def a_roster() -> Roster:
    return Roster(5, (), 0, 0, (), False, False)


def test_a_wake_after_the_end_touches_no_other_file(run_dir: Path) -> None:
    """The number of its descriptor may be somebody else's by then."""
    box: Inbox[Any] = Inbox(run_dir, Role.SCHEDULER, 1)
    box.close()
    taken = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    try:
        box.wake()
        for number in taken:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(number)
        box.close()
    finally:
        for number in taken:
            os.close(number)


def test_wait_times_out_and_wakes(inbox: "Inbox[Any]") -> None:
    assert inbox.wait(0.0) is False
    inbox.wake()
    inbox.wake()
    assert inbox.wait(0.0) is True
    assert inbox.wait(0.0) is False, "wakes do not add up"
    waker = threading.Thread(target=inbox.wake)
    waker.start()
    assert inbox.wait(PATIENCE_S) is True
    waker.join()
    assert list(inbox.drain()) == []


def test_the_descriptor_is_readable_when_a_message_came(
    inbox: "Inbox[Any]", outbox: Outbox
) -> None:
    list(inbox.drain())
    outbox.send(inbox.address, Goodbye(1))
    readable, _, _ = select.select([inbox.fileno()], [], [], PATIENCE_S)
    assert readable
    assert take(inbox, 1) == [Goodbye(1)]


def test_sending_to_nobody_never_blocks(
    run_dir: Path, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "QUEUE_LENGTH", 3)
    nobody = inbox_address(run_dir, Role.WORKER, 9)
    answers = [outbox.send(nobody, Goodbye(1)) for _ in range(20)]
    assert answers[0] is True and answers[-1] is False


def test_what_was_queued_for_a_forgotten_peer_is_gone(run_dir: Path, outbox: Outbox) -> None:
    address = inbox_address(run_dir, Role.WORKER, 10)
    outbox.send(address, Step(1, 1))
    outbox.forget(address)
    outbox.forget(address)
    time.sleep(0.2)  # the library closes connections in a thread of its own
    inbox: Inbox[Any] = Inbox(run_dir, Role.WORKER, 10)
    try:
        outbox.send(address, Step(1, 2))
        assert take(inbox, 1) == [Step(1, 2)]
    finally:
        inbox.close()


def test_messages_sent_before_the_receiver_exists_arrive(run_dir: Path, outbox: Outbox) -> None:
    outbox.send(inbox_address(run_dir, Role.WORKER, 11), Step(1, 1))
    inbox: Inbox[Any] = Inbox(run_dir, Role.WORKER, 11)
    try:
        assert take(inbox, 1) == [Step(1, 1)]
    finally:
        inbox.close()


def test_a_peer_may_be_reached_before_there_is_anything_to_say(
    run_dir: Path, outbox: Outbox
) -> None:
    address = inbox_address(run_dir, Role.WORKER, 13)
    outbox.reach(address)
    inbox: Inbox[Any] = Inbox(run_dir, Role.WORKER, 13)
    try:
        outbox.reach(address)
        outbox.send(address, Step(1, 1))
        assert take(inbox, 1) == [Step(1, 1)]
    finally:
        inbox.close()


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "inproc://x", "/tmp/x", "", "ipc://" + "x" * 200]
)
def test_only_ipc_addresses_are_connected_to(outbox: Outbox, address: str) -> None:
    """An address may have come with a message: it is a failure to send, and ends nobody."""
    outbox.reach(address)
    assert not outbox.send(address, Goodbye(1))
    assert not outbox._sockets


def test_socket_files_are_private_and_removed_on_close(run_dir: Path) -> None:
    inbox: Inbox[Any] = Inbox(run_dir, Role.FRONTEND, new_incarnation())
    path = Path(inbox.address.removeprefix("ipc://"))
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    inbox.close()
    assert not path.exists()


def test_binding_leaves_the_umask_alone(run_dir: Path) -> None:
    before = os.umask(0o022)
    try:
        Inbox(run_dir, Role.FRONTEND, 12).close()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_every_incarnation_has_its_own_address_but_the_scheduler(run_dir: Path) -> None:
    for role in (Role.FRONTEND, Role.TOKENIZER, Role.WORKER):
        assert inbox_address(run_dir, role, 1) != inbox_address(run_dir, role, 2)
    assert inbox_address(run_dir, Role.SCHEDULER, 1) == inbox_address(run_dir, Role.SCHEDULER, 2)
    drawn = {new_incarnation() for _ in range(1000)}
    assert len(drawn) == 1000 and all(1 <= value < 2**63 for value in drawn)


def test_the_run_directory_is_made_private() -> None:
    with tempfile.TemporaryDirectory(prefix="pw-") as name:
        made = prepare_run_dir(f"{name}/a/b")
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        made.chmod(0o755)
        assert stat.S_IMODE(prepare_run_dir(str(made)).stat().st_mode) == 0o700


def test_a_path_too_long_for_a_socket_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has \d+ characters.*at most 60.*--run-dir"):
        prepare_run_dir(str(tmp_path / ("x" * 60)))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory of another user")
def test_another_users_directory_is_refused() -> None:
    with tempfile.TemporaryDirectory(prefix="pw-") as name:
        os.chown(name, 12345, 12345)
        with pytest.raises(PermissionError, match="another user"):
            prepare_run_dir(name)


def test_two_schedulers_cannot_reign_at_once_and_the_epoch_grows(run_dir: Path) -> None:
    epoch, lock = take_epoch(run_dir)
    for attempt in (take_epoch, check_unused):
        with pytest.raises(AlreadyRunning, match="already running"):
            attempt(run_dir)
    os.close(lock)
    check_unused(run_dir)
    successor, lock = take_epoch(run_dir)
    os.close(lock)
    assert successor == epoch + 1


def test_the_lock_falls_with_its_process(run_dir: Path) -> None:
    """kill -9 of the scheduler must not keep its successor out."""
    program = (
        "import sys, time; from pathlib import Path; from pagewire_protocol.channels import take_epoch\n"
        "print(take_epoch(Path(sys.argv[1]))[0], flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout
        epoch = int(first.stdout.readline())
        with pytest.raises(AlreadyRunning):
            take_epoch(run_dir)
        first.kill()
    successor, lock = take_epoch(run_dir)
    os.close(lock)
    assert successor == epoch + 1


@pytest.mark.parametrize("content", [b"", b"7", b"7\n"])
def test_the_lock_file_may_be_empty_or_edited_by_hand(run_dir: Path, content: bytes) -> None:
    (run_dir / "scheduler.lock").write_bytes(content)
    epoch, lock = take_epoch(run_dir)
    os.close(lock)
    assert epoch == int(content.strip() or b"0") + 1


def test_inboxes_of_the_dead_are_told_from_those_of_the_living(run_dir: Path) -> None:
    living = Inbox(run_dir, Role.WORKER, new_incarnation())
    scheduler = Inbox(run_dir, Role.SCHEDULER, new_incarnation())
    dead = [run_dir / f"tokenizer-{age}.sock" for age in (0, 60)]
    for age, path in zip((0, 60), dead, strict=True):
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(path))
        then = time.time() - age
        os.utime(path, (then, then))
    try:
        assert living_inboxes(run_dir) == [living.address]
        assert [path.exists() for path in dead] == [True, False]
    finally:
        living.close()
        scheduler.close()


@pytest.mark.parametrize("ends_in_order", [True, False])
def test_what_ends_waits_for_no_peer_that_has_ended_before(
    run_dir: Path, ends_in_order: bool
) -> None:
    """Its last messages get their time only where their receiver may still be there."""
    script = """
import pathlib, sys, time
from pagewire_protocol.channels import Outbox
from pagewire_protocol.messages import Goodbye
box = Outbox()
box.send(sys.argv[1], Goodbye(1))
began = time.monotonic()
box.close(linger_ms=1500)
import zmq
zmq.Context.instance().term()
print(time.monotonic() - began)
"""
    address = inbox_address(run_dir, Role.SCHEDULER, channels.NO_INCARNATION)
    if not ends_in_order:  # a killed one leaves its file, and its successor may come
        Path(address.removeprefix("ipc://")).touch()
    words = [sys.executable, "-c", script, address]
    waited_s = float(subprocess.run(words, capture_output=True, check=True, timeout=60).stdout)
    assert (waited_s < 1.0) == ends_in_order
