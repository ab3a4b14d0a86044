"""``llamamoe.push``: upload a checkpoint to the Hub in one commit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CheckpointError, LlamaMoeError, RefusedError, UsageError, printable
from ..lazy import huggingface_hub
from ..progress import ProgressCallback, counting, ignore_progress
from .files import check_plain_file
from .hub import LOGIN
from .locate import check_folder
from .out_folder import RECIPE_FILE, TRAINING_RECEIPT_FILE, TRAINING_RECIPE_FILE
from .reader import INDEX, LICENSE_FILES, SIDE_FILES, SafetensorsCheckpoint
from .readme import HUB_ID, parent_metadata

_RECORDS = re.compile(r"llamamoe_\w+\.(json|yaml)")
_ALWAYS = {"config.json", "README.md", INDEX, *SIDE_FILES, *LICENSE_FILES}
_WEIGHTS = ".safetensors"
_PATH = re.compile(r"[\s\"'\[,](/|~/|[A-Za-z]:\\)\w")
_GIVEN = {".gitattributes"}
"""Files that the Hub puts into a new repository."""


@dataclass(frozen=True)
class Push:
    """An upload, done or planned.

    Attributes:
        repository: Its Hub id.
        url: Page of the commit; None if nothing was uploaded.
        files: Uploaded files with their sizes in bytes, weights first.
        deleted: Files of an earlier upload that the commit deletes.
        left_out: Files of the folder that are not part of a checkpoint.
        notes: Sentences for the user.
    """

    repository: str
    url: str | None
    files: dict[str, int]
    deleted: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Sum of the sizes."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Return the upload as JSON-compatible data."""
        return {
            "repository": self.repository,
            "url": self.url,
            "files": self.files,
            "bytes": self.nbytes,
            "deleted": list(self.deleted),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }


def push(
    folder: str | Path,
    repository: str,
    *,
    public: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> Push:
    """Upload a checkpoint by llamamoe: weights, configuration, tokenizer, card, licence, recipe and receipts.

    All files appear in one commit: a stopped upload leaves the repository as it was, and a repeated one sends only the
    weights that are missing. Other files of the folder are not uploaded.

    Args:
        folder: The checkpoint.
        repository: ``org/name`` on the Hub, which is created if it does not exist.
        public: Create it as a public one; without it, it is private. An existing one stays as it is.
        force: Replace the checkpoint in a repository that holds files already; its other files stay.
        dry_run: Check the folder and return what would be uploaded; needs no network.
        progress: Called after every file.

    Raises:
        UsageError: The name is not a Hub id.
        CheckpointError: The folder is not a checkpoint by llamamoe, or a file is missing or truncated.
        RefusedError: The repository holds files already.
        LlamaMoeError: The Hub cannot be reached or refuses; nothing changed there.
    """
    if not HUB_ID.fullmatch(repository):
        raise UsageError(f"{printable(repository)!r} is not the name of a repository.", hint="Give ORG/NAME.")
    path = Path(folder).expanduser()
    check_folder(path)
    checkpoint = SafetensorsCheckpoint(path)
    files, left_out = _chosen(path, {info.file.name for info in checkpoint.tensors.values()})
    if "llamamoe" not in checkpoint.config and not any(_RECORDS.fullmatch(name) for name in files):
        raise CheckpointError(
            f"{path} was not written by llamamoe.", hint="To upload another checkpoint: hf upload ORG/NAME FOLDER."
        )
    notes = tuple(_notes(path, files))
    if dry_run:
        return Push(repository, None, files, (), left_out, notes)
    with _hub_errors(repository):
        api = huggingface_hub.HfApi(library_name="llamamoe", library_version=__version__)
        api.create_repo(repository, private=not public, exist_ok=True)
        deleted = _stale(api, repository, files, force=force)
        url = _commit(api, path, repository, files, deleted, progress)
    checkpoint.check_unchanged()
    return Push(repository, url, files, deleted, left_out, notes)


def _chosen(path: Path, weights: set[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the files to upload with their sizes, weights first, and the names of the others.

    Raises:
        RefusedError: One of them is not a plain file.
    """
    there = sorted(each.name for each in path.iterdir())
    chosen = [name for name in there if name in weights or _is_ours(name, there)]
    for name in chosen:
        check_plain_file(path / name)
    chosen.sort(key=lambda name: (name not in weights, name))
    return {name: (path / name).stat().st_size for name in chosen}, tuple(name for name in there if name not in chosen)


def _is_ours(name: str, there: Collection[str]) -> bool:
    """Return whether a file beside the weights is part of a checkpoint, given the names of all files."""
    if name == TRAINING_RECIPE_FILE:  # a common name: of training only beside its receipt
        return TRAINING_RECEIPT_FILE in there
    return name in _ALWAYS or _RECORDS.fullmatch(name) is not None


def _notes(path: Path, files: dict[str, int]) -> Iterator[str]:
    if "license" not in parent_metadata(path) and not any(name in files for name in LICENSE_FILES):
        yield "neither README.md nor a licence file states a licence: add `license: ...` to the head of README.md"
    if RECIPE_FILE in files and _PATH.search((path / RECIPE_FILE).read_text("utf-8")):
        yield f"{RECIPE_FILE} names paths of this machine"


def _stale(api: Any, repository: str, files: dict[str, int], *, force: bool) -> tuple[str, ...]:
    """Return the files of an earlier checkpoint that the new one does not replace.

    Raises:
        RefusedError: The repository holds files, and ``force`` is not given.
    """
    there = set(api.list_repo_files(repository)) - _GIVEN
    if there and not force:
        raise RefusedError(
            f"{repository} holds {len(there)} files already, such as {printable(min(there))!r}.",
            hint="--force replaces the checkpoint in it in a new commit (the old ones stay in its history).",
        )
    ours = {name for name in there if _is_ours(name, there) or name.endswith(_WEIGHTS)}
    return tuple(sorted(ours - files.keys()))


def _commit(
    api: Any, path: Path, repository: str, files: dict[str, int], deleted: tuple[str, ...], progress: ProgressCallback
) -> str:
    """Upload the contents file by file, then make the commit that shows them; return its page."""
    advance = counting("upload", len(files), "file", progress)
    additions = [huggingface_hub.CommitOperationAdd(name, str(path / name)) for name in files]
    bars: Any = huggingface_hub.utils
    hidden = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        for addition in additions:
            api.preupload_lfs_files(repository, additions=[addition])
            advance(addition.path_in_repo)
        operations = [*additions, *(huggingface_hub.CommitOperationDelete(name) for name in deleted)]
        made = api.create_commit(repository, operations, commit_message=f"Upload by llamamoe {__version__}")
    finally:
        if not hidden:
            bars.enable_progress_bars()
    return str(made.commit_url)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Report what the Hub answers as one error with the next step."""
    kinds = huggingface_hub.errors
    try:
        yield
    except LlamaMoeError:
        raise
    except kinds.LocalTokenNotFoundError:
        raise LlamaMoeError(
            "uploading needs an account on the Hub, and none is logged in.", hint=_begin(LOGIN)
        ) from None
    except kinds.OfflineModeIsEnabled:
        raise LlamaMoeError("HF_HUB_OFFLINE=1 forbids uploads.", hint="Unset it.") from None
    except kinds.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise LlamaMoeError(
                f"the Hub does not let this account write to {repository} ({status}).",
                hint=f"{_begin(LOGIN)}; the token needs the right to write, and the account to be a member of the organisation.",
            ) from error
        raise LlamaMoeError(f"the Hub refuses the upload to {repository}: {error}") from error
    except Exception as error:  # versions of the hub's library differ in the transport errors that they let through
        raise LlamaMoeError(
            f"uploading to {repository} failed: {type(error).__name__}: {error}",
            hint="Repeat the command: the repository is as it was, and weights that were sent are not sent again.",
        ) from error


def _begin(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
