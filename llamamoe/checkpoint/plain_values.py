"""Check data from untrusted files for values that programs read differently or cannot write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MOST_DIGITS = 100
"""Maximum digits of a whole number; ``float`` holds 308, and Python prints 4,300."""
LARGEST = 2**63 - 1
"""Limit of whole numbers that programs compute with: 64 bits."""
_NO_LIMIT = "model_max_length"
"""Last part of keys that hold 10**30 if a tokenizer has no limit; no program computes with them."""
_MOST_NESTED, _MOST_VALUES = 64, 2_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")


class Huge(int):
    """A whole number that was not read: its value is the number of its digits."""


def whole(digits: str) -> int:
    """Read a whole number; one of more than `MOST_DIGITS` becomes `Huge`, which `oddities` names."""
    return int(digits) if len(digits) <= MOST_DIGITS else Huge(len(digits.lstrip("-")))


def beyond(data: Any, place: str = "") -> str | None:
    """Return a phrase for the first whole number, at any level, that 64 bits cannot hold; None if there is none.

    Args:
        data: JSON-compatible data without `oddities`.
        place: The key that holds it.
    """
    if isinstance(data, dict | list):
        parts = data.items() if isinstance(data, dict) else enumerate(data)
        return next(filter(None, (beyond(part, f"{place}.{key}".lstrip(".")) for key, part in parts)), None)
    if not isinstance(data, int) or abs(data) <= LARGEST or place.endswith(_NO_LIMIT):
        return None
    return f"{place} = {data}, but a whole number must lie between -2**63 and 2**63"


def oddities(data: Any, most_values: int = _MOST_VALUES, *, nul: bool = True) -> Iterator[str]:
    """Yield a phrase for each value that cannot be written again; the first one is the message for the user.

    These are lone surrogates, whole numbers of more than 100 digits, more than 64 levels, and (where one part occurs in
    many places, as YAML allows) too many values.

    Args:
        data: JSON-compatible data.
        most_values: Maximum number of values to visit.
        nul: Whether text may hold the character NUL, which no path can.
    """
    waiting: list[tuple[str, Any, int]] = [("", data, 0)]  # not recursive, because the depth is checked
    while waiting:
        place, value, depth = waiting.pop()
        most_values -= 1
        if most_values < 0:
            yield f"{place.split('.')[0]} holds too many values"
            return
        if isinstance(value, dict | list):
            if depth >= _MOST_NESTED:
                yield f"{'.'.join(place.split('.')[:2])} is nested more than {_MOST_NESTED} levels deep"
                return
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, str) and _SURROGATE.search(key):
                    yield f"the key {key!r} holds half a character (a lone surrogate)"
                waiting.append((f"{place}.{key}" if place else str(key)[:200], part, depth + 1))
        elif isinstance(value, int) and (isinstance(value, Huge) or abs(value) >= 10**MOST_DIGITS):
            digits = int(value) if isinstance(value, Huge) else int(value.bit_length() * 0.30103) + 1
            yield f"{place} is a whole number of {digits:,} digits, but at most {MOST_DIGITS} are read"
        elif isinstance(value, str) and not nul and "\0" in value:
            yield f"{place} = {value!r} holds the character NUL"
        elif isinstance(value, str) and _SURROGATE.search(value):
            yield f"{place} = {value!r} holds half a character (a lone surrogate)"
