"""Locate a source: a local folder, a GGUF file, or the hub. A local path never causes network access."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from difflib import get_close_matches
from glob import escape
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError, LlamaMoeError, UsageError, printable
from ..lazy import huggingface_hub
from .base import Checkpoint
from .ledger import refuse_unfinished
from .paths import BACKSLASHES
from .reader import (
    ADAPTER,
    CHAT_TEMPLATES,
    INDEX,
    LICENSE_FILES,
    PICKLES,
    PROCESSOR_FILES,
    SIDE_FILES,
    SINGLE,
    pickle_refusal,
    read_weight_map,
)

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[\w.-]+(@[\w./-]+)?")
_SMALL = [
    "config.json",
    ADAPTER,
    INDEX,
    *SIDE_FILES,
    *PROCESSOR_FILES,
    f"{CHAT_TEMPLATES}/*.jinja",
    *LICENSE_FILES,
    "README.md",
    "llamamoe_*.json",
]
_FORMS = "Give a folder, a .gguf file, a Hub id (org/name) or hf://org/name@revision."
_MOST_BESIDE = 1000
LOGIN = "log in with: hf auth login (or set HF_TOKEN)"


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


def is_hub_id(text: str) -> bool:
    """Return whether a text can only be a hub id: ``hf://...``, or ``org/name`` that is not spelled as a path."""
    return text.startswith("hf://") or bool(
        "/" in text and not text.startswith((".", "/", "~")) and _HUB_ID.fullmatch(text)
    )


def locate(source: str | Path) -> Location:
    """Find a source: an existing path first, then ``hf://org/name@revision``, then ``org/name``.

    A checkpoint on the hub is downloaded, weights included, even if only its plan is needed; files in the cache
    are not downloaded again and are found without a network.

    Raises:
        CheckpointError: The source is neither, the hub does not have it, or its content on the hub is refused.
        LlamaMoeError: The hub cannot be reached, or the download failed.
    """
    text = str(source)
    if not text.strip():
        raise CheckpointError("the source is empty.", hint=_FORMS)
    if text.startswith("hf://"):
        text = text.removeprefix("hf://")
        if not _HUB_ID.fullmatch(text):
            raise CheckpointError(f"{text!r} is not a Hub id.", hint=_FORMS)
        return _download(text)
    path = Path(text).expanduser()
    if path.exists():
        refuse_unfinished(path)
        return Location(path, path.resolve().name)
    if not is_hub_id(text):
        hint = f"{BACKSLASHES} {_FORMS}" if "\\" in text else _near(path) + _FORMS
        where = "" if "/" in text or "\\" in text else " in the current folder"
        raise CheckpointError(f"{text!r} does not exist{where}.", hint=hint)
    return _download(text)


def _near(path: Path) -> str:
    """Return a sentence with the checkpoints beside a missing path that have similar names, or nothing."""
    try:
        beside = [each for each in islice(path.parent.iterdir(), _MOST_BESIDE) if _may_be_source(each)]
    except OSError:
        return ""
    names = {each.name: str(each) for each in beside}
    close = get_close_matches(path.name, names, n=3)
    return f"Did you mean {' or '.join(repr(names[name]) for name in close)}? " if close else ""


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
        raise CheckpointError(f"'{path}' does not exist.", hint="Give the folder that holds config.json.")
    hint = "Give the folder that holds config.json."
    if path.suffix == ".gguf":
        made = f"export_dense({str(path)!r}, 'FOLDER', dtype='F32')"
        hint = (
            f"A GGUF file is read as a dense model. Convert it first: llamamoe split {path} OUT\n"
            f'  Or convert it to a plain folder: python -c "from llamamoe.checkpoint.gguf.reader import export_dense; {made}"'
        )
    raise CheckpointError(f"'{path}' is a file, but a folder with config.json and safetensors is needed.", hint=hint)


def _download(text: str) -> Location:
    name, _, revision = text.partition("@")
    try:
        path = _fetch(name, revision or None)
    except LlamaMoeError:
        raise
    except huggingface_hub.errors.HFValidationError as error:
        raise CheckpointError(f"{text!r} is not a Hub id: {error}") from None
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise _unreachable(text, name) from None
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise _denied(text, name, error) from None
    except Exception as error:  # versions of the hub's library differ in the transport errors that they let through
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise LlamaMoeError(
            f"downloading {text!r} failed: {type(error).__name__}: {error}",
            hint="Free some space, or set HF_HOME to a folder on another disk."
            if full
            else "Try again: files that are complete are not downloaded twice.",
        ) from error
    return Location(path, name, path.name)


def _unreachable(text: str, name: str) -> LlamaMoeError:
    """Return the error for a checkpoint that is neither here nor in the cache, while nothing can be downloaded."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE=1 forbids downloads" if offline else "the Hub cannot be reached"
    way = "Unset HF_HUB_OFFLINE" if offline else "Check the network connection"
    return LlamaMoeError(
        f"{text!r} is neither a local folder nor in the local Hub cache, and {why}.",
        hint=f"{_near(Path(text))}{way}, or download it on another machine (hf download {name} --local-dir FOLDER) and give its folder.",
    )


def _denied(text: str, name: str, error: huggingface_hub.errors.HfHubHTTPError) -> CheckpointError:
    """Return the error for an answer of the Hub that is a refusal, with what the user can do about it."""
    kinds = huggingface_hub.errors
    if isinstance(error, kinds.GatedRepoError):
        page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
        return CheckpointError(
            f"{text!r} is gated: only accounts that accepted its terms may download it.",
            hint=f"Accept the terms on {page}, then {LOGIN}.",
        )
    if isinstance(error, kinds.RevisionNotFoundError):
        return CheckpointError(
            f"{text!r}: the repository on the Hub has no such revision.",
            hint="Give a branch, tag or commit, or leave @revision out for the main branch.",
        )
    if isinstance(error, kinds.RepositoryNotFoundError):
        return CheckpointError(
            f"{text!r} is neither a local folder nor a repository on the Hub that you can access.",
            hint=f"Check the spelling; for a private repository, {LOGIN}.",
        )
    return CheckpointError(
        f"the Hub refuses {text!r}: {error}",
        hint=f"Check the name and the revision; for a private repository, {LOGIN}.",
    )


def _fetch(name: str, revision: str | None) -> Path:
    """Download a commit into the hub's cache (small files first, then the weights in the index); return its folder."""
    listed = _listing(name, revision)
    offline = listed is None
    if listed is not None:
        _check_listing(name, listed[1])
    # Requested by revision, not by commit, so that the cache stores the name and can resolve it offline.
    path = Path(
        huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_SMALL, local_files_only=offline)
    )
    commit = path.name
    if listed is not None and commit != listed[0]:
        raise LlamaMoeError(f"{name} changed on the Hub while it was read.", hint="Run the command again.")
    shards = [SINGLE]
    single = (path / SINGLE).exists() if listed is None else SINGLE in listed[1]
    if not single and (path / INDEX).exists():  # the single file before the index, as transformers does
        shards = sorted({file for file in read_weight_map(path / INDEX).values() if Path(file).name == file})
    if listed is not None and not listed[1].issuperset(shards):
        missing = min(set(shards) - listed[1])
        raise CheckpointError(f"{name}: {printable(missing)}, which {INDEX} names, is not on the Hub.")
    patterns = [escape(file) for file in shards]
    huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=patterns, local_files_only=offline)
    return path


def _listing(name: str, revision: str | None) -> tuple[str, frozenset[str]] | None:
    """Return the commit and its files; None if the hub cannot be reached, so that only the cache is left."""
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision)
    except huggingface_hub.errors.HFValidationError:
        raise
    except huggingface_hub.errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 500)
        if status < 500 and status != 429:
            raise
        return None
    except Exception:  # no network, offline mode: versions of the hub's library differ in their errors
        return None
    return str(info.sha), frozenset(file.rfilename for file in info.siblings or ())


def _check_listing(name: str, files: frozenset[str]) -> None:
    """Refuse a commit by the names of its files, before anything is downloaded."""
    held = ", ".join(printable(file) for file in sorted(files)[:6]) or "nothing"
    hint = f"It holds: {held}."
    if any(file.endswith(".gguf") for file in files):
        hint = "To convert a GGUF file, download it and give its path."
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise pickle_refusal(name, pickles[0])
    if ADAPTER in files:
        raise CheckpointError(
            f"{name} contains a PEFT adapter ({ADAPTER}): transformers would apply it, but only a model can be read.",
            hint="Merge it first: AutoPeftModelForCausalLM.from_pretrained(ID).merge_and_unload().save_pretrained(NEW)",
        )
    if "config.json" not in files:
        raise CheckpointError(f"{name} holds no config.json, so it is not a transformers checkpoint.", hint=hint)
    if not files & {SINGLE, INDEX}:
        raise CheckpointError(f"{name} holds neither {SINGLE} nor {INDEX}.", hint=hint)


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
