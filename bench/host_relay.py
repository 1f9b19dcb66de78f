"""How long a step's record is on its way to a rank on another host, in microseconds.

    PYTHONPATH=protocol:services python bench/host_relay.py [--records 5000]

Both hosts are this machine: what is measured is the relay, from the ring of rank 0 through the
rank's proxy, a TCP connection of the loopback and the rank's actor to a ring of its own, and not a
network. Beside it the same through the one ring of ranks on one host. Records as long as steps of
decodes, of 256 rows with new blocks, and of a long prompt; the pause between two of them lets
everybody fall asleep, as between real steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pagewire.launch.ray_ranks import handshake, relay, remote_child
from pagewire.launch.ray_ranks.handover import RankProcess
from pagewire.launch.ray_ranks.remote_child import Assignment
from pagewire.process import liveness
from pagewire.process.group import PLACE_VARIABLE, GroupMemory, Place, RingWriter
from pagewire.process.hosts import Hosts
from pagewire_protocol.channels import prepare_run_dir

SIZES = (40, 4096, 65536)
PAUSE_S = 0.002
STAMP_BYTES = 8
START_S = 30.0
SECRET = bytes(32)
RANK = """
import sys, time
from pagewire.process.group import Place, RingReader
ring = RingReader(Place.inherited())
records = int(sys.argv[1])
print("ready", flush=True)
delays = []
while len(delays) < records:
    record = ring.read(1.0)
    if record is not None:
        delays.append(time.monotonic_ns() - int.from_bytes(record[:8], "little"))
print(delays, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=5000)
    options = parser.parse_args()
    print(f"{'way':>6} {'bytes':>7} {'median us':>10} {'p99 us':>8}")
    for size in SIZES:
        for way, start in (("ring", start_here), ("relay", start_elsewhere)):
            delays = sorted(measure(start, size, options.records))
            median, late = (delays[int(len(delays) * part)] / 1000 for part in (0.5, 0.99))
            print(f"{way:>6} {size:>7} {median:>10.0f} {late:>8.0f}")


def measure(start, size: int, records: int) -> Sequence[int]:
    """Nanoseconds of each record."""
    memory = GroupMemory("bench", 2)
    writer = RingWriter(memory.place(0))
    read, write = os.pipe()
    started = start(memory.place(1), [sys.executable, "-c", RANK, str(records)], write)
    os.close(write)
    with os.fdopen(read) as output:
        assert output.readline() == "ready\n"
        rest = bytes(size - STAMP_BYTES)
        for _ in range(records):
            time.sleep(PAUSE_S)
            writer.write(time.monotonic_ns().to_bytes(STAMP_BYTES, "little") + rest)
        delays = json.loads(output.readline())
    for pid in started:
        os.waitpid(pid, 0)
    memory.close()
    return delays


def start_here(place: Place, command: list[str], output: int) -> list[int]:
    """A rank of one host; its process."""
    variables = {**os.environ, PLACE_VARIABLE: place.as_variable()}
    rank = subprocess.Popen(command, stdout=output, env=variables, pass_fds=place.fds)
    return [rank.pid]


def start_elsewhere(place: Place, command: list[str], output: int) -> list[int]:
    """A rank's proxy and its actor, in processes of their own, as there are."""
    listener = handshake.listen("127.0.0.1")
    port = listener.getsockname()[1]
    process = RankProcess(tuple(command), os.getcwd(), dict(os.environ), place.as_variable())
    return [
        _forked(lambda: _run_proxy(listener, place, process, output)),
        _forked(lambda: _run_actor(port)),
    ]


def _run_proxy(listener, place: Place, process: RankProcess, output: int) -> None:
    opened = handshake.AuthenticatedListener(listener, SECRET)
    connection = opened.accept(START_S)
    assert connection is not None and relay.receive_hello(connection) is not None
    with tempfile.TemporaryDirectory(prefix="pw-") as directory:
        run_dir = prepare_run_dir(str(Path(directory)))
        relay.Relay(connection, place, run_dir, liveness.new_page(), output).run(process)


def _run_actor(port: int) -> None:
    hosts = Hosts((0, 1), "127.0.0.1", "127.0.0.1", 1)
    remote_child.run_rank(Assignment("127.0.0.1", port, SECRET, None, hosts))


def _forked(run) -> int:
    if pid := os.fork():
        return pid
    try:
        run()
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
