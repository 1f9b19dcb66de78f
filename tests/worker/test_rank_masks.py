"""Grammars of a model over several ranks: every rank samples the rows that rank 0 says, with its
masks, however late these are."""

import pytest
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.process.group import GroupMemory, RankSilent, RingReader, RingWriter
from pagewire.worker import rank_link
from pagewire.worker.fake import FakeRunner
from pagewire.worker.rank_link import Follower, Leader, RecordKind
from pagewire.worker.step import rank_masks
from pagewire.worker.step.forced_runs import MAX_RUN
from pagewire.worker.step.rank_masks import LeadingMasks
from worker.stand_in_matcher import Room
from worker.test_grammar_masks import SLOTS, VOCAB, Bench, Request


class Ranks(Bench):
    """A group of three fake workers, whose results are compared after each step."""

    def __init__(self, seed: int, late: float) -> None:
        super().__init__(seed, late)
        self.memory = GroupMemory("worker-0", 3)
        leader = Leader(RingWriter(self.memory.place(0)))
        self.room = Room(SLOTS, VOCAB, late, seed, lambda *a, **k: LeadingMasks(leader, *a, **k))
        self.runner._masks = self.room.masks
        self.runner._max_run = self.room.masks.allow_runs(MAX_RUN)
        followers = [Follower(RingReader(self.memory.place(rank))) for rank in (1, 2)]
        config = WorkerConfig(device="fake", fake_vocab_size=VOCAB)
        limits = SchedulerConfig(max_num_seqs=SLOTS)
        self.others = [
            FakeRunner(ModelConfig(), limits, config, make_masks=rank_masks.maker(follower))
            for follower in followers
        ]
        first = self.runner.execute
        first_clear = self.runner.clear

        def execute(step):
            result = first(step)
            for other in self.others:
                assert other.execute(step) == result
            return result

        def clear():
            first_clear()
            for other in self.others:
                other.clear()

        self.runner.execute = execute  # type: ignore[method-assign]
        self.runner.clear = clear  # type: ignore[method-assign]


@pytest.mark.parametrize("late", [0.0, 0.9])
@pytest.mark.parametrize("deaths", [0.0, 0.1])
def test_all_ranks_sample_the_same_rows_with_the_same_masks(late: float, deaths: float) -> None:
    constrained = 0
    for seed in range(2):
        ranks = Ranks(seed, late)
        for _ in range(60):
            ranks.random_step(deaths)
        requests = [*ranks.over, *ranks.resumed, *ranks.slots.values()]
        constrained += sum(len(r.output) for r in requests if r.source is not None)
        ranks.memory.close()
    assert constrained > 10


def test_a_grammar_that_cannot_be_held_fails_on_all_ranks() -> None:
    ranks = Ranks(0, 0.0)
    ranks.step(admit={0: Request("impossible", [1]), 1: Request("a", [2])})
    ranks.step()
    assert not ranks.slots[0].output and ranks.slots[1].output
    ranks.memory.close()


def test_a_rank_does_not_wait_for_ever_in_a_step(monkeypatch) -> None:
    monkeypatch.setattr(rank_link, "MASKS_S", 0.05)
    memory = GroupMemory("worker-0", 2)
    writer, follower = (
        RingWriter(memory.place(0)),
        Follower(RingReader(memory.place(1))),
    )
    with pytest.raises(RankSilent, match=r"rank 0 has said nothing for 0\.05 s in a step"):
        follower.masks()
    Leader(writer).step(b"x")
    with pytest.raises(ValueError, match="rank 0 sent a STEP in the middle of a step"):
        follower.masks()
    Leader(writer).clear()
    record = follower.read(1)
    assert record is not None and record.kind is RecordKind.CLEAR
    memory.close()
