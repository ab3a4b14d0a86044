"""``llamamoe.fix_config``: repair a folder that transformers 5 wrote, so that 4.57 computes the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.config_compat import missing_keys, only_five
from ..architectures.sources import SOURCES
from ..architectures.targets import TARGETS
from ..checkpoint.files import write_text
from ..checkpoint.json_files import read_json
from ..checkpoint.locate import check_folder
from ..checkpoint.paths import inside
from ..checkpoint.reader import INDEX, SINGLE, SafetensorsCheckpoint, check_side_files
from ..checkpoint.renaming import rename_tensors, unusual_files
from ..checkpoint.tokenizer import older_config
from ..errors import CheckpointError, RefusedError, known_names
from ..models.loadable import check_counts, check_loads_with, check_model


@dataclass(frozen=True)
class Fixes:
    """The changes of `fix_config`.

    Attributes:
        added: One line per key that ``config.json`` lacked (``key: value``).
        renamed: Files of weights whose tensors had other names, with their number of tensors.
        tokenizer: Whether ``tokenizer_config.json`` named a class, or special tokens, in a way that 4.57 refuses.
    """

    added: list[str]
    renamed: dict[str, int]
    tokenizer: bool = False


def fix_config(path: str | Path, *, dry_run: bool = False) -> Fixes:
    """Make a folder readable for transformers 4.57; transformers 5 loads the same model as before.

    Keys are added to ``config.json``; files whose tensors have names that only transformers 5 reads are rewritten
    with the same data, and so is a ``tokenizer_config.json`` that 4.57 refuses. A second call changes nothing.
    Every file is replaced whole, ``config.json`` last.

    Args:
        path: A folder that ``save_pretrained``, the Trainer or mergekit wrote.
        dry_run: Only return what would be changed.

    Raises:
        CheckpointError: The path is not a readable checkpoint folder.
        RefusedError: The architecture is not supported, 4.57 cannot compute it, or the disk has too little room.
    """
    folder = Path(path).expanduser()
    check_folder(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json.", hint="Give the folder that save_pretrained or the Trainer wrote."
        )
    config = read_json(inside(folder, "config.json"))
    check_side_files(folder)
    _check_known(config)
    there = (folder / INDEX).exists() or (folder / SINGLE).exists()
    checkpoint = SafetensorsCheckpoint(folder) if there else None
    added = _missing_checked(folder, config, checkpoint)
    tokenizer = older_config(folder)
    renamed: dict[str, int] = {}
    if checkpoint is not None:
        files = unusual_files(checkpoint)
        renamed = {file.name: len(tensors) for file, tensors in files.items()}
        if files and not dry_run:
            rename_tensors(checkpoint, files)
    if tokenizer is not None and not dry_run:
        write_text(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")
    if added and not dry_run:
        write_text(folder / "config.json", json.dumps(config | added, indent=2, ensure_ascii=False) + "\n")
    return Fixes([f"{key}: {json.dumps(value)}" for key, value in added.items()], renamed, tokenizer is not None)


def _missing_checked(
    folder: Path, config: Mapping[str, Any], checkpoint: SafetensorsCheckpoint | None
) -> dict[str, Any]:
    """Return the keys to add, after checking that transformers loads the folder without and with them."""
    tensors = None if checkpoint is None else checkpoint.tensors
    check_counts(config, tensors)
    check_loads_with(folder, config)
    added = missing_keys(config)
    if added:
        check_loads_with(folder, {**config, **added})
    if tensors is not None:
        check_model({**config, **added}, {name: info.shape for name, info in tensors.items()})
    return added


def _check_known(config: Mapping[str, Any]) -> None:
    name, known = config.get("model_type"), sorted({*SOURCES.names(), *TARGETS.names()})
    if name not in known:
        raise RefusedError(
            f"config.json: model_type {name!r} is not one whose two spellings are known.",
            hint=known_names(known),
        )
    if only_five(str(name)):
        raise RefusedError(f"config.json: transformers 4.57 does not have the architecture {name}: no spelling helps.")
