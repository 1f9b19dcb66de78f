"""A file of what was measured and chosen on a machine, by name: later starts read it, measure
nothing and compute the same."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value", int, str)


def read(place: Path, value: Callable[[Any], Value]) -> dict[str, Value]:
    """Each choice through `value`, which raises ValueError, AttributeError or TypeError for what
    cannot be one: then there are none."""
    try:
        return {str(name): value(found) for name, found in json.loads(place.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write(place: Path, known: dict[str, Value]) -> None:
    """In one move, since another worker may read it."""
    with contextlib.suppress(OSError):
        passing = place.with_suffix(f".{os.getpid()}")
        passing.write_text(json.dumps(known, indent=0))
        passing.replace(place)
