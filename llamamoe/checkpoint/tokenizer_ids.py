"""Find ids of a folder's tokenizer without a row in the embedding, from the files alone.

A token that was added to a tokenizer and not to the embedding (a padding token, most often) is an index out of range on
the first text that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import read_json

MOST_IDS = 2**24
"""The largest known vocabulary has 262,144 tokens; tokenizers allocates memory for every id up to the largest."""
_SPECIAL = ("bos", "eos", "pad", "unk")


def beyond_embedding(
    folder: Path,
    rows: int,
    config: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
) -> list[str]:
    """List ids without a row in the embedding: the tokenizer's largest ids, and special tokens by their keys.

    Neither torch nor transformers is used.

    Args:
        folder: The tokenizer's folder; missing files are ignored.
        rows: Rows of the embedding.
        config: The model's configuration.
        vocabulary: Content of ``tokenizer.json``; None: it is read.

    Raises:
        CheckpointError: A file is broken.
    """
    if vocabulary is None:
        vocabulary = _optional(folder / "tokenizer.json", vocabulary=True)
    ids = _vocabulary(vocabulary)
    found = []
    size = 1 + max(ids.values(), default=-1)
    if size > rows:
        found.append(f"the tokenizer has {size:,} tokens, but the embedding has {rows:,} rows: some ids have none")
    special = [*_of_keys("config.json", config or {})]
    special += _of_keys("generation_config.json", _optional(folder / "generation_config.json"))
    special += _named("tokenizer_config.json", _optional(folder / "tokenizer_config.json"), ids)
    wrong = [f"{where} = {index:,}" for where, index in special if index >= rows]
    if wrong:
        found.append(f"special tokens have no row in the embedding, which has {rows:,}: {', '.join(wrong)}")
    return found


def check_ids(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse a vocabulary with an id that no embedding could have.

    Args:
        path: A ``tokenizer.json`` or ``vocab.json``.
        data: Its content.

    Raises:
        CheckpointError: An id is too large; the message names token and id.
    """
    ids = _vocabulary(data if path.name == "tokenizer.json" else {"model": {"vocab": data}})
    token, largest = max(ids.items(), key=lambda item: item[1], default=("", 0))
    if largest >= MOST_IDS:
        raise CheckpointError(
            f"{path.name}: the token {token[:60]!r} has the id {largest}, but it must be below {MOST_IDS:,}.",
            hint="Download the file again, or correct it.",
        )


def folder_vocabulary(folder: Path) -> dict[str, int]:
    """Return token to id from a folder's ``tokenizer.json``, added tokens included; empty if there is no such file.

    Raises:
        CheckpointError: The file is broken.
    """
    return _vocabulary(_optional(folder / "tokenizer.json", vocabulary=True))


def _optional(path: Path, *, vocabulary: bool = False) -> dict[str, Any]:
    return read_json(path, vocabulary=vocabulary) if path.is_file() else {}


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """Return token to id from a ``tokenizer.json``; malformed parts are skipped."""
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    ids: dict[str, int] = {}
    if isinstance(vocab, Mapping):
        ids = {token: index for token, index in vocab.items() if isinstance(index, int)}
    elif isinstance(vocab, list):  # Unigram: pairs of token and score
        ids = {str(row[0]): index for index, row in enumerate(vocab) if isinstance(row, list) and row}
    added = data.get("added_tokens")
    for each in added if isinstance(added, list) else []:
        if isinstance(each, Mapping) and isinstance(each.get("id"), int):
            ids[str(each.get("content"))] = each["id"]
    return ids


def _of_keys(file: str, data: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the place and id of special tokens that are named by id."""
    for key in (f"{name}_token_id" for name in _SPECIAL):
        value = data.get(key)
        yield from (
            (f"{key} in {file}", each)
            for each in (value if isinstance(value, list) else [value])
            if isinstance(each, int)
        )


def _named(file: str, data: Mapping[str, Any], ids: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield the place and id of special tokens that are named by text."""
    for key in (f"{name}_token" for name in _SPECIAL):
        token = data.get(key)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text in ids:
            yield f"{key} ({text}) in {file}", ids[text]
