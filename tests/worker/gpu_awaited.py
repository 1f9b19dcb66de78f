"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_awaited.py

Masks that the device takes out of the host's memory (pagewire_kernels/awaited_masks.py), written by
another process meanwhile: each one that is taken is whole and the one that its tag names, also while
its place goes from stream to stream; patient rows get theirs while the device waits, others are
late; slots of late rows are put back, and the tokens of the others are told in that memory. Then
what it takes for 256 rows, and how soon a mask is taken once it is written. One line tells the
verdict; the exit status is 0 when all is well.
"""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from pagewire.grammar.shared import SharedMasks, tag_of

PLACES, SLOTS, PROMPT_LEN = 256, 300, 5
VOCABULARIES = (49_152, 151_936, 32_003)
FLIPS_S = 4.0
REPEATS = 50


class Writer:
    """This process's end of another one that runs `write`."""

    def __init__(self, words: int, *task: str) -> None:
        self.shared = SharedMasks(PLACES, words, 1, 0)
        fileno = self.shared.fileno
        command = [sys.executable, __file__, str(fileno), str(words), *task]
        self._process = subprocess.Popen(
            command, pass_fds=(fileno,), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def go(self) -> None:
        """It begins."""
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), b"x\n")

    def close(self) -> None:
        """It ends."""
        self._process.kill()
        self._process.wait()


def write(fileno: int, words: int, task: str) -> None:
    """What the other process does. `flip`: gives place after place to the next stream and writes its
    mask, all of whose words are its key, over and over; a number: once it is told, writes all masks,
    so many microseconds after each other."""
    shared = SharedMasks(PLACES, words, 1, 0, fileno)
    print("ready", flush=True)
    sys.stdin.readline()
    key = 1
    if task == "flip":
        while True:
            for place in range(PLACES):
                shared.tags[place] = tag_of(key, -1)
                shared.masks[place] = key
                shared.tags[place] = tag_of(key, place)
            key = key % 1000 + 1
    for place in range(PLACES):
        shared.masks[place] = place + 1
        shared.tags[place] = tag_of(1, place)
        end = time.perf_counter() + float(task) / 1e6
        while time.perf_counter() < end:
            pass
    time.sleep(60)


class Step:
    """Rows of a step on the GPU, row i of slot i, which wants output position i of its stream."""

    def __init__(self, shared: SharedMasks, words: int) -> None:
        import torch
        from pagewire.worker.gpu.awaited_sampling import is_readable
        from pagewire_kernels.awaited_masks import AwaitedRows, TakenMasks
        from pagewire_kernels.slot_state import SlotState

        if not is_readable(shared):
            raise SystemExit("gpu_awaited: FAILED, the memory cannot be given to the device")
        self.words = words
        self.shared = shared
        self.state = SlotState.empty(SLOTS, 4, "cuda")
        self.taken = TakenMasks.empty(PLACES, words, self.state)
        size = AwaitedRows.num_bytes(PLACES)
        self.host = torch.zeros(size, dtype=torch.uint8).pin_memory()
        self.here = AwaitedRows.views(self.host, PLACES)
        places = np.arange(PLACES)
        self.here.rows[:] = self.here.slots[:] = torch.arange(PLACES)
        self.here.prompt_lens.fill_(PROMPT_LEN)
        self.here.tag_at[:] = torch.from_numpy(shared.tag_addresses(places))
        self.here.mask_at[:] = torch.from_numpy(shared.mask_addresses(places))
        self.memory = torch.zeros_like(self.host, device="cuda")
        self.rows = AwaitedRows.views(self.memory, PLACES)
        self.sampled_tokens = torch.zeros(PLACES, dtype=torch.int32, device="cuda")
        self.reset()

    def close(self) -> None:
        """The device forgets the memory, before others come to lie there."""
        import torch

        cudart: Any = torch.cuda.cudart()
        cudart.cudaHostUnregister(self.shared.address)

    def reset(self) -> None:
        """The slots as after a step has been computed."""
        import torch

        self.state.num_computed[:PLACES] = PROMPT_LEN + torch.arange(PLACES, device="cuda").int()
        self.state.last_token[:] = 100
        self.sampled_tokens.fill_(9)
        self.taken.words.fill_(-7)
        self.shared.told_tags[:] = 0
        self.shared.told_tokens[:] = -7

    def want(self, keys: np.ndarray) -> None:
        """The masks of these streams [PLACES]."""
        import torch

        tags = tag_of(keys, np.full(PLACES, -1)).view(np.int64)
        self.here.tag_keys[:] = torch.from_numpy(tags)
        self.memory.copy_(self.host, non_blocking=True)

    def take(self, count: int, patient: bool) -> None:
        from pagewire_kernels import awaited_masks

        awaited_masks.take(self.rows, count, patient, self.state, self.taken)

    def faults(self, keys: np.ndarray) -> tuple[int, int]:
        """(rows that have the mask, rows that have something else and are not late)."""
        late = self.taken.late.cpu().numpy() != 0
        words = self.taken.words[:, : self.words].cpu().numpy()
        wrong = (words != keys[:, None]).any(1) & ~late
        return int((~late).sum()), int(wrong.sum())


def flips(words: int) -> str:
    """While another process writes all the time."""
    writer = Writer(words, "flip")
    step = Step(writer.shared, words)
    writer.go()
    random = np.random.default_rng(0)
    taken = wrong = rounds = 0
    end = time.monotonic() + FLIPS_S
    while time.monotonic() < end:
        now = writer.shared.tags >> np.uint64(32)  # likely still to be there, or just going
        keys = np.where(random.random(PLACES) < 0.9, now, now % np.uint64(1000) + np.uint64(1))
        step.reset()
        step.want(keys)
        step.take(PLACES, patient=False)
        found, bad = step.faults(keys.astype(np.int64))
        taken, wrong, rounds = taken + found, wrong + bad, rounds + 1
    writer.close()
    step.close()
    print(
        f"{words} words: {taken} masks of {rounds * PLACES} taken while they changed, {wrong} wrong"
    )
    return "" if taken and not wrong else "masks that change"


def waits(words: int, patient: bool) -> str:
    """Masks that come one after the other once the device waits."""
    import torch
    from pagewire_kernels import awaited_masks
    from pagewire_kernels.masked_sampling import LATE, sample_masked

    writer = Writer(words, "4")
    step = Step(writer.shared, words)
    keys = np.ones(PLACES, np.uint64)
    for warm in (True, False):  # compiled before it counts
        step.reset()
        step.want(keys)
        awaited_masks.begin(step.state, step.taken)
        torch.cuda._sleep(2_000_000)  # pyright: ignore[reportPrivateUsage]
        if not warm:
            writer.go()
            if not patient:
                time.sleep(0.002)
        step.state.last_token.fill_(9)
        step.take(PLACES, patient)
        held = step.taken.sampled(step.rows, PLACES, False)
        late_rows = step.taken.late_rows(step.rows, PLACES, step.state, step.shared.told_offsets)
        logits = torch.zeros(PLACES, 32 * words, device="cuda")
        sample_masked(logits, held, step.state.last_token, step.sampled_tokens, late_rows)
        torch.cuda.synchronize()
    late = step.taken.late.cpu().numpy() != 0
    own = np.arange(1, PLACES + 1)
    _, wrong = step.faults(own)
    tokens = step.sampled_tokens.cpu().numpy()
    last = step.state.last_token[:PLACES].cpu().numpy()
    computed = step.state.num_computed[:PLACES].cpu().numpy() - PROMPT_LEN - np.arange(PLACES)
    lowest = own & -own  # of each mask, all of whose words are its place's number
    first = np.log2(lowest).astype(np.int64)
    settled = bool(
        (tokens == np.where(late, LATE, first)).all()
        and (last == np.where(late, 100, first)).all()
        and (computed == np.where(late, -1, 0)).all()
    )
    places = np.arange(PLACES)
    told = bool(
        (step.shared.told_tags == np.where(late, 0, tag_of(keys, places))).all()
        and (step.shared.told_tokens == np.where(late, -7, first)).all()
    )
    writer.close()
    step.close()
    print(
        f"{words} words, {patient=}: {int(late.sum())} of {PLACES} late, {wrong} wrong, {settled=}, {told=}"
    )
    return "" if settled and told and not wrong else "waiting rows"


def times(words: int) -> None:
    """What it takes where all masks are there: to take them, and with the sampling behind it."""
    import torch
    from pagewire_kernels.masked_sampling import sample_masked

    shared = SharedMasks(PLACES, words, 1, 0)
    step = Step(shared, words)
    shared.tags[:] = tag_of(np.ones(PLACES), np.arange(PLACES))
    shared.masks[:] = 0xFFFFFFFF
    step.want(np.ones(PLACES, np.uint64))
    logits = torch.randn(PLACES, 32 * words, device="cuda").bfloat16()

    def both(count: int) -> None:
        step.take(count, False)
        held = step.taken.sampled(step.rows, count, False)
        late = step.taken.late_rows(step.rows, count, step.state, shared.told_offsets)
        sample_masked(logits, held, step.state.last_token, step.sampled_tokens, late)

    for count in (1, 51, 256):
        alone = microseconds(functools.partial(step.take, count, False))
        sampled = microseconds(functools.partial(both, count))
        print(
            f"{words} words, {count} rows: {alone:.0f} us to take masks, {sampled:.0f} with tokens"
        )
    step.close()


def microseconds(run: Callable[[], object]) -> float:
    """On the GPU; launches wait for none."""
    import torch

    run()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # pyright: ignore[reportPrivateUsage]
    began.record()
    for _ in range(REPEATS):
        run()
    ended.record()
    ended.synchronize()
    return 1000 * began.elapsed_time(ended) / REPEATS


def main() -> int:
    """0 when all is well, 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("gpu_awaited: NOT RUN, torch sees no GPU")
        return 2
    faults: list[str] = []
    for vocabulary in VOCABULARIES:
        words = -(-vocabulary // 32)
        faults += filter(None, [flips(words), waits(words, True), waits(words, False)])
        times(words)
    print(f"gpu_awaited: {'FAILED: ' + ', '.join(faults) if faults else 'OK'}")
    return 1 if faults else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    sys.exit(main())
