"""Find files of text by name, in folders and by globs; regular files only, and no link out of a folder."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..checkpoint.paths import check_regular, windows_hint
from ..errors import RefusedError, UsageError
from .compressed import check_packages

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")

UNPACKED = {".zst": 3.5, ".gz": 3.0, ".parquet": 2.0}
"""Approximate size of text relative to its file."""

# Names that number the parts of a corpus without describing them: part-0001, train-00000-of-00007, 0003.
_GENERIC = re.compile(
    r"(part|shard|chunk|split|file|data|text|docs?|documents?|train|training|valid|validation|val|dev|test|eval|"
    r"holdout|heldout|example)?([-_.]?(train|valid|validation|test|holdout))?([-_.]?\d+)*([-_.]?of[-_.]?\d+)?",
    re.IGNORECASE,
)


def find_files(patterns: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """List the files that ``patterns`` name, each once and with the domain for rows without one.

    Raises:
        UsageError: No pattern, a pattern that matches nothing, or a file of an unknown kind or that is not a regular
            file.
        RefusedError: A folder or glob contains a link out of the folder, or a folder holds several splits that the package
            datasets saved.
        MissingExtraError: zstandard or pyarrow is needed and not installed.
    """
    if isinstance(patterns, (str, Path)):  # a single str is also a sequence of str, its characters
        patterns = [patterns]
    if not patterns:
        raise UsageError("No text was given.", hint="Name at least one file, folder or glob.")
    found: dict[Path, tuple[Path, str]] = {}
    for pattern in patterns:
        for path, named in _match(pattern):
            domain = _domain(path, by_folder=suffix_of(path).startswith(".txt") and not named)
            found.setdefault(path.resolve(), (path, domain))
    check_packages(path for path, _ in found.values())
    return list(found.values())


def unpacked_bytes(files: Iterable[Path]) -> float:
    """Return an estimate of the size of the text in files, from their own sizes."""
    return sum(UNPACKED.get(path.suffix, 1.0) * path.stat().st_size for path in files)


def _match(pattern: str | Path) -> Iterator[tuple[Path, bool]]:
    """Yield the files of one pattern, and whether the pattern is the file's own name."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        yield from ((file, False) for file in _walk(path))
        return
    if path.exists():  # a file named by the user may be a link to anywhere
        check_regular(_known(path))
        yield path, True
        return
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise UsageError(
            f"No file, folder or glob matches '{pattern}'.",
            hint=f"{windows_hint(pattern)}Paths are relative to {Path.cwd()}; quote globs that the shell should leave alone.",
        )
    root = _glob_root(path)
    folders = [match for match in matches if match.is_dir()]
    files = [_known(match) for match in matches if not match.is_dir()]
    if not files:  # 'corpus/*' with only folders means these folders
        files = [file for folder in folders for file in _walk(_inside(folder, root))]
    for file in files:
        _readable(_inside(file, root))
    yield from ((file, False) for file in files)


def _glob_root(pattern: Path) -> Path:
    """Return the folder below which a glob searches."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def _walk(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.name == "dataset_dict.json":
            _refuse_splits(path)
        is_text = path.name.endswith(SUFFIXES) and not _is_cache(path)
        if path.is_symlink() and (is_text or path.is_dir()):
            _inside(path, folder)
        if is_text and not path.is_dir():
            _readable(path)
            files.append(path)
    if not files:
        raise UsageError(
            f"The folder '{folder}' holds no text.",
            hint=f"Files that can be read end in {', '.join(SUFFIXES)}.",
        )
    return files


def _refuse_splits(path: Path) -> None:
    """Refuse a ``DatasetDict`` of several splits, which would mix the text of its test split with that of training."""
    splits = sorted(each.parent.name for each in path.parent.glob("*/dataset_info.json"))
    if len(splits) > 1:
        raise RefusedError(
            f"'{path.parent}' holds several splits of a dataset ({', '.join(splits)}), which would be read as one text.",
            hint=f"Name the split, such as {path.parent / ('train' if 'train' in splits else splits[0])}.",
        )


def _is_cache(path: Path) -> bool:
    """Return whether the package datasets left the file beside a dataset, with the results of an earlier ``map``."""
    return path.name.startswith("cache-") and path.name.endswith(".arrow") and (path.parent / "state.json").exists()


def _readable(path: Path) -> None:
    try:
        check_regular(path)
    except OSError as error:  # a broken or circular link
        raise UsageError(
            f"'{path}' cannot be read: {error.strerror or error}.", hint="Remove it, or name the files one by one."
        ) from None


def _inside(path: Path, folder: Path) -> Path:
    """Return ``path`` unless it leads out of ``folder``; the blobs of a hub cache count as inside its snapshots.

    Raises:
        RefusedError: The path leads out of the folder.
    """
    root = folder.resolve()
    blobs = [above.parent.parent / "blobs" for above in (root, *root.parents) if above.parent.name == "snapshots"]
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # circular links
        raise RefusedError(f"'{path}' cannot be found ({error}).", hint="Remove the link.") from None
    if not any(real.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise RefusedError(
            f"'{path}' is a link out of the folder '{folder}' (to '{real}'): refused.",
            hint="Copy what it points to into the folder, or name that file or folder itself.",
        )
    return path


def _known(path: Path) -> Path:
    if not path.name.endswith(SUFFIXES):
        raise UsageError(
            f"Cannot tell the format of '{path}' by its name.",
            hint=f"Rename it; files that can be read end in {', '.join(SUFFIXES)}.",
        )
    return path


def _domain(path: Path, *, by_folder: bool) -> str:
    stem = path.name.removesuffix(suffix_of(path))
    folders = [parent.name for parent in path.absolute().parents]
    names = folders if by_folder else [stem, *folders]
    return next((name for name in names if name and not _GENERIC.fullmatch(name)), stem)


def suffix_of(path: Path) -> str:
    """Return the longest of `SUFFIXES` that the file has."""
    return max((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), key=len)
