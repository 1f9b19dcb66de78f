"""What handing a step to the other ranks costs rank 0, in microseconds of its CPU time.

    PYTHONPATH=protocol:services python bench/rank_link.py [--ranks 2,4,8]

It is all that rank 0 does more than a worker of one GPU does. Records as long as the steps of a
decode (a repeated one is some tens of bytes), of 256 rows with new blocks, and of a long prompt; the
other ranks are processes that read them. The least and the median of all records; the pause between
two of them lets readers fall asleep, as between real steps.
"""

import argparse
import os
import statistics
import time

from pagewire.process.group import GroupMemory, RingReader, RingWriter
from pagewire.worker.rank_link import Leader

SIZES = (40, 4096, 65536)
RECORDS = 2000
PAUSE_S = 0.0005


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="2,4,8")
    options = parser.parse_args()
    print(f"{'ranks':>5} {'bytes':>7} {'least us':>9} {'median us':>10}")
    for ranks in map(int, options.ranks.split(",")):
        for size in SIZES:
            times = measure(ranks, size)
            print(f"{ranks:>5} {size:>7} {min(times):>9.1f} {statistics.median(times):>10.1f}")


def measure(ranks: int, size: int) -> list[float]:
    memory = GroupMemory("bench", ranks)
    readers = [start_reader(memory, rank) for rank in range(1, ranks)]
    leader = Leader(RingWriter(memory.place(0)))
    frame = bytes(size)
    times: list[float] = []
    for _ in range(RECORDS):
        began = time.thread_time_ns()
        leader.step(frame)
        times.append((time.thread_time_ns() - began) / 1000)
        time.sleep(PAUSE_S)
    for pid in readers:
        os.waitpid(pid, 0)
    memory.close()
    return times


def start_reader(memory: GroupMemory, rank: int) -> int:
    """A process that reads all records, and ends; its number."""
    if pid := os.fork():
        return pid
    try:
        reader = RingReader(memory.place(rank))
        for _ in range(RECORDS):
            while reader.read(1.0) is None:
                pass
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
