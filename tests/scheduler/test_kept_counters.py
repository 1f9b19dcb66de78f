"""What the scheduler counts does not fall from one life to the next."""

from pathlib import Path

import pytest
from pagewire.scheduler.kept_counters import FILE, KeptCounters
from pagewire.scheduler.worker_state import Counters


def test_the_next_life_goes_on_counting(tmp_path: Path) -> None:
    first = Counters(steps=3, generation_tokens=40)
    first.iteration_tokens.observe(5)
    KeptCounters(tmp_path).save(first, deaths=2)
    second = Counters()
    assert KeptCounters(tmp_path).load(second) == 2
    assert dict(second.stats()) == dict(first.stats())
    second.iteration_tokens.observe(7)
    assert second.iteration_tokens.sum == 12 and first.iteration_tokens.sum == 5


@pytest.mark.parametrize("content", [b"", b"[]", b'{"deaths": 1}', b"\xff", b'{"deaths": "x"}'])
def test_a_damaged_file_counts_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    fresh = Counters()
    assert KeptCounters(tmp_path).load(fresh) == 0
    assert fresh.steps == 0
