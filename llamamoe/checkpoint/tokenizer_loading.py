"""Open a tokenizer as transformers does, from a checked copy of its files."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .base import Checkpoint
from .files import unsynced, write_text
from .infilling import open_tokenizer
from .paths import refuse_pointers
from .quiet import quiet_transformers
from .reader import SIDE_FILES, VOCABULARIES

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
"""Beginning of a tiktoken file; any other ``tokenizer.model`` is a SentencePiece file."""


@contextmanager
def one_error(what: str, folder: Path | None = None, by: str = "transformers") -> Iterator[None]:
    """Report any exception of a library about untrusted files, panics of Rust included, as one error.

    Args:
        what: The file or model that is loaded.
        folder: Folder of a tokenizer, to find out whether only a package is missing.
        by: The library.

    Raises:
        CheckpointError: The library raised; the message names library, file and exception.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics are not an Exception
        lacking = _lacking(folder) if folder else []
        if lacking:  # transformers tries one reader after another and reports what the last of them lacks
            raise CheckpointError(
                f"{what} cannot be loaded by {by}: tokenizer.model needs {' and '.join(lacking)}, not installed here.",
                hint=f"pip install {' '.join(lacking)}, or save it once with a tokenizer.json beside the others.",
            ) from None
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{what} cannot be loaded by {by}: {type(error).__name__}: {text[:300]}",
            hint="Correct the file, or copy it again from the model's origin.",
        ) from None


def _lacking(folder: Path) -> list[str]:
    """Return the packages without which transformers cannot read a vocabulary stored in ``tokenizer.model`` alone."""
    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return []
    with path.open("rb") as file:
        wanted = ("tiktoken",) if _TIKTOKEN.match(file.read(1024)) else ("sentencepiece", "protobuf")
    return [name for name in wanted if not _installed(name)]


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def load(folder: Path, what: str | None = None) -> Any:
    """Open the tokenizer of a folder with a ``config.json`` as transformers does; no code of the folder is run.

    Args:
        folder: The folder of its files.
        what: Its name in an error.

    Raises:
        CheckpointError: transformers cannot load it, or its files are Git LFS pointers.
    """
    refuse_pointers(folder / name for name in ("config.json", *SIDE_FILES))
    with one_error(what or f"the tokenizer of '{folder}'", folder), quiet_transformers():
        tokenizer = open_tokenizer(folder)
        tokenizer("a")
        return of_any_length(tokenizer)


def of_any_length(tokenizer: Any) -> Any:
    """Keep transformers from warning that a text is longer than the model's positions: texts are cut later."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


@contextmanager
def staged(checkpoint: Checkpoint) -> Iterator[Path]:
    """Copy the checkpoint's small files, so that only checked ones are read and none is a link or a pipe."""
    with tempfile.TemporaryDirectory(prefix="llamamoe-") as name:
        folder = Path(name)
        with unsynced():
            checkpoint.save_tokenizer(folder)
            config = getattr(checkpoint, "whole", checkpoint.config)  # of a text part, that of the folder
            write_text(folder / "config.json", json.dumps(dict(config)))
        yield folder


def parent_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """Open the tokenizer of a folder or a GGUF file as transformers does; None if there is none.

    Raises:
        CheckpointError: Transformers cannot load the tokenizer.
    """
    with staged(checkpoint) as folder:
        if not holds_vocabulary(folder):
            return None
        return load(folder, f"the tokenizer of '{checkpoint.path}'")


def needed_tokenizer(checkpoint: Checkpoint, missing: str, hint: str) -> Any:
    """Open the tokenizer of a checkpoint, with which text is to be read.

    Args:
        checkpoint: The checkpoint.
        missing: The message if there is none.
        hint: Its hint.

    Raises:
        CheckpointError: There is none, or transformers cannot load it.
    """
    found = parent_tokenizer(checkpoint)
    if found is None:
        raise CheckpointError(missing, hint=hint)
    return found


def holds_vocabulary(folder: Path) -> bool:
    """Return whether transformers finds a vocabulary in the folder."""
    return any((folder / name).is_file() for name in VOCABULARIES)
