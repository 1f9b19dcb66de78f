"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_awaited.py

Masks that the device takes out of the host's memory (pagewire_kernels/awaited_masks.py), written by
another process meanwhile: each one that is copied, or sampled under, is whole and the one that its
tag names, also while its place goes from stream to stream; patient rows get theirs while the device
waits, others are late; slots of late rows are put back, and the tokens of the others are told in
that memory. Tokens are those of sampling masked logits. Then what it takes for up to 256 rows. One
line tells the verdict; the exit status is 0 when all is well.
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
FLIPS_S = 3.0
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

    def take(self, count: int, patient: bool = False) -> None:
        """Copy masks."""
        from pagewire_kernels import awaited_masks

        awaited_masks.look(self.rows, count, patient, self.state, self.taken)
        awaited_masks.take(self.rows, count, self.state, self.taken)

    def sample(self, logits: Any, count: int, copied: bool, patient: bool = False) -> None:
        """Logits [PLACES, V]; copied: masks are first."""
        from pagewire_kernels import awaited_masks
        from pagewire_kernels.awaited_sampling import sample_awaited
        from pagewire_kernels.masked_sampling import sample_masked

        state, tokens, offsets = self.state, self.sampled_tokens, self.shared.told_offsets
        if not copied:
            awaited_masks.look(self.rows, count, patient, state, self.taken)
            sample_awaited(logits, self.rows, count, state, self.taken, tokens, offsets)
            return
        self.take(count, patient)
        held = self.taken.sampled(self.rows, count)
        held.sampling.filtered = False
        late = self.taken.late_rows(self.rows, count, self.state, offsets)
        sample_masked(logits, held, self.state.last_token, self.sampled_tokens, late)

    def faults(self, keys: np.ndarray) -> tuple[int, int]:
        """Of copied masks: (rows that have the mask, rows that have something else and are not
        late)."""
        late = self.taken.late.cpu().numpy() != 0
        words = self.taken.words[:, : self.words].cpu().numpy()
        wrong = (words != keys[:, None]).any(1) & ~late
        return int((~late).sum()), int(wrong.sum())

    def wrong_tokens(self, keys: np.ndarray, logits: np.ndarray) -> tuple[int, int]:
        """Of greedy rows that have sampled all the same logits [V]: (rows with a token, rows whose
        token is not the best one that a mask of words that are all their key allows)."""
        from pagewire_kernels.masked_sampling import LATE

        at = [bit + 32 * int(logits[bit::32].argmax()) for bit in range(32)]
        """By bit of a word: the best token."""
        bits = (keys[:, None] >> np.arange(32)) & 1
        wanted = np.array(at)[np.where(bits, logits[at], -np.inf).argmax(1)]
        tokens = self.sampled_tokens.cpu().numpy()
        on_time = tokens != LATE
        return int(on_time.sum()), int(((tokens != wanted) & on_time).sum())


def flips(words: int) -> str:
    """While another process writes all the time."""
    import torch

    writer = Writer(words, "flip")
    step = Step(writer.shared, words)
    writer.go()
    random = np.random.default_rng(0)
    taken, wrong, rounds = np.zeros(2, int), np.zeros(2, int), 0
    end = time.monotonic() + FLIPS_S
    while time.monotonic() < end:
        logits = torch.randn(32 * words, device="cuda")
        for way in range(2):
            now = writer.shared.tags >> np.uint64(32)  # likely still to be there, or just going
            keys = np.where(random.random(PLACES) < 0.9, now, now % np.uint64(1000) + np.uint64(1))
            step.reset()
            step.want(keys)
            if way:
                step.sample(logits.expand(PLACES, -1), PLACES, copied=False)
                found, bad = step.wrong_tokens(keys.astype(np.int64), logits.cpu().numpy())
            else:
                step.take(PLACES)
                found, bad = step.faults(keys.astype(np.int64))
            taken[way] += found
            wrong[way] += bad
        rounds += 1
    writer.close()
    step.close()
    print(
        f"{words} words: of {rounds * PLACES} masks that changed, {taken[0]} copied and {taken[1]} "
        f"sampled under; {wrong[0]} and {wrong[1]} wrong"
    )
    return "" if taken.all() and not wrong.any() else "masks that change"


def waits(words: int, patient: bool, copied: bool) -> str:
    """Masks that come one after the other once the device waits."""
    import torch
    from pagewire_kernels import awaited_masks
    from pagewire_kernels.masked_sampling import LATE

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
        step.sample(torch.zeros(PLACES, 32 * words, device="cuda"), PLACES, copied, patient)
        torch.cuda.synchronize()
    own = np.arange(1, PLACES + 1)
    tokens = step.sampled_tokens.cpu().numpy()
    late = tokens == LATE
    wrong = step.faults(own)[1] if copied else 0
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
        f"{words} words, {patient=}, {copied=}: {int(late.sum())} of {PLACES} late, {wrong} wrong, {settled=}, {told=}"
    )
    return "" if settled and told and not wrong else "waiting rows"


def agrees(words: int) -> str:
    """Tokens, where all masks are there, are those of sampling masked logits."""
    import torch
    from pagewire_kernels.sampling import sample
    from pagewire_kernels.sampling_map import SamplingRows
    from pagewire_kernels.token_masks import apply_token_masks

    shared = SharedMasks(PLACES, words, 1, 0)
    step = Step(shared, words)
    shared.tags[:] = tag_of(np.ones(PLACES), np.arange(PLACES))
    make = np.random.default_rng(words)
    shared.masks[:] = make.integers(1, 2**32, shared.masks.shape, np.uint32)
    shared.masks[::3] = 0  # of each third row a few tokens
    shared.masks[::3, ::700] = 1 << 5
    step.here.seeds.random_(0, 2**62)
    step.here.values[0].uniform_(0.2, 2.0)[::5] = 0.0
    step.want(np.ones(PLACES, np.uint64))
    wrong = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (32 * words, 32 * words - 27):
            logits = (3 * torch.randn(PLACES, width, device="cuda")).to(dtype)
            masked = logits.float()
            masks = torch.from_numpy(shared.masks.view(np.int32).copy()).cuda()
            apply_token_masks(masked, torch.arange(PLACES, device="cuda"), masks)
            positions = step.state.num_computed[:PLACES].long() - 1
            params = SamplingRows(step.rows.values, step.rows.seeds, positions, False)
            wanted = sample(masked, params).tokens.int()
            step.sample(logits, PLACES, copied=False)
            wrong += int((step.sampled_tokens != wanted).sum())
    step.close()
    print(f"{words} words: {wrong} of {6 * PLACES} tokens are others")
    return "" if not wrong else "tokens"


def times(words: int) -> None:
    """What it takes where all masks are there: to copy them, and to sample under them, copied and
    not."""
    import torch

    shared = SharedMasks(PLACES, words, 1, 0)
    step = Step(shared, words)
    shared.tags[:] = tag_of(np.ones(PLACES), np.arange(PLACES))
    shared.masks[:] = 0xFFFFFFFF
    step.here.values[0].fill_(1.0)
    step.want(np.ones(PLACES, np.uint64))
    logits = torch.randn(PLACES, 32 * words, device="cuda").bfloat16()
    for count in (1, 51, 256):
        runs = (
            functools.partial(step.take, count),
            functools.partial(step.sample, logits, count, True),
            functools.partial(step.sample, logits, count, False),
        )
        copy, copied, at_once = map(microseconds, runs)
        print(
            f"{words} words, {count} rows: {copy:.0f} us to copy masks, {copied:.0f} with tokens; "
            f"{at_once:.0f} where they are read"
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
        waiting = [
            waits(words, patient, copied) for patient in (True, False) for copied in (True, False)
        ]
        faults += filter(None, [flips(words), *waiting, agrees(words)])
        times(words)
    print(f"gpu_awaited: {'FAILED: ' + ', '.join(faults) if faults else 'OK'}")
    return 1 if faults else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    sys.exit(main())
