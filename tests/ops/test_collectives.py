"""Collective kernels: in Triton's interpreter, by processes that are each other's ranks
(collective_ranks.py), and compiled without a GPU. Neither in this process: the ranks are forked, and
the kernels of these tests are made for the interpreter.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pagewire_kernels.symmetric_communicator import crossings

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIZES = (2, 3, 4)
CASES = {
    2: ("sums", "norms", "shares", "gathers", "mixed", "chosen", "many generations"),
    3: ("sums", "gathers"),
    4: ("shares", "mixed"),
}
LIMITS = {80: 166_912, 90: 232_448, 120: 101_376}
TIMEOUT_S = 300

Lines = list[dict[str, Any]]


def run(script: str, *arguments: int, **variables: str) -> Lines:
    paths = os.pathsep.join(str(ROOT / part) for part in ("protocol", "kernels", "services"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def ranks() -> Lines:
    return run("collective_ranks.py", *SIZES)


@pytest.mark.parametrize("size,case", [(size, case) for size in SIZES for case in CASES[size]])
def test_ranks_get_what_the_oracle_says_and_the_same_bits(
    size: int, case: str, ranks: Lines
) -> None:
    results = [line for line in ranks if (line["size"], line["case"]) == (size, case)]
    assert len(results) == size
    assert not [failure for line in results for failure in line["failures"]]
    assert len({line["digest"] for line in results}) == 1


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_stopped_is_named_after_the_time_limit(size: int, ranks: Lines) -> None:
    """By every other one, once; no later launch waits again."""
    stopped = [line for line in ranks if (line["size"], line["case"]) == (size, "stopped")]
    assert len(stopped) == size
    for line in stopped:
        if line["rank"] == size - 1:
            assert line["messages"] == [""]
        else:
            last = f"waited 0.3 s in an all-reduce for rank {size - 1}"
            assert line["messages"][0] == ""
            assert all(last in message for message in line["messages"][1:])
            assert len(line["messages"]) == 4


def test_crossings_are_where_another_way_is_faster() -> None:
    measured = {
        1000: {"low-latency": 4.0, "one-shot": 6.0, "library": 9.0},
        4000: {"one-shot": 8.0, "two-shot": 8.0, "library": 12.0},
        9000: {"one-shot": 9.0, "library": 13.0},
        20_000: {"one-shot": 60.0, "library": 41.0},
    }
    found = crossings(measured)
    assert list(found.ways) == [(0, "low-latency"), (1001, "one-shot"), (9001, "library")]
    ways = [found.way(nbytes) for nbytes in (0, 1000, 1001, 9000, 9001, 1 << 30)]
    assert ways == ["low-latency"] * 2 + ["one-shot"] * 2 + ["library"] * 2


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lines]:
    folder = tmp_path_factory.mktemp("triton")
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    yield run("compile_collectives.py", *LIMITS, **variables)


@pytest.mark.parametrize("capability", LIMITS)
def test_kernels_are_made_for_every_card(capability: int, compiled: Lines) -> None:
    launches = [line for line in compiled if line["capability"] == capability]
    assert {
        (line["module"].rpartition(".")[2], line["launch"].split()[0]) for line in launches
    } == {
        ("all_reduce", "_low_latency"),
        ("all_reduce", "_one_shot"),
        ("all_reduce", "_two_shot"),
        ("all_gather", "_low_latency"),
        ("all_gather", "_one_shot"),
    }
    assert all(line["shared"] <= LIMITS[capability] for line in launches)


def test_peers_are_read_in_16_bytes_and_signals_are_ordered_over_the_system(
    compiled: Lines,
) -> None:
    """And no kernel lets the next one in early, nor waits as one that was let in."""
    for line in compiled:
        instructions = set(line["instructions"])
        assert not [name for name in instructions if name.startswith("griddepcontrol")]
        assert "ld.global.v4.b32" in instructions
        narrow = {"ld.global.b16", "ld.global.v2.b16", "st.global.b16", "st.global.v2.b16"}
        assert not instructions & narrow
        if line["launch"].startswith("_low_latency"):
            assert {"ld.volatile.global.v2.b64", "st.global.v2.b64"} <= instructions
            assert not [name for name in instructions if name.startswith("atom")]
        else:
            signals = {"atom.global.sys.release.exch.b64", "atom.global.sys.acquire.add.u64"}
            assert signals <= instructions
