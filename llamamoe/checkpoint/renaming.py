"""Rename tensors of a folder in place to transformers' names: headers change, data do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import RefusedError
from .files import replacing, write_text
from .headers import read_header
from .layout import index_json, shard_header
from .out_folder import free_bytes, system_errors
from .reader import INDEX, SafetensorsCheckpoint

_CHUNK = 16 * 2**20
Entries = dict[str, tuple[str, tuple[int, ...], int]]
"""Tensor name to dtype, shape and bytes, in the order of the file."""


def unusual_files(checkpoint: SafetensorsCheckpoint) -> dict[Path, Entries]:
    """Find the files with tensors under other names than transformers 4.57 and 5 both read.

    Args:
        checkpoint: The opened folder, which lists tensors by their usual names.

    Returns:
        Such files with the usual names, in the order of the data.
    """
    return {
        file: tensors for file, tensors in _by_file(checkpoint).items() if read_header(file).keys() != tensors.keys()
    }


def rename_tensors(checkpoint: SafetensorsCheckpoint, files: dict[Path, Entries]) -> None:
    """Give the tensors their usual names. Each file is replaced whole; a repeat after a kill finishes the work.

    Args:
        checkpoint: The opened folder.
        files: The result of `unusual_files`.

    Raises:
        RefusedError: The disk has too little room for a second copy of the largest of the files; nothing was changed.
        LlamaMoeError: Writing failed, or the folder has changed meanwhile.
    """
    need, have = max(file.stat().st_size for file in files), free_bytes(checkpoint.path, resume=False)
    if have < need:
        raise RefusedError(
            f"renaming needs room for a copy of one file, {need / 1e9:.2f} GB, but the disk of {checkpoint.path} has "
            f"{have / 1e9:.2f} GB free.",
            hint="Free some space, or copy the folder to another disk first.",
        )
    checkpoint.check_unchanged()
    with system_errors(checkpoint.path):
        if (checkpoint.path / INDEX).exists():  # written first: it is valid with either names
            shards = {file.name: tensors for file, tensors in _by_file(checkpoint).items()}
            text = json.dumps(index_json(shards), indent=2, sort_keys=True) + "\n"
            write_text(checkpoint.path / INDEX, text)
        for file, tensors in files.items():
            header, _ = shard_header(tensors)
            with file.open("rb") as old, replacing(file) as new:
                old.seek(8 + int.from_bytes(old.read(8), "little"))
                new.write(header)
                shutil.copyfileobj(old, new, _CHUNK)


def _by_file(checkpoint: SafetensorsCheckpoint) -> dict[Path, Entries]:
    """Return all files, sorted, with their tensors in the order of the data."""
    found: dict[Path, Entries] = {}
    for name, info in sorted(
        checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].offset, item[1].nbytes)
    ):
        found.setdefault(info.file, {})[name] = (info.dtype, info.shape, info.nbytes)
    return found
