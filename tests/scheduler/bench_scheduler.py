"""CPU time of the scheduler for pure decode steps, in microseconds a token: `python
tests/scheduler/bench_scheduler.py [--rows 256]`.

Drives the state machine as its loop does, with every message encoded and decoded, but without
sockets; the simulated worker's and tokenizers' own time is not counted. No assertion: the figure
goes to the reader.
"""

import argparse
import time

import msgspec
import numpy as np
from pagewire.config import SchedulerConfig
from pagewire.scheduler.state import Scheduler, Tick
from pagewire_protocol.messages import (
    Hello,
    Peer,
    Role,
    Step,
    StepCost,
    StepResult,
    Submit,
    Tokens,
    ToScheduler,
    WorkerFacts,
)
from pagewire_protocol.sampling import Sampling

ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(ToScheduler)


def setup(rows, tokenizers, prompt, max_tokens, stop, config):
    outputs = []
    scheduler = Scheduler(1, config, lambda _, message: outputs.append(message), lambda _: None)
    scheduler.handle(Tick(1.0))
    facts = WorkerFacts(
        65_536, 16, rows, 32_768, 49_152, (0, 2), "sim", True, StepCost(2.0, 0.004, 0.3, 12.0)
    )
    scheduler.handle(Hello(Peer(Role.WORKER, "w", "ipc:///w", 7, True), facts))
    inboxes = [f"ipc:///t{i}" for i in range(tokenizers)]
    for i, inbox in enumerate(inboxes):
        scheduler.handle(Hello(Peer(Role.TOKENIZER, inbox, inbox, 100 + i, True)))
    sampling = Sampling(seed=0, max_tokens=max_tokens, stop_token_ids=stop)
    for i in range(rows):
        ids = (
            np.random.default_rng(i).integers(3, 40_000, prompt + i % 16).astype(np.int32).tobytes()
        )
        scheduler.handle(
            Submit(i.to_bytes(16, "big"), 1, i, inboxes[i % tokenizers], ids, b"", sampling)
        )
    return scheduler, outputs


def answer(step, last, known, late, random):
    """The result of `step` from a worker that knows which rows sample, a share `late` of which bring
    no token; `known` counts what each slot still has to compute."""
    for admission in step.admit:
        known[admission.slot] = len(admission.prompt) // 4 - admission.computed
    if not step.repeat:
        last = np.frombuffer(step.run_slots, np.int32)
        known[last] -= np.frombuffer(step.run_counts, np.int32)
    else:
        known[last] -= 1
    sampled = last[known[last] == 0]
    known[sampled] += 1
    tokens = ((np.arange(len(sampled)) + step.n) % 40_000 + 3).astype(np.int32)
    counts = b""
    if late:
        brings = random.random(len(sampled)) >= late
        tokens = tokens[brings]
        counts = brings.astype(np.int32).tobytes()
    flags = bytes(len(sampled))
    return last, StepResult(
        1, 7, step.n, sampled.tobytes(), tokens.tobytes(), flags, None, (), counts
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokenizers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stop-ids", action="store_true")
    parser.add_argument("--late", type=float, default=0.0, help="share of rows without a token")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    config = SchedulerConfig(max_num_seqs=args.rows, max_num_batched_tokens=8192)
    stop = (41_000, 41_001) if args.stop_ids else ()
    scheduler, outputs = setup(args.rows, args.tokenizers, 60, args.steps + 1000, stop, config)
    last, known, now = np.zeros(0, np.int32), np.zeros(args.rows, np.int64), 2.0
    steps, spent, tokens, repeats, worst = [], 0.0, 0, 0, 0.0
    spans = []
    random = np.random.default_rng(0)
    if args.profile:
        import cProfile

        profile = cProfile.Profile()
    for n in range(args.steps + 200):
        frames = []
        if steps:
            last, result = answer(steps.pop(0), last, known, args.late, random)
            frames = [ENCODER.encode(result)]
        now += 0.002
        if args.profile and n == 200:
            profile.enable()
        began = time.thread_time()
        outputs.clear()
        for frame in frames:
            scheduler.handle(DECODER.decode(frame))
        scheduler.handle(Tick(now))
        for message in outputs:
            ENCODER.encode(message)
        took = time.thread_time() - began
        for message in outputs:
            if isinstance(message, Step):
                steps.append(message)
                repeats += message.repeat
            elif isinstance(message, Tokens) and n >= 200:
                tokens += len(message.tokens) // 4
        if n >= 200:
            spent += took
            spans.append(took)
    spans.sort()
    if args.profile:
        import pstats

        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    worst, median = spans[-1], spans[len(spans) // 2]
    print(
        f"{args.rows} rows, {args.tokenizers} tokenizers: {1e6 * spent / tokens:.3f} us a token, {1e6 * spent / args.steps:.0f} us a step "
        f"(median {1e6 * median:.0f}, p99 {1e6 * spans[int(0.99 * len(spans))]:.0f}, worst {1e6 * worst:.0f}), {repeats} repeats"
    )


if __name__ == "__main__":
    main()
