"""A process's place in a stack: one object of sockets and membership."""

import shutil
import tempfile
from pathlib import Path

import pytest
from pagewire.process.errors import error_line
from pagewire.process.node import Node
from pagewire_protocol.channels import Inbox
from pagewire_protocol.messages import Goodbye, Heartbeat, Hello, Message, Role, WorkerFacts


@pytest.fixture
def run_dir():
    path = Path(tempfile.mkdtemp(prefix="pw-"))
    yield path
    shutil.rmtree(path)


def received(inbox: Inbox[Message], count: int) -> list[Message]:
    messages: list[Message] = []
    while len(messages) < count:
        assert inbox.wait(5), f"only {messages}"
        messages += inbox.drain()
    return messages


def test_a_node_introduces_itself_with_its_group(run_dir):
    scheduler: Inbox[Message] = Inbox(run_dir, Role.SCHEDULER, 0)
    node = Node(run_dir, Role.WORKER, "worker-0.1", group="worker-0", rank=1, group_size=2)
    facts = WorkerFacts(8, 16, 4, 64, 100, (), "cpu")
    node.membership.loading("reading weights", 0.5)
    node.membership.ready(worker=facts)
    node.membership.tick(1.0)
    node.membership.goodbye()
    loading, ready, beat, goodbye = received(scheduler, 4)
    assert isinstance(loading, Hello) and isinstance(ready, Hello)
    assert (loading.peer.stage, loading.peer.fraction, loading.peer.ready) == (
        "reading weights",
        0.5,
        False,
    )
    assert ready.worker == facts and ready.peer.ready
    for peer in (loading.peer, ready.peer):
        assert (peer.role, peer.name, peer.group, peer.rank, peer.group_size) == (
            Role.WORKER,
            "worker-0.1",
            "worker-0",
            1,
            2,
        )
        assert (peer.inbox, peer.incarnation) == (node.inbox.address, node.incarnation)
    assert isinstance(beat, Heartbeat) and beat.incarnation == node.incarnation
    assert goodbye == Goodbye(node.incarnation)
    node.close()
    assert not Path(node.inbox.address.removeprefix("ipc://")).exists()
    scheduler.close()


def test_a_node_without_a_name_gets_one_from_its_role_and_each_has_its_own_inbox(run_dir):
    first, second = Node(run_dir, Role.TOKENIZER), Node(run_dir, Role.TOKENIZER)
    assert first.membership._peer.name.startswith("tokenizer-")
    assert first.inbox.address != second.inbox.address
    assert first.incarnation != second.incarnation
    for node in (first, second):
        node.close()


def test_a_node_that_is_ready_says_that_no_scheduler_has_answered_and_one_that_loads_does_not(
    run_dir, caplog
):
    node = Node(run_dir, Role.WORKER, "worker-0")
    for now in range(30):
        node.membership.loading("packing weights", now / 30)
        node.membership.tick(float(now))
    assert not caplog.messages, "it reads no messages before it is ready"
    node.membership.ready(worker=WorkerFacts(8, 16, 4, 64, 100, (), "cpu"))
    for now in range(30, 60):
        node.membership.tick(float(now))
    (line,) = caplog.messages
    assert line.startswith("no scheduler has answered in ") and "--run-dir" in line
    node.close()


def test_a_missing_package_is_named_with_the_way_to_get_it():
    line = error_line(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert line.startswith("torch is not installed") and "pagewire[all]" in line
