"""Every launch that public models choose, on every kind of card that is served, fits the shared
memory of that card: found by compiling, without a GPU (shared_memory.py). Not in this process: the
kernels of these tests are made for Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("shared_memory.py")
ROOT = Path(__file__).parents[2]
LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes that a block may have, by compute capability: 163, 99 and 227 KiB ("Technical
Specifications per Compute Capability" in the CUDA C++ Programming Guide)."""
TYPES = ("bfloat16", "float16", "float32")
HALVES = ((80, 86, 89, 120), (90, 100))
"""What one process compiles: the first four share most of their launches. Two processes, since CI
has two cores."""
TILED = {"_prefill", "_decode", "_prefix", "_skinny", "_row", "_thresholds"}
EXPERTS = {"_grouped", "_pair_up", "_token_down"}
TIMEOUT_S = 1500

Found = dict[str, list[dict[str, Any]]]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir()
    paths = os.pathsep.join(str(ROOT / part) for part in ("protocol", "kernels", "services"))
    env = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors[-3000:]
    return [json.loads(line) for line in out.splitlines()]


def too_large(found: list[dict[str, Any]], limit: int) -> list[str]:
    return [
        f"{one['launch']}: {one['shared']:,} of {limit:,} bytes"
        for one in found
        if one["shared"] > limit
    ]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """By what was asked for, like "86:float32"."""
    folder = tmp_path_factory.mktemp("triton")
    asked = [[f"{capability}:{kind}" for kind in TYPES for capability in half] for half in HALVES]
    running = [start(folder / str(i), *arguments) for i, arguments in enumerate(asked)]
    try:
        found: Found = {}
        for one in (one for process in running for one in finish(process)):
            found.setdefault(one["asked"], []).append(one)
        yield found
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("capability", LIMITS)
def test_every_launch_fits(capability: int, dtype: str, measured: Found) -> None:
    found = measured[f"{capability}:{dtype}"]
    assert {one["kernel"] for one in found} >= TILED | EXPERTS
    sizes = {
        size
        for size in (64, 80, 96, 128, 256)
        if any(f" D={size} " in one["launch"] for one in found)
    }
    assert sizes >= {64, 128, 256}
    assert not too_large(found, LIMITS[capability])


def test_a_launch_that_is_too_large_is_reported(tmp_path: Path) -> None:
    """A card of 99 KiB that chose as one of 227 KiB."""
    found = finish(start(tmp_path / "cache", "86:bfloat16:232448:Gemma-2B"))
    reported = too_large(found, LIMITS[86])
    assert {line.split()[0] for line in reported} == {"_prefill", "_decode"}
    assert any(line.endswith("147,456 of 101,376 bytes") for line in reported)


@pytest.mark.parametrize(
    "asked",
    [
        "89:float16:101376:Gemma-2B",
        "90:float32:232448:Gemma-2B",
        "120:float32:101376:Llama-3.1-8B",
    ],
)
def test_whole_kernels_are_made_and_have_the_bytes_that_were_allocated(
    asked: str, tmp_path: Path
) -> None:
    """Down to ptxas; a few, since each takes seconds, and of those that are counted as others."""
    found = finish(start(tmp_path / "cache", "--whole", asked))
    assert {one["kernel"] for one in found} == {"_prefill", "_decode"}
    assert all(one["whole"] == one["shared"] for one in found)
