"""A few examples of each sort that `python -m tests.faults.fuzz` runs for hours."""

import json
import random

import pytest
from faults import fuzz


@pytest.mark.parametrize("run", [fuzz.frames, fuzz.to_scheduler, fuzz.to_tokenizer])
def test_a_short_round(run: fuzz.Round, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "ROUND", 15)
    run(random.Random())


def test_bodies_are_near_those_that_an_endpoint_takes() -> None:
    make = random.Random(3)
    bodies = [fuzz.body_of(path, make) for path in fuzz.BODIES for _ in range(50)]
    whole = 0
    for body in bodies:
        try:
            whole += isinstance(json.loads(body), dict)
        except ValueError:
            continue
    assert 100 < whole < len(bodies)
