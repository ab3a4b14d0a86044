"""Data out of files of others, checked for values that programs read differently or cannot pass on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MOST_DIGITS = 100
"""Of a whole number; ``float`` holds 308, and Python prints 4,300."""
LARGEST = 2**63 - 1
"""Of the whole numbers that programs compute with: what 64 bits hold."""
_NO_LIMIT = "model_max_length"
"""The last part of keys that hold 10**30 where a tokenizer has no limit; nobody computes with them."""
_MOST_NESTED, _MOST_VALUES = 64, 2_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")


class Huge(int):
    """A whole number that was not read: its value is the number of its digits."""


def whole(digits: str) -> int:
    """Read a whole number; one of more than `MOST_DIGITS` becomes `Huge`, which `oddities` names."""
    return int(digits) if len(digits) <= MOST_DIGITS else Huge(len(digits.lstrip("-")))


def beyond(data: Any, place: str = "") -> str | None:
    """Return a phrase for the first whole number, at any level, that 64 bits cannot hold: no tensor program computes with it.

    Args:
        data: Plain data without `oddities`.
        place: The key that it stands under.
    """
    if isinstance(data, dict | list):
        parts = data.items() if isinstance(data, dict) else enumerate(data)
        return next(filter(None, (beyond(part, f"{place}.{key}".lstrip(".")) for key, part in parts)), None)
    if not isinstance(data, int) or abs(data) <= LARGEST or place.endswith(_NO_LIMIT):
        return None
    return f"{place} = {data}, but a whole number must lie between -2**63 and 2**63"


def oddities(data: Any, most_values: int = _MOST_VALUES, *, nul: bool = True) -> Iterator[str]:
    """Yield a sentence for each value that cannot be passed on; the first one is the message for the user.

    These are lone surrogates, whole numbers of more than 100 digits, more than 64 levels, and (where one part stands in
    many places, as YAML allows) too many values.

    Args:
        data: Plain data.
        most_values: How many values may be visited.
        nul: Whether text may hold the character NUL, which no path can.
    """
    waiting: list[tuple[str, Any, int]] = [("", data, 0)]  # not recursive: the depth is what is looked for
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
