"""Which files a folder was written with: names, sizes and SHA-256, so that whatever happens to them later is seen."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .files import sync_path, write_text
from .json_files import read_json

_FILES = "files"
_THREADS = 8
"""Files that are hashed at a time: hashing lets go of the interpreter's lock."""


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written.

    Attributes:
        nbytes: Its size.
        sha256: The hash of its bytes.
    """

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The list of a folder's files.

    Attributes:
        name: The file that holds the list; it is not in it.
        files: Paths below the folder, with ``/``.
        facts: What else was noted.
    """

    name: str
    files: Mapping[str, FileEntry]
    facts: Mapping[str, Any]

    def strays(self, folder: Path) -> list[str]:
        """Everything in the folder that is not in the list: files, links, and folders that no listed file needs."""
        known = {self.name, *self.files}
        known |= {str(above) for name in self.files for above in PurePosixPath(name).parents}
        return [name for name, _ in _entries(folder) if name not in known]

    def misfits(self, folder: Path) -> Iterator[str]:
        """Files that are missing, not plain or of another size, each as a sentence without its end. Reads no contents."""
        for name, entry in self.files.items():
            try:
                found = (folder / name).lstat()
            except OSError:
                yield f"{name} is missing"
                continue
            if not stat.S_ISREG(found.st_mode):
                yield f"{name} is not a plain file"
            elif found.st_size != entry.nbytes:
                yield f"{name} has {found.st_size:,} bytes, and was written with {entry.nbytes:,}"

    def changes(self, folder: Path) -> Iterator[str]:
        """The same for files whose contents are not what was written. Reads every byte."""
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(lambda name: file_sha256(folder / name), self.files)
            for (name, entry), digest in zip(self.files.items(), digests, strict=True):
                if digest is None:
                    yield f"{name} cannot be read"
                elif digest != entry.sha256:
                    yield f"{name} was changed after it was written: its SHA-256 is another"


def write_manifest(folder: Path, name: str, facts: Mapping[str, Any]) -> Manifest:
    """Wait until all files of a folder are on disk, hash them, and write the list last, whole or not at all.

    Args:
        folder: The folder; nobody writes to it meanwhile.
        name: The name of the list in it.
        facts: Goes into it, too.

    Raises:
        OSError: A file cannot be read, or the list not be written.
    """
    there = {entry: mode for entry, mode in _entries(folder) if entry != name}
    paths = {entry: folder / entry for entry, mode in there.items() if stat.S_ISREG(mode)}
    for entry in there:
        sync_path(folder / entry)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip(paths, pool.map(_digest, paths.values()), strict=True))
    files = {entry: FileEntry(path.stat().st_size, digests[entry]) for entry, path in paths.items()}
    listed = {entry: {"bytes": each.nbytes, "sha256": each.sha256} for entry, each in files.items()}
    write_text(folder / name, json.dumps({**facts, _FILES: listed}, indent=1) + "\n")
    return Manifest(name, files, dict(facts))


def read_manifest(folder: Path, name: str) -> Manifest:
    """Read what `write_manifest` wrote.

    Raises:
        CheckpointError: It is missing, a link, or damaged; the message has no name of the folder.
    """
    path = folder / name
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{name} is {'not a plain file' if os.path.lexists(path) else 'missing'}.")
    data = read_json(path)
    listed = data.pop(_FILES, None)
    try:
        files = {entry: FileEntry(*_facts(entry, found)) for entry, found in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{name} is damaged: it does not list files with sizes and hashes.") from None
    return Manifest(name, files, data)


def _facts(name: str, entry: Mapping[str, Any]) -> tuple[int, str]:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
        raise ValueError(name)
    nbytes, digest = entry["bytes"], entry["sha256"]
    if type(nbytes) is not int or not isinstance(digest, str):
        raise ValueError(name)
    return nbytes, digest


def _entries(folder: Path) -> Iterator[tuple[str, int]]:
    """Everything below a folder, in order: its name with ``/``, and its mode. No link is followed."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted((*folders, *files)):
            path = Path(place, name)
            yield path.relative_to(folder).as_posix(), path.lstat().st_mode


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str | None:
    """Return the hash of a file's bytes; None if it cannot be read."""
    try:
        return _digest(path)
    except OSError:
        return None
