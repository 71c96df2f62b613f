"""Read JSON values that may come from anywhere: every wrong one is refused, with its place.

A reader takes a value and its place, and returns the value as it belongs into the record; what should be done about a
wrong one is for the caller to say, who catches `Wrong`.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from typing import Any

Reader = Callable[[Any, str], Any]

_LARGEST_INTEGER = 2**63 - 1


class Wrong(Exception):
    """A value that cannot be: the message names its place, what it is and what it should be."""

    def __init__(self, value: Any, place: str, wanted: str) -> None:
        """Describe it, shortened where it is long."""
        super().__init__(f"{place} is {reprlib.repr(value)}; it should be {wanted}")


def text(value: Any, place: str) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise Wrong(value, place, "a string")
    return value


def integer(value: Any, place: str) -> int:
    """Read an integer from 0 to 2^63 - 1."""
    if type(value) is not int or not 0 <= value <= _LARGEST_INTEGER:
        raise Wrong(value, place, "an integer of at least 0")
    return value


def milliseconds(value: Any, place: str) -> float:
    """Read a time."""
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:  # NaN compares false
        raise Wrong(value, place, "a finite number of milliseconds, at least 0")
    return float(value)


def interval(value: Any, place: str) -> tuple[float, float]:
    """Read two times, the smaller one first."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Wrong(value, place, "a list of two numbers")
    low, high = (milliseconds(bound, f"{place}[{i}]") for i, bound in enumerate(value))
    if low > high:
        raise Wrong(value, place, "an interval, its lower bound first")
    return low, high


def one_of(choices: tuple[str, ...]) -> Reader:
    """Return a reader of one of some strings."""

    def read(value: Any, place: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise Wrong(value, place, f"one of {', '.join(choices)}")
        return value

    return read


def optional(read: Reader) -> Reader:
    """Return a reader that also takes null."""
    return lambda value, place: None if value is None else read(value, place)


def tuple_of(read: Reader) -> Reader:
    """Return a reader of a list."""

    def read_all(value: Any, place: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise Wrong(value, place, "a list")
        return tuple(read(item, f"{place}[{i}]") for i, item in enumerate(value))

    return read_all


def by_name(read: Reader) -> Reader:
    """Return a reader of an object with any names."""

    def read_all(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise Wrong(value, place, "an object")
        return {name: read(item, f"{place}[{reprlib.repr(name)}]") for name, item in value.items()}

    return read_all


def record(make: Callable[..., Any], **fields: Reader) -> Reader:
    """Return a reader of an object with exactly these fields, which `make` takes as keyword arguments."""

    def read(value: Any, place: str) -> Any:
        if not isinstance(value, dict) or set(value) != set(fields):
            raise Wrong(value, place or "it", f"an object with exactly the fields {', '.join(fields)}")
        start = f"{place}." if place else ""
        return make(**{name: read(value[name], start + name) for name, read in fields.items()})

    return read
