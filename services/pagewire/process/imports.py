"""Imports of this package's modules that bring large libraries with them."""

import gc
import importlib
from typing import Any


def imported(module: str) -> Any:
    """The module `pagewire.MODULE`. Imports make no garbage, so the collector is off meanwhile:
    with torch it takes a third of the time."""
    gc.disable()
    try:
        return importlib.import_module(f"pagewire.{module}")
    finally:
        gc.enable()
