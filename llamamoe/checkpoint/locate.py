"""Locate a source: a local folder, a GGUF file, or the hub. A local path never causes network access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError, UsageError, printable
from .base import Checkpoint
from .hub import HUB_ID, download, headers_only
from .ledger import refuse_unfinished
from .out_folder import TRAINED
from .paths import windows_hint

_FORMS = "Give a folder, a .gguf file, a Hub id (org/name) or hf://org/name@revision."
_MOST_BESIDE = 1000


@dataclass(frozen=True)
class Location:
    """The location of a source on disk.

    Attributes:
        path: Folder or GGUF file.
        name: Its name: the hub id, or the name of the folder or file (never its path on this machine). It is
            written into cards, configurations and receipts, so unprintable characters are escaped.
        revision: The resolved commit of a hub download, else None.
    """

    path: Path
    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))


def name_with_run(path: Path, name: str) -> str:
    """Return a model's name; that of a trained model, which is in RUN/model, with the name of RUN before it."""
    return f"{printable(path.resolve().parent.name)}/{name}" if name == TRAINED else name


def is_hub_id(text: str) -> bool:
    """Return whether a text can only be a hub id: ``hf://...``, or ``org/name`` that is not spelled as a path."""
    return text.startswith("hf://") or bool(
        "/" in text and not text.startswith((".", "/", "~")) and HUB_ID.fullmatch(text)
    )


def locate(source: str | Path) -> Location:
    """Find a source: an existing path first, then ``hf://org/name@revision``, then ``org/name``.

    A checkpoint on the hub is downloaded, weights included; files in the cache are not downloaded again and are found
    without a network.

    Raises:
        CheckpointError: The source is neither, the hub does not have it, or its content on the hub is refused.
        LlamaMoeError: The hub cannot be reached, or the download failed.
    """
    return _locate(source, download)


@contextmanager
def locate_headers(source: str | Path) -> Iterator[Location]:
    """Find a source as `locate` does, for reading headers: of a checkpoint on the hub no weights are downloaded.

    Its folder then holds the small files and, if the cache does not have the weights, files with their headers and no
    data, and is deleted afterwards.

    Raises:
        CheckpointError, LlamaMoeError: See `locate`.
    """
    with ExitStack() as stack:
        yield _locate(source, lambda text, near: headers_only(text, near, stack))


def _locate(source: str | Path, fetch: Callable[[str, Callable[[], str]], Path]) -> Location:
    text = str(source)
    if not text.strip():
        raise CheckpointError("the source is empty.", hint=_FORMS)
    if text.startswith("hf://"):
        text = text.removeprefix("hf://")
        if not HUB_ID.fullmatch(text):
            raise CheckpointError(f"{text!r} is not a Hub id.", hint=_FORMS)
    else:
        path = Path(text).expanduser()
        if path.exists():
            refuse_unfinished(path)
            return Location(path, path.resolve().name)
        if not is_hub_id(text):
            hint = (windows_hint(text) or _near(path)) + _FORMS
            where = "" if "/" in text or "\\" in text else " in the current folder"
            raise CheckpointError(f"{text!r} does not exist{where}.", hint=hint)
    commit = fetch(text, lambda: _near(Path(text)))
    return Location(commit, text.partition("@")[0], commit.name)


def _near(path: Path) -> str:
    """Return a sentence with the checkpoints that have names like a missing path's, or nothing."""
    try:
        beside = [each for each in islice(_near_folder(path).iterdir(), _MOST_BESIDE) if _may_be_source(each)]
    except OSError:
        return ""
    names = {each.name: str(each) for each in beside}
    close = get_close_matches(path.name, names, n=3)
    return f"Did you mean {' or '.join(repr(names[name]) for name in close)}? " if close else ""


def _near_folder(path: Path) -> Path:
    """Return the folder of a path, or if it does not exist the one beside it with the most similar name."""
    folder = path.parent
    if folder.is_dir():
        return folder
    beside = [each.name for each in islice(folder.parent.iterdir(), _MOST_BESIDE) if each.is_dir()]
    return folder.with_name(next(iter(get_close_matches(folder.name, beside, n=1)), folder.name))


def _may_be_source(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def locate_folder(source: str | Path) -> Location:
    """Find a converted checkpoint, which is always a folder; see `locate`.

    Raises:
        CheckpointError: See `locate` and `check_folder`.
    """
    location = locate(source)
    check_folder(location.path)
    return location


def check_folder(path: Path) -> None:
    """Refuse a path on this machine that is not a folder.

    Raises:
        CheckpointError: The path does not exist or is a file; for a GGUF file the message names a way to convert it to
            a folder.
    """
    if path.is_dir():
        return
    if not path.exists():
        raise CheckpointError(
            f"'{path}' does not exist.", hint=f"{windows_hint(path)}Give the folder that holds config.json."
        )
    hint = "Give the folder that holds config.json."
    if path.suffix == ".gguf":
        made = f"export_dense({str(path)!r}, 'FOLDER', dtype='F32')"
        hint = (
            f"Give the folder that the GGUF file was exported from. A dense model is converted by: llamamoe split {path} OUT\n"
            f'  Or by this to a plain folder: python -c "from llamamoe.checkpoint.gguf.reader import export_dense; {made}"'
        )
    raise CheckpointError(f"'{path}' is a file, but a folder with config.json and safetensors is needed.", hint=hint)


def open_parent(path: Path, child: Path) -> Checkpoint:
    """Open the dense parent of a converted checkpoint; headers only.

    Args:
        path: The parent's folder or GGUF file.
        child: The folder of the converted checkpoint.

    Raises:
        CheckpointError: See `open_checkpoint`.
    """
    return open_checkpoint(Location(path, path.name), tokenizer=parent_vocabulary(path, child))


def parent_vocabulary(path: Path, child: Path) -> Path | None:
    """Return the tokenizer folder for a GGUF parent: ``child``, which has the tokenizer given to the conversion.

    The tokenizer in the file may be one that cannot be rebuilt. A folder has its own.
    """
    from .tokenizer_loading import holds_vocabulary

    return child if path.is_file() and holds_vocabulary(child) else None


def open_checkpoint(
    location: Location, *, tokenizer: str | Path | None = None, weights_only: bool = False
) -> Checkpoint:
    """Open a folder of safetensors or a GGUF file; headers only.

    Args:
        location: Location of the source.
        tokenizer: For a GGUF file, a folder whose tokenizer files replace the vocabulary in the file.
        weights_only: Also accept a GGUF file whose tokenizer cannot be used.

    Raises:
        UsageError: ``tokenizer`` is given for a folder, which has its own.
        CheckpointError: See `llamamoe.checkpoint.reader` and `llamamoe.checkpoint.gguf.reader`.
    """
    if location.path.is_dir():
        if tokenizer is not None:
            raise UsageError("--tokenizer is for GGUF files: a folder has its own tokenizer, which is copied.")
        from .reader import SafetensorsCheckpoint

        return SafetensorsCheckpoint(location.path)
    if location.path.suffix == ".gguf":
        from .gguf.reader import GgufCheckpoint

        return GgufCheckpoint(location.path, tokenizer=tokenizer, weights_only=weights_only)
    raise CheckpointError(
        f"{location.path} is neither a folder nor a .gguf file.", hint="Give the folder that holds config.json."
    )
