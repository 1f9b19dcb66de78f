"""What the ranks of a group share: a place each, and a ring of memory through which rank 0 hands bytes
to all others."""

import os
import random
import threading

import pytest
from pagewire.process import group
from pagewire.process.group import GroupMemory, Place, RankSilent, RingReader, RingWriter


@pytest.fixture
def memory():
    made = GroupMemory("worker-0", 3)
    yield made
    made.close()


def test_a_place_goes_through_the_environment_once(memory, monkeypatch):
    place = memory.place(2)
    monkeypatch.setenv(group.PLACE_VARIABLE, place.as_variable())
    assert Place.inherited() == place
    assert (place.group, place.rank, place.size) == ("worker-0", 2, 3)
    assert len(place.fds) == 1 + 2 * 2
    assert Place.inherited() is None and group.PLACE_VARIABLE not in os.environ


def test_every_rank_reads_everything_in_order_whatever_its_length(memory, monkeypatch):
    """Records of no bytes, of many times the ring's, and of all that lies between."""
    monkeypatch.setattr(group, "RING_BYTES", 256)
    make = random.Random(5)
    records = [make.randbytes(make.choice((0, 1, 7, 100, 255, 256, 257, 5000))) for _ in range(300)]
    taken: dict[int, list[bytes]] = {1: [], 2: []}

    def read(rank):
        reader = RingReader(memory.place(rank))
        while len(taken[rank]) < len(records):
            record = reader.read(10)
            assert record is not None
            taken[rank].append(record)

    threads = [threading.Thread(target=read, args=(rank,)) for rank in taken]
    for thread in threads:
        thread.start()
    writer = RingWriter(memory.place(0))
    for record in records:
        writer.write(record)
    for thread in threads:
        thread.join(20)
    assert taken[1] == records and taken[2] == records


def test_nothing_there_is_told_after_a_while(memory):
    assert RingReader(memory.place(1)).read(0.01) is None


def test_a_rank_that_reads_nothing_is_named(memory, monkeypatch):
    monkeypatch.setattr(group, "RING_BYTES", 256)
    writer, first = RingWriter(memory.place(0), patience_s=0.05), RingReader(memory.place(1))
    writer.write(b"a" * 200)
    assert first.read(1) == b"a" * 200
    with pytest.raises(RankSilent, match=r"rank 2 has taken no step for 0\.05 s: it hangs"):
        writer.write(b"b" * 100)
