"""Rows with grammars over pipeline stages (stage_threads.py), whichever runner they have."""

import threading
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace
from pagewire.process.group import GroupMemory, RingReader, RingWriter
from pagewire.worker.cpu import stages
from pagewire.worker.rank_link import Leader
from pagewire.worker.runners import AsyncRunner
from pagewire.worker.step import rank_masks
from pagewire.worker.step.rank_masks import LeadingMasks, MakeMasks
from pagewire_protocol.messages import Step, pack, unpack
from pagewire_protocol.sampling import Sampling
from stage_threads import FollowerTakingTurns, run_group
from worker.conftest import Driver
from worker.stand_in_matcher import Room, allowed, grammar

GREEDY = Sampling(0, 12, temperature=0.0)
STAGES = 3


def check_grammar_rows(
    path: Path,
    prompts: list[list[int]],
    late: float,
    vocab: int,
    steps: int,
    start: Callable[..., AsyncRunner] = stages.start,
) -> list[int]:
    """Three rows: with a grammar, without, and with one that leaves no token. The first keeps to its
    grammar, and has empty steps where masks come `late`, in seconds. Returns the second one's
    tokens."""
    grammars = (grammar("a"), None, grammar("impossible"))
    memory = GroupMemory("worker-0", STAGES)

    def masks(rank: int, turn: threading.Lock) -> MakeMasks:
        if rank:
            return rank_masks.maker(FollowerTakingTurns(RingReader(memory.place(rank)), turn))
        leader = Leader(RingWriter(memory.place(0)))
        kind = lambda *arguments, **options: LeadingMasks(leader, *arguments, **options)  # noqa: E731
        return lambda count, model, vocab, eos: Room(count, vocab, late, kind=kind).masks

    def drive(driver: Driver) -> tuple[dict[int, list[int]], int]:
        admit = tuple(
            replace(driver.admission(s, prompts[s], GREEDY, room=60), grammar=grammars[s])
            for s in range(3)
        )
        counts = [len(prompt) for prompt in prompts]
        empty = 0
        for _ in range(steps):
            rows = {"run_slots": pack("i", range(3)), "run_counts": pack("i", counts)}
            result = driver.runner.execute(Step(1, len(driver.results), admit=admit, **rows))
            driver.results.append(result)
            brought = unpack("i", result.counts) if result.counts else [1] * 3
            tokens = iter(unpack("i", result.tokens).tolist())
            for slot, flag, count in zip(
                unpack("i", result.slots), result.flags, brought, strict=True
            ):
                assert count or grammars[slot] is not None
                assert not flag or slot == 2
                driver.out[slot] += [next(tokens) for _ in range(count)]
                empty += not count
            admit, counts = (), [1] * 3
        return driver.out, empty

    (out, empty), *_ = run_group(path, STAGES, 1, drive, masks, start)
    memory.close()
    assert len(out[0]) > 8 and bool(empty) == bool(late)
    for position, token in enumerate(out[0]):
        assert token in allowed("a", out[0][:position], vocab)
    return out[1]
