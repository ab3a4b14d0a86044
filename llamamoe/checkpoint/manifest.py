"""List the files of a written folder with sizes and SHA-256, so that later changes are detected."""

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
"""Number of files hashed at a time: hashing releases the interpreter's lock."""


@dataclass(frozen=True)
class FileEntry:
    """The entry of a written file.

    Attributes:
        nbytes: Size of the file.
        sha256: Hash of its bytes.
    """

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The list of a folder's files.

    Attributes:
        name: The file that holds the list; it is not listed itself.
        files: Entries by path below the folder, with ``/``.
        facts: Further facts in the list.
    """

    name: str
    files: Mapping[str, FileEntry]
    facts: Mapping[str, Any]

    def strays(self, folder: Path) -> list[str]:
        """Return everything in the folder that is not listed: files, links, and folders without a listed file."""
        known = {self.name, *self.files}
        known |= {str(above) for name in self.files for above in PurePosixPath(name).parents}
        return [name for name, _ in _entries(folder) if name not in known]

    def misfits(self, folder: Path) -> Iterator[str]:
        """Yield a phrase for each file that is missing, not plain or of another size. Reads no contents."""
        for name, entry in self.files.items():
            try:
                found = (folder / name).lstat()
            except OSError:
                yield f"{name} is missing"
                continue
            if not stat.S_ISREG(found.st_mode):
                yield f"{name} is not a plain file"
            elif found.st_size != entry.nbytes:
                yield f"{name} has {found.st_size:,} bytes, but was written with {entry.nbytes:,}"

    def changes(self, folder: Path) -> Iterator[str]:
        """Yield a phrase for each file whose contents changed. Reads every byte."""
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(lambda name: file_sha256(folder / name), self.files)
            for (name, entry), digest in zip(self.files.items(), digests, strict=True):
                if digest is None:
                    yield f"{name} cannot be read"
                elif digest != entry.sha256:
                    yield f"{name} was changed after it was written: its SHA-256 differs"


def write_manifest(
    folder: Path, name: str, facts: Mapping[str, Any], written: Mapping[str, FileEntry] | None = None
) -> Manifest:
    """Wait until all files of a folder are on disk, hash them, and write the list last, whole or not at all.

    Args:
        folder: The folder; it must not change meanwhile.
        name: The name of the list in it.
        facts: Further facts for the list.
        written: Entries of files that are on disk already, as those who wrote them measured them: neither looked up nor
            read, since a network file system may show another machine an earlier state.

    Raises:
        OSError: A file cannot be read, or the list cannot be written.
    """
    files = dict(written or {})
    there = {entry: mode for entry, mode in _entries(folder) if entry != name and entry not in files}
    paths = {entry: folder / entry for entry, mode in there.items() if stat.S_ISREG(mode)}
    for entry in there:
        sync_path(folder / entry)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip(paths, pool.map(_digest, paths.values()), strict=True))
    files |= {entry: FileEntry(path.stat().st_size, digests[entry]) for entry, path in paths.items()}
    listed = {entry: {"bytes": each.nbytes, "sha256": each.sha256} for entry, each in files.items()}
    write_text(folder / name, json.dumps({**facts, _FILES: listed}, indent=1) + "\n")
    return Manifest(name, files, dict(facts))


def read_manifest(folder: Path, name: str) -> Manifest:
    """Read what `write_manifest` wrote.

    Raises:
        CheckpointError: The list is missing, a link, or damaged; the message does not name the folder.
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
    """Yield everything below a folder in order: its path with ``/``, and its mode. No link is followed."""
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
