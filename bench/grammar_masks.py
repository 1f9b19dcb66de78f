"""What masks of grammars cost on a processor: in a matcher process, and on a GPU worker's side.

    python bench/grammar_masks.py matcher [--rows 32] [--steps 240]
    python bench/grammar_masks.py worker [--rows 256] [--steps 240] [--matchers 8] [--ranks 1]

Rows write an endless array of objects by one schema, as in `structured.py load`, and take any
allowed token at random. `matcher` computes the masks of one process in this one: ms a step for all
its rows. `worker` runs a GPU worker's steps without a device, which computes nothing, with true
matcher processes: ms of the worker's own thread a step, without what it waits and without launches of
kernels. By default a device takes masks and tells tokens itself; with `--ranks 2`, as rank 0 of
several, the host brings masks. Neither needs a GPU or a server.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import structured

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
SHARES = (0.0, 0.2, 1.0)
WARM_UP = 16
"""Steps that are not counted: llguidance learns a grammar while it matches."""


def demo() -> tuple[Any, int, Any]:
    """The demo model's configuration and vocabulary size, and the grammar."""
    from pagewire.config import ModelConfig
    from pagewire.hub.huggingface import demo_gguf
    from pagewire.requests.grammars import schema_grammar
    from pagewire.tokenizer.load import load

    schema = {"type": "array", "items": structured.SCHEMA, "minItems": 1000}
    size = load(Path(str(demo_gguf()))).tokenizer.get_vocab_size()
    return ModelConfig(model=str(demo_gguf())), size, schema_grammar(schema, "json")


def any_tokens(words: Any, random: Any) -> Any:
    """One of those that each mask [R, words] allows, [R]."""
    noise = random.random(words.shape[1], np.float32)
    word = np.where(words != 0, noise, -1).argmax(1)
    bits = np.unpackbits(words[np.arange(len(words)), word].view(np.uint8), bitorder="little")
    bits = bits.reshape(len(words), 32)
    return 32 * word + np.where(bits, random.random(bits.shape, np.float32), -1).argmax(1)


# --- matcher ---


def matcher(args: argparse.Namespace) -> None:
    from pagewire.grammar.compiler import Compiler
    from pagewire.grammar.matchers import Matchers
    from pagewire.grammar.messages import mask_words
    from pagewire.grammar.vocabulary import load_vocabulary

    model, size, grammar = demo()
    vocabulary = load_vocabulary(model, size, [2])
    masks = np.zeros((args.rows, mask_words(size)), np.uint32)
    matchers = Matchers(vocabulary, Compiler(vocabulary), masks)
    keys = list(range(args.rows))
    for key in keys:
        matchers.open(key, key, grammar, [])
    for key in keys:
        matchers.write(key)
    random = np.random.default_rng(0)
    taken: list[float] = []
    for _ in range(WARM_UP + args.steps):
        tokens = any_tokens(masks, random).tolist()
        began = time.perf_counter()
        for key in matchers.advance(keys, tokens):
            matchers.write(key)
        taken.append(1000 * (time.perf_counter() - began))
    print(f"{args.rows} rows a process: {summary(taken[WARM_UP:])}")


def summary(taken: list[float]) -> str:
    tenths = statistics.quantiles(taken, n=10)
    return f"{statistics.mean(taken):.3f} ms a step, p50 {tenths[4]:.3f}, p90 {tenths[8]:.3f}"


# --- worker ---


class Event:
    """What torch.cuda.Event is to a device that computes nothing. A step is never `computed` while
    rows wait for masks, and its tokens are there when they are wanted."""

    def __init__(self, blocking: bool = False) -> None:
        self._is_of_tokens = blocking

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self._is_of_tokens

    def synchronize(self) -> None:
        pass


class Device:
    """Captured steps and kernels that do nothing but sample what masks allow. `spent`: seconds of
    this thread in them, which are none of the worker's."""

    def __init__(self, rows: int) -> None:
        import torch

        self._random = np.random.default_rng(0)
        self.spent = 0.0
        self.slots = torch.zeros(rows, dtype=torch.int32)
        self.cascade_sizes: list[int] = []
        self._decoded = SimpleNamespace(
            logits=torch.zeros(rows, 8), sampled_tokens=torch.zeros(rows, dtype=torch.int32)
        )
        self.shared: Any = None
        """Where it takes masks itself, and tells tokens."""
        self._sampled = np.zeros(rows, np.int64)
        """By slot: how many tokens."""

    def sample_awaited(
        self,
        logits: Any,
        awaited: Any,
        count: int,
        state: Any,
        taken: Any,
        sampled_tokens: Any,
        told_offsets: Any,
    ) -> None:
        """See pagewire_kernels.awaited_sampling. It waits for all."""
        began = time.thread_time()
        shared, slots = self.shared, awaited.slots[:count].numpy()
        places = (awaited.tag_at[:count].numpy() - shared.tag_addresses(0)) // shared.tags.strides[
            0
        ]
        self._sampled[slots] += 1
        keys = awaited.tag_keys[:count].numpy().view(np.uint64)
        tags = keys | self._sampled[slots].astype(np.uint64)
        while (shared.tags[places] != tags).any():
            time.sleep(0.0001)
        tokens = any_tokens(shared.masks[places], self._random)
        sampled_tokens.numpy()[awaited.rows[:count].numpy()] = tokens
        shared.told_tokens[places] = tokens
        shared.told_tags[places] = tags
        self.spent += time.thread_time() - began

    def sample_masked(
        self, logits: Any, held: Any, last_token: Any, sampled_tokens: Any, late: Any = None
    ) -> None:
        """See pagewire_kernels.masked_sampling."""
        began = time.thread_time()
        words = held.words[held.masks.long()].numpy().view(np.uint32)
        sampled_tokens.numpy()[held.rows.numpy()] = any_tokens(words, self._random)
        self.spent += time.thread_time() - began

    def group(self, *_: Any) -> int:
        """No prefix groups."""
        return 0

    def bucket(self, rows: int) -> int:
        """Every number of rows."""
        return rows

    def run(self, *_: Any) -> Any:
        """A decode step."""
        return self._decoded


def gpu_runner(
    device: Device, rows: int, model: Any, vocab_size: int, ranks: int
) -> tuple[Any, Any]:
    """A GpuRunner over `device`, and its masks."""
    import torch
    from gpu_on_cpu import Uploads  # pyright: ignore[reportMissingImports]
    from pagewire.worker.gpu import awaited_sampling, runner
    from pagewire.worker.gpu.resample import ExtraSampling, Kernels
    from pagewire.worker.step.grammar_masks import GrammarMasks
    from pagewire.worker.step.slots import Slots
    from pagewire_kernels import awaited_masks
    from pagewire_kernels.slot_state import SlotState
    from pagewire_protocol.messages import StepCost

    torch.cuda.Event = Event  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    slots = Slots(rows, 4096, 16)
    state = SlotState.empty(rows + 1, slots.tables.shape[1], "cpu")
    uploads: Any = Uploads()
    masks = GrammarMasks(rows, model, vocab_size, (2,))
    arch = SimpleNamespace(vocab_size=vocab_size)
    loaded: Any = SimpleNamespace(
        decoder=SimpleNamespace(arch=arch), eos_token_ids=(2,), dtype=torch.float32
    )
    nothing: Any = lambda *_: None  # noqa: E731
    kernels = Kernels(nothing, nothing, nothing, nothing, device.sample_masked)
    awaited = None
    if ranks == 1:
        awaited_masks.look = awaited_masks.begin = nothing
        awaited_sampling.sample_awaited = device.sample_awaited
        awaited = awaited_sampling.AwaitedSampling(
            slots, state, uploads, masks, vocab_size, device.sample_masked
        )
        device.shared = masks.shared
        masks.let_device_tell()
    parts: Any = SimpleNamespace(
        loaded=loaded, slots=slots, state=state, uploads=uploads, graphs=device, mixed=None,
        extra=ExtraSampling(loaded, slots, state, uploads, masks, kernels, awaited), masks=masks,
        ring=[torch.empty(rows, dtype=torch.int32) for _ in range(runner.RING)], stage=None,
    )  # fmt: skip
    epoch: Any = 1
    return runner.GpuRunner(parts, StepCost(1.0, 0.0, 0.0), epoch, []), masks


def admissions(rows: int, share: float, grammar: Any) -> tuple[Any, ...]:
    """Of rows that have one token each, and room for many."""
    from pagewire_protocol.messages import Admission, pack
    from pagewire_protocol.sampling import Sampling

    def one(slot: Any) -> Admission:
        held = int((slot + 1) * share) > int(slot * share)
        blocks = pack("i", range(200))
        sampling = Sampling(slot, 4000)
        given = grammar if held else None
        return Admission(slot, slot, pack("i", [9]), b"", blocks, 0, sampling, grammar=given)

    return tuple(one(slot) for slot in range(rows))


def worker(args: argparse.Namespace) -> None:
    from pagewire.worker.step import grammar_masks, matcher_pool

    model, size, grammar = demo()
    matcher_pool.max_matchers = lambda: args.matchers
    for limit in ("WAIT_S", "WAIT_ALONE_S"):  # nothing is late here
        setattr(grammar_masks, limit, 60.0)
    for share in SHARES:
        device = Device(args.rows)
        runner, masks = gpu_runner(device, args.rows, model, size, args.ranks)
        taken = list(worker_steps(args, runner, device, admissions(args.rows, share, grammar)))
        masks.close()
        print(
            f"{args.rows} rows, {share:4.0%} with grammars: {summary(taken[WARM_UP:])}", flush=True
        )


def worker_steps(
    args: argparse.Namespace, runner: Any, device: Device, admit: tuple[Any, ...]
) -> Iterator[float]:
    """ms of this thread, for each step and its result."""
    from pagewire_protocol.messages import Step, pack

    for n in range(WARM_UP + args.steps):
        if n:
            step = Step(1, n, repeat=True)  # pyright: ignore[reportArgumentType]
        else:
            one_each = pack("i", [1] * args.rows)
            run = pack("i", range(args.rows))
            step = Step(1, n, admit=admit, run_slots=run, run_counts=one_each)  # pyright: ignore[reportArgumentType]
        device.spent = 0.0
        began = time.thread_time()
        runner.launch(step).result()
        yield 1000 * (time.thread_time() - began - device.spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["matcher", "worker"])
    parser.add_argument("--rows", type=int, default=0, help="default: 32 or 256")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--matchers", type=int, default=8, help="processes of the worker")
    parser.add_argument("--ranks", type=int, default=1, help="of the worker")
    args = parser.parse_args()
    args.rows = args.rows or (32 if args.what == "matcher" else 256)
    if args.what == "matcher":
        matcher(args)
    else:
        worker(args)


if __name__ == "__main__":
    main()
