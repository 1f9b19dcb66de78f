"""Ranges: a value between its bounds, or a refusal that names the parameter, the bounds and what
was given."""

from typing import Final, TypeVar

from ..requests.errors import bad

I31: Final = 2**31 - 1

V = TypeVar("V", int, float)


def within(name: str, value: V | None, low: V, high: V, default: V) -> V:
    if value is None:
        return default
    if not low <= value <= high:
        raise bad(f"`{name}` must be between {low} and {high}, got {short(value)}.", name)
    return value


def above_zero(name: str, value: float | None, high: float) -> float:
    """Like `within`, from 0 on but not 0; 1 by default."""
    value = within(name, value, 0.0, high, 1.0)
    if value == 0:
        raise bad(f"`{name}` must be above 0 and at most {high:g}, got 0.", name)
    return value


def at_most(name: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise bad(f"`{name}` may hold at most {limit} {what}, got {count}.", name)


def short(value: float) -> str:
    return str(value) if abs(value) < 10**20 else f"{'-' if value < 0 else ''}more than 1e20"
