"""A worker that is a group of processes: it is there when all its ranks are ready, and gone when one
of them is."""

import pytest
from msgspec.structs import replace
from pagewire_protocol.messages import Finish, Goodbye, Heartbeat, Hello
from scheduler.scheduler_sim import SimWorker, World


class Group:
    """The ranks of one life of a group of two; the numbers of later lives are higher."""

    def __init__(self, world, life=0):
        self.world = world
        self.leader = SimWorker(10 + 10 * life)
        peers = [
            replace(
                self.leader.peer,
                name=f"worker-0.{rank}",
                inbox=f"ipc:///w{10 + 10 * life + rank}",
                incarnation=self.leader.incarnation + rank,
                group="worker-0",
                rank=rank,
                group_size=2,
            )
            for rank in range(2)
        ]
        self.peers = peers
        self.leader.peer = peers[0]

    def hello(self, rank, ready=True):
        if rank == 0:
            self.world.workers[self.peers[0].inbox] = self.leader
        facts = self.leader.facts if rank == 0 and ready else None
        self.world.send(Hello(replace(self.peers[rank], ready=ready), facts))


@pytest.fixture
def world():
    made = World()
    made.add_tokenizer()
    made.tick()
    return made


def workers(world):
    return list(world.scheduler.engine.workers)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_group_is_one_worker_once_all_its_ranks_are_ready(world, order):
    group = Group(world)
    for rank in order:
        group.hello(rank, ready=False)
    group.hello(order[0])
    assert not workers(world)
    group.hello(order[1])
    assert workers(world) == [group.leader.incarnation]
    handle = world.submit([1, 2, 3])
    world.run()
    assert world.output(handle) == world.expected(handle)


@pytest.mark.parametrize("dead", [0, 1])
def test_the_end_of_one_rank_is_the_end_of_the_worker(world, dead):
    group = Group(world)
    group.hello(0)
    group.hello(1)
    handle = world.submit([1, 2, 3])
    world.step()
    world.send(Goodbye(group.peers[dead].incarnation))
    world.tick()
    assert not workers(world) and world.end(handle).finish is Finish.LOST
    assert {peer.inbox for peer in group.peers} <= set(world.forgotten)


def test_a_rank_alone_is_no_worker_and_the_next_life_is(world):
    group = Group(world)
    group.hello(0)
    group.hello(1)
    world.send(Goodbye(group.peers[1].incarnation))
    leader = group.peers[0]
    world.send(Heartbeat(leader.inbox, leader.incarnation, 1, False))
    world.tick()
    group.hello(0)
    assert not workers(world), "rank 0 lives, but its group is not complete"
    later = Group(world, life=1)
    later.hello(0)
    assert not workers(world), "rank 1 of the former life does not count"
    later.hello(1)
    assert workers(world) == [later.leader.incarnation]


def test_ranks_that_were_only_silent_are_a_worker_again(world):
    group = Group(world)
    group.hello(0)
    group.hello(1)
    world.send(Goodbye(group.peers[1].incarnation))
    assert not workers(world)
    group.hello(1)
    group.hello(0)
    assert workers(world) == [group.leader.incarnation]
