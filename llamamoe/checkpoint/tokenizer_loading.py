"""Opening a tokenizer as transformers opens it, from a checked copy of its files."""

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
"""How a file of tiktoken begins; else ``tokenizer.model`` is one of SentencePiece."""


@contextmanager
def one_error(what: str, folder: Path | None = None, by: str = "transformers") -> Iterator[None]:
    """Report whatever a library raises over files of others, panics of Rust included, as one error.

    Args:
        what: The file or model that it cannot load.
        folder: Where a tokenizer lies, to find out whether only a package is missing.
        by: The library.

    Raises:
        CheckpointError: Names all three.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics are no Exception at all
        lacking = _lacking(folder) if folder else []
        if lacking:  # transformers tries one reader after another, and tells what the last of them lacks
            raise CheckpointError(
                f"{what} cannot be loaded by {by}: tokenizer.model needs {' and '.join(lacking)}, not installed here.",
                hint=f"pip install {' '.join(lacking)}, or save it once with a tokenizer.json beside the others.",
            ) from None
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{what} cannot be loaded by {by}: {type(error).__name__}: {text[:300]}",
            hint="Mend the file, or copy it again from where the model comes from.",
        ) from None


def _lacking(folder: Path) -> list[str]:
    """The packages without which transformers cannot read a vocabulary that stands in ``tokenizer.model`` alone."""
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
    """The tokenizer of a folder with a ``config.json``, as transformers opens it; no code of the folder is run.

    Args:
        folder: Where its files lie.
        what: Its name in an error.

    Raises:
        CheckpointError: transformers cannot load it, or Git LFS left pointers in the place of its files.
    """
    refuse_pointers(folder / name for name in ("config.json", *SIDE_FILES))
    with one_error(what or f"the tokenizer of '{folder}'", folder), quiet_transformers():
        tokenizer = open_tokenizer(folder)
        tokenizer("a")
        return of_any_length(tokenizer)


def of_any_length(tokenizer: Any) -> Any:
    """Keep transformers from remarking that a text is longer than the model's positions: texts are cut later."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


@contextmanager
def staged(checkpoint: Checkpoint) -> Iterator[Path]:
    """A copy of the checkpoint's small files: only those that were checked can be read, and none is a link or a pipe."""
    with tempfile.TemporaryDirectory(prefix="llamamoe-") as name:
        folder = Path(name)
        with unsynced():
            checkpoint.save_tokenizer(folder)
            write_text(folder / "config.json", json.dumps(dict(checkpoint.config)))
        yield folder


def parent_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer of a folder or a GGUF file as transformers opens it; None if there is none.

    Raises:
        CheckpointError: There is one, but transformers cannot load it.
    """
    with staged(checkpoint) as folder:
        if not holds_vocabulary(folder):
            return None
        return load(folder, f"the tokenizer of '{checkpoint.path}'")


def holds_vocabulary(folder: Path) -> bool:
    """Whether transformers finds a vocabulary there."""
    return any((folder / name).is_file() for name in VOCABULARIES)
