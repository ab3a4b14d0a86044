"""Where a source is: a local folder, a GGUF file, or the hub. A local path never touches the network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .checkpoint.base import Checkpoint
from .errors import CheckpointError, LlamaMoeError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "chat_template*", "LICENSE*", "NOTICE*", "README.md"]


@dataclass(frozen=True)
class Location:
    """A source on disk.

    Attributes:
        path: Folder or GGUF file.
        name: What to call it: the hub id, or the name of the folder or file (never its place on this machine).
        revision: The resolved commit of a hub download, else None.
    """

    path: Path
    name: str
    revision: str | None = None


def locate(source: str | Path) -> Location:
    """Find a source: an existing path first, then ``hf://org/name@revision``, then ``org/name``.

    Raises:
        CheckpointError: It is neither, or the hub does not have it.
    """
    text = str(source)
    if not text.startswith("hf://"):
        path = Path(text).expanduser()
        if path.exists():
            return Location(path, path.resolve().name)
        if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
            raise CheckpointError(
                f"{text!r} does not exist.",
                hint="Give a folder, a .gguf file, a hub id (org/name) or hf://org/name@revision.",
            )
    return _download(text.removeprefix("hf://"))


def _download(text: str) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = text.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
    except HFValidationError as error:
        raise CheckpointError(f"{text!r} is no hub id: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise LlamaMoeError(
            f"{text!r} is no folder here, and the hub cannot be reached ({type(error).__name__}).",
            hint="Check the path, or download the checkpoint first and give its folder.",
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"the hub does not give {text!r}: {error}", hint="Check the name, the revision and your access."
        ) from None
    return Location(path, name, path.name)


def open_checkpoint(location: Location, *, tokenizer: str | Path | None = None) -> Checkpoint:
    """Open a folder of safetensors or a GGUF file; headers only.

    Args:
        location: Where it is.
        tokenizer: For a GGUF file, a folder whose tokenizer files replace the vocabulary in the file.

    Raises:
        UsageError: ``tokenizer`` is given for a folder, which brings its own.
        CheckpointError: See `llamamoe.checkpoint.reader` and `llamamoe.checkpoint.gguf`.
    """
    if location.path.is_dir():
        if tokenizer is not None:
            raise UsageError("--tokenizer is for GGUF files: a folder brings its own tokenizer, which is copied.")
        from .checkpoint.reader import SafetensorsCheckpoint

        return SafetensorsCheckpoint(location.path)
    if location.path.suffix == ".gguf":
        from .checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(location.path, tokenizer=tokenizer)
    raise CheckpointError(
        f"{location.path} is neither a folder nor a .gguf file.", hint="Give the folder that holds config.json."
    )
