"""A file of what was measured and chosen on a machine, by name: later starts read it, measure
nothing and compute the same."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value", int, str)


def read(path: Path, value: Callable[[Any], Value]) -> dict[str, Value]:
    """Each choice through `value`, which raises ValueError, AttributeError or TypeError for what
    cannot be one: then there are none."""
    try:
        return {str(name): value(choice) for name, choice in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write(path: Path, chosen: dict[str, Value]) -> None:
    """In one move, since another worker may read it."""
    with contextlib.suppress(OSError):
        passing = path.with_suffix(f".{os.getpid()}")
        passing.write_text(json.dumps(chosen, indent=0))
        passing.replace(path)
