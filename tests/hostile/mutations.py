"""Seeded damage to data, text and bytes: what people's tools, disks and bad intentions make of files."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP: list[Any] = []
for _ in range(50):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**9, 2**31, 2**63, -(2**63), 10**30, 10**99, 0.0, 0.5, 1.0, -1.0, 1e-30,
    1e300, float("nan"), float("inf"), float("-inf"), "", "x", "1", "\x1b[31m", "a\u202eb", "\0", "x" * 10_000, "silu",
    "gelu", "float16", "none", "auto", "../x", "/etc/passwd", [], [1], [[]], ["x"], [None], [0] * 1000, {}, {"a": 1},
    {"a": {"b": []}}, {"name": "x"}, {"": None}, DEEP, "\ud800", 10**400,
)  # fmt: skip
TEXTS = (
    "",
    "null",
    "[]",
    "{",
    "\x00",
    "\ufeff{}",
    "[" * 5000,
    '{"a": 1' + "0" * 6000 + "}",
    '{"a": 1, "a": 2}',
    "\n" * 9,
)
Damage = tuple[Any, str]
"""The mutated content, and a description of the mutation."""


def places(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in plain data; of long lists and mappings only the first parts."""
    if isinstance(data, dict):
        parts = list(data.items())
    elif isinstance(data, list):
        parts = list(enumerate(data))
    else:
        return []
    found = []
    for key, value in parts[:200]:
        found += [(*prefix, key), *places(value, (*prefix, key))]
    return found


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        data = data[key]
    return data


def _value(rng: random.Random) -> Any:
    """One of `VALUES`, as a copy: a later change must reach neither the others nor itself."""
    return copy.deepcopy(rng.choice(VALUES))


def _other(value: Any, rng: random.Random) -> Any:
    """A near relative of a value: another type or size that says the same, or nearly."""
    choices: list[Any] = [str(value), [value], {"a": value}, [value, value]]
    if isinstance(value, bool):
        choices += [int(value), not value]
    elif isinstance(value, int):
        choices += [value + 1, value - 1, -value, value * 2, value // 2, str(value)]
        choices += [float(value), value + 0.5] if abs(value) < 2**53 else []
    elif isinstance(value, float):
        choices += [-value, value * 1e6, int(value) if abs(value) < 1e9 else 0, value + 1]
    elif isinstance(value, str):
        choices += [
            value + " ",
            value.upper(),
            value[:-1],
            value + "\x00",
            value.encode("utf-8", "surrogatepass").hex(),
        ]
    elif isinstance(value, list):
        choices += [value[:-1], value + value[:1], value[::-1], [_value(rng)]]
    return rng.choice(choices)


def damaged(data: Any, rng: random.Random, keys: tuple[str, ...] = ()) -> Damage:
    """Change plain data in one to three places.

    Args:
        data: Left alone.
        rng: Decides.
        keys: Names that may be added at the top.
    """
    data, done = copy.deepcopy(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(data)
        if not found or (keys and rng.random() < 0.1):
            key, value = rng.choice(keys or ("x",)), _value(rng)
            if isinstance(data, dict):
                data[key] = value
            done.append(f"add {key} = {value!r:.60}")
            continue
        path = rng.choice(found)
        inner, key, how = at(data, path[:-1]), path[-1], rng.random()
        name = ".".join(map(str, path))
        if how < 0.15:
            del inner[key]
            done.append(f"delete {name}")
        else:
            inner[key] = _value(rng) if how < 0.6 else copy.deepcopy(_other(inner[key], rng))
            done.append(f"{name} = {inner[key]!r:.60}")
    return data, "; ".join(done)


def damaged_bytes(content: bytes, rng: random.Random, within: int | None = None) -> tuple[bytes, str]:
    """Flip, cut, overwrite or repeat bytes, most often among the first ``within``."""
    end = min(len(content), within or len(content))
    place = rng.randrange(end) if end else 0
    how = rng.choice(("flip", "flip", "cut", "overwrite", "insert", "zero", "extend"))
    if how == "flip":
        changed = bytearray(content)
        if changed:
            changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed), f"flip a bit of byte {place}"
    if how == "cut":
        return content[:place], f"cut at {place}"
    if how == "extend":
        return content + rng.randbytes(16), "add 16 bytes"
    fill = bytes(8) if how == "zero" else rng.choice((rng.randbytes(8), b"\xff" * 8))
    skipped = 0 if how == "insert" else 8
    return content[:place] + fill + content[place + skipped :], f"{how} 8 bytes at {place}"


def damaged_json(text: str, rng: random.Random, keys: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """A JSON file: most often still JSON."""
    how = rng.random()
    if how < 0.85:
        data, done = damaged(json.loads(text), rng, keys)
        return json.dumps(data).encode(), done
    if how < 0.92:
        content = rng.choice(TEXTS)
        return content.encode("utf-8", "surrogatepass"), f"the text {content[:30]!r}"
    return damaged_bytes(text.encode(), rng)
