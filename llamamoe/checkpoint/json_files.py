"""Read JSON objects from untrusted files, checked for values that parsers read differently or cannot write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .paths import refuse_pointer
from .plain_values import beyond, oddities, whole

MOST_BYTES = 256 * 2**20
"""Maximum size read: a tokenizer's largest file has about 40 MB, the index of a large model 10."""
_HINT = "Download the file again, or correct it."


def read_json(path: Path, *, vocabulary: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        vocabulary: Whether it belongs to a tokenizer, so that it may be large and repeat a key: only its form is
            checked.

    Raises:
        CheckpointError: The file cannot be read, is too large, is a Git LFS pointer or not a JSON object, or holds a
            key twice, half a character (a lone surrogate), a whole number of more than 100 digits (in ``config.json``
            of more than 64 bits) or more than 64 levels; the message names the key.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path.name} has {path.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read.")
        raw = path.read_bytes()
        refuse_pointer(path, raw)
        data = _parse(raw.decode("utf-8"), vocabulary=vocabulary)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}.") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({error}).", hint=_HINT) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, not {type(data).__name__}.", hint=_HINT)
    wrong = None if vocabulary else next(oddities(data), None)
    if wrong is None and path.name == "config.json":
        wrong = beyond(data)
    if wrong is not None:
        raise CheckpointError(f"{path.name}: {wrong}.", hint=_HINT)
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from pairs; a duplicate key is an error, because parsers differ in which one they take.

    Raises:
        ValueError: A key is duplicated; the message names it.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the name {next(key for key in names if names.count(key) > 1)!r} appears twice")
    return found


def _parse(text: str, *, vocabulary: bool) -> Any:
    if vocabulary:
        return json.loads(text)
    return json.loads(text, object_pairs_hook=unique_keys, parse_int=whole)
