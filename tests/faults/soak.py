"""Load for a long time, of which a part leaves, while services are killed: afterwards every process
holds exactly what it held before.

    python -m tests.faults.soak --minutes 10 --report report.md

A fifth of the streams is left by its client before the end, and every 20 s a service is killed, each
kind in turn. Before and after that, with nothing under way, descriptors, sockets and threads of each
service are counted, the KV blocks that are free, and the files in the run directory.
"""

import asyncio
import itertools
import random
import sys
import time
from typing import Any, Final

from .reports import Held, finish, held_by, parser_of, resident_bytes  # isort: skip

from e2e.conftest import Stack
from e2e.test_stack_fake import gauges
from faults.clients import until
from faults.nemesis import KINDS, VOCAB, Clients, Nemesis, Record, is_void, name_of, report

LEAVING: Final = 0.2
KILL_EVERY_S: Final = 20.0
STREAMS: Final = 48
SETTLE_S: Final = 30.0
"""How long what was under way may take to be given back."""
FLAGS: Final = (
    *("--device", "fake", "--skip-tokenizer-init", "--fake-vocab-size", str(VOCAB)),
    *("--fake-step-ms", "4", "--num-frontends", "2", "--num-tokenizers", "2", "--num-workers", "2"),
)


def held(stack: Stack) -> dict[str, Held | int]:
    """What the stack holds, by the name of the service or of the thing."""
    processes = {name_of(pid): held_by(pid) for pid in stack.children()}
    # afterwards: a frontend that has answered may still hold the connection
    figures = gauges(stack)
    sockets = list(stack.run_dir().glob("*.sock"))
    return {
        **processes,
        "supervisor": held_by(stack.process.pid),
        "free blocks of KV": int(figures["kv_blocks_free"]),
        "running": int(figures["num_requests_running"]),
        "waiting": int(figures["num_requests_waiting"]),
        "parked": int(figures["requests_parked"]),
        "sockets in the run directory": len(sockets),
    }


async def settled(stack: Stack) -> dict[str, Held | int]:
    """What it holds once that no longer changes."""
    last: dict[str, Held | int] = {}

    def unchanged() -> bool:
        nonlocal last
        former, last = last, held(stack)
        return former == last

    await until(unchanged, SETTLE_S, every_s=1.0)
    return last


async def load(
    stack: Stack, seconds: float, kill_every_s: float, streams: int, seed: int
) -> Record:
    """`streams` clients at a time, and one kind of service after the other killed."""
    make = random.Random(seed)
    record = Record()
    clients = Clients(stack.url, streams, record, make, leaving=LEAVING)
    running = asyncio.create_task(clients.run())
    nemesis = Nemesis(stack, clients, record, make)
    kinds = itertools.cycle(KINDS)
    end = time.monotonic() + seconds
    while time.monotonic() + kill_every_s < end:
        await asyncio.sleep(kill_every_s)
        record.under_way.append(clients.under_way)
        await nemesis.hit(next(kinds), "kill")
    await asyncio.sleep(max(0.0, end - time.monotonic()))
    clients.stopping = True
    await running
    return record


async def measure(
    stack: Stack, seconds: float, kill_every_s: float, streams: int = STREAMS, seed: int = 0
) -> tuple[Record, list[str]]:
    """The record of the load, and what is held that was not held before it. Before the first count
    each kind is killed once: what is made on first use stays."""
    await load(stack, 1.5 * len(KINDS), 1.0, streams, seed)
    before = await settled(stack)
    record = await load(stack, seconds, kill_every_s, streams, seed)
    after: dict[str, Any] = {}

    def is_back() -> bool:
        nonlocal after
        after = held(stack)
        return after == before

    await until(is_back, SETTLE_S, every_s=0.5)
    differences = [
        f"{name}: {before.get(name)} before, {after.get(name)} after"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    return record, differences


def faults_of(record: Record, differences: list[str], streams: int = STREAMS) -> list[str]:
    """What is not as it should be."""
    lost = [] if record.is_sound else [f"streams: {record.wrong[:5]} {record.lost[:5]}"]
    void = ["void: too few streams were under way"] if is_void(record, streams) else []
    return [*differences, *lost, *void]


def main() -> int:
    """0 when everything is back."""
    parser = parser_of(__doc__, minutes=10.0)
    parser.add_argument("--every", type=float, default=KILL_EVERY_S, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    stack = Stack(*FLAGS).wait_ready()
    try:
        record, differences = asyncio.run(
            measure(stack, 60 * options.minutes, options.every, seed=options.seed)
        )
        memory = {name_of(pid): resident_bytes(pid) >> 20 for pid in stack.children()}
    finally:
        stack.end()
    sizes = ", ".join(f"{name} {size}" for name, size in sorted(memory.items()))
    text = f"- seed {options.seed}; {record.left} of {record.streams} streams were left by their clients\n"
    text += f"{report(record, STREAMS, FLAGS)}\n- memory at the end, in MiB: {sizes}"
    return finish(text, faults_of(record, differences), options.report)


if __name__ == "__main__":
    sys.exit(main())
