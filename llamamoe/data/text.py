"""Reading documents, one at a time: plain text, JSON lines (both also as gzip or zstandard), Parquet."""

from __future__ import annotations

import glob
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import LlamaMoeError, MissingExtraError, UsageError
from .compressed import damaged, open_bytes

REDPAJAMA_DOMAINS = {
    "RedPajamaArXiv": "arxiv",
    "RedPajamaBook": "book",
    "RedPajamaC4": "c4",
    "RedPajamaCommonCrawl": "commoncrawl",
    "RedPajamaGithub": "github",
    "RedPajamaStackExchange": "stackexchange",
    "RedPajamaWikipedia": "wikipedia",
}
"""Short names of the domains that SlimPajama and RedPajama write into ``meta.redpajama_set_name``."""

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

# Names that tell which part of a corpus a file is, not what is in it: part-0001, train-00000-of-00007, 0003.
_GENERIC = re.compile(
    r"(part|shard|chunk|split|file|data|text|docs?|documents?|train|training|valid|validation|val|dev|test|eval|"
    r"holdout|heldout|example)?([-_.]?(train|valid|validation|test|holdout))?([-_.]?\d+)*([-_.]?of[-_.]?\d+)?",
    re.IGNORECASE,
)
_PARQUET_ROWS = 256  # rows decoded at once
OnBadRow = Callable[[LlamaMoeError], None]  # the message begins with the row's origin


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text, neither empty nor only white space, encodable as UTF-8.
        domain: The kind of text it is, for example ``"arxiv"``.
        origin: Where it stands, for messages: ``FILE``, ``FILE:LINE`` or ``FILE: row N`` (Parquet); from 1.
    """

    text: str
    domain: str
    origin: str


def read_documents(patterns: Sequence[str | Path], *, on_bad_row: OnBadRow | None = None) -> Iterator[Document]:
    """Read documents in a fixed order: patterns as given, files sorted by path, rows as they stand.

    Each pattern is a file, a folder (read recursively; hidden files and files of other kinds are left out)
    or a glob (``**`` allowed). Files end in one of `SUFFIXES`: a ``txt`` file is one document, rows of the
    others have a ``text`` column. A file that two patterns name is read once. Only one line, or a few hundred
    Parquet rows, are in memory at a time (a ``txt`` file is read whole).

    The domain is ``meta.redpajama_set_name`` where a row has it (in the short form of `REDPAJAMA_DOMAINS`).
    Else it is the file's name without its suffix, or where that says nothing (``part-0001``, ``train``) the
    name of the nearest folder that does. For ``txt`` files found in a folder or by a glob it is the folder's.

    Args:
        patterns: Files, folders and globs.
        on_bad_row: Told about each row without usable text, which is then left out; None: such a row is an error.

    Returns:
        An iterator over the documents; patterns, suffixes and needed packages are checked before.

    Raises:
        UsageError: No pattern, a pattern that matches nothing, or a file of an unknown kind.
        MissingExtraError: zstandard or pyarrow is needed and not installed.
        LlamaMoeError: While iterating: a file that cannot be read or decoded, a broken or truncated one, a
            row without usable text. The message names file and line.
    """
    return read_files(find_files(patterns), on_bad_row=on_bad_row)


def read_files(files: Sequence[tuple[Path, str]], *, on_bad_row: OnBadRow | None = None) -> Iterator[Document]:
    """Like `read_documents`, of files as `find_files` lists them."""
    for path, _ in files:
        if path.name.endswith(".zst"):
            _import("zstandard", path)
        elif path.name.endswith(".parquet"):
            _import("pyarrow.parquet", path)
    return _read_all(files, on_bad_row)


def find_files(patterns: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """List the files that ``patterns`` name, each once and with the domain of its rows that state none.

    Raises:
        UsageError: No pattern, a pattern that matches nothing, or a file of an unknown kind.
    """
    if isinstance(patterns, (str, Path)):  # a single str is a sequence of str too: its characters
        patterns = [patterns]
    if not patterns:
        raise UsageError("No text was given.", hint="Name at least one file, folder or glob.")
    found: dict[Path, tuple[Path, str]] = {}
    for pattern in patterns:
        for path, named in _match(pattern):
            domain = _domain(path, by_folder=_suffix(path).startswith(".txt") and not named)
            found.setdefault(path.resolve(), (path, domain))
    return list(found.values())


def _match(pattern: str | Path) -> Iterator[tuple[Path, bool]]:
    """Yield the files of one pattern, and whether the pattern is the file's own name."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        yield from ((file, False) for file in _walk(path))
        return
    if path.exists():
        yield _known(path), True
        return
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise UsageError(
            f"No file, folder or glob matches '{pattern}'.",
            hint=f"Paths are relative to {Path.cwd()}; quote globs that the shell should leave alone.",
        )
    folders = [Path(match) for match in matches if Path(match).is_dir()]
    files = [_known(Path(match)) for match in matches if not Path(match).is_dir()]
    if not files:  # 'corpus/*' that holds only folders means these folders
        files = [file for folder in folders for file in _walk(folder)]
    yield from ((file, False) for file in files)


def _walk(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.rglob("*")
        if path.name.endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UsageError(
            f"The folder '{folder}' holds no text.",
            hint=f"Files that can be read end in {', '.join(SUFFIXES)}.",
        )
    return sorted(files)


def _known(path: Path) -> Path:
    if not path.name.endswith(SUFFIXES):
        raise UsageError(
            f"Cannot tell the format of '{path}' by its name.",
            hint=f"Rename it; files that can be read end in {', '.join(SUFFIXES)}.",
        )
    return path


def _domain(path: Path, *, by_folder: bool) -> str:
    stem = path.name.removesuffix(_suffix(path))
    folders = [parent.name for parent in path.absolute().parents]
    names = folders if by_folder else [stem, *folders]
    return next((name for name in names if name and not _GENERIC.fullmatch(name)), stem)


def _suffix(path: Path) -> str:
    return max((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), key=len)


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(module.split(".")[0], "data", f"Reading '{path}'") from error


def _read_all(files: Iterable[tuple[Path, str]], on_bad_row: OnBadRow | None) -> Iterator[Document]:
    for path, domain in files:
        try:
            for row in _READERS[_suffix(path).split(".")[1]](path, domain):
                document = _attempt(row, on_bad_row)
                if document is not None:
                    yield document
        except (EOFError, zlib.error) as error:  # from gzip
            raise damaged(path, error) from error
        except OSError as error:
            raise LlamaMoeError(f"Cannot read '{path}': {error.strerror or error}.") from error


_Row = Callable[[], Document | None]  # makes a document of a row that was read; None for an empty line


def _attempt(row: _Row, on_bad_row: OnBadRow | None) -> Document | None:
    try:
        return row()
    except LlamaMoeError as error:
        if on_bad_row is None:
            raise
        on_bad_row(error)
    return None


def _read_txt(path: Path, domain: str) -> Iterator[_Row]:
    with open_bytes(path) as stream:
        raw = stream.read()
    yield lambda: Document(_usable(_decode(raw, str(path)), str(path)), domain, str(path))


def _read_jsonl(path: Path, domain: str) -> Iterator[_Row]:
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            yield partial(_line, line, domain, f"{path}:{number}")


def _line(line: bytes, domain: str, origin: str) -> Document | None:
    text = _decode(line, origin)
    return _row(_parse(text, origin), domain, origin) if text.strip() else None


def _read_parquet(path: Path, domain: str) -> Iterator[_Row]:
    parquet, arrow = _import("pyarrow.parquet", path), _import("pyarrow", path)
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise LlamaMoeError(
                f"'{path}' has no column 'text'; it has {', '.join(names) or 'none'}.",
                hint="Rename the column that holds the documents to 'text'.",
            )
        number = 0
        columns = [name for name in ("text", "meta") if name in names]
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield partial(_row, row, domain, f"{path}: row {number}")
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        message = f"'{path}' is not a sound Parquet file: {error}."
        raise LlamaMoeError(message, hint="Write or download it again.") from error


_READERS: dict[str, Callable[[Path, str], Iterator[_Row]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
        raise LlamaMoeError(
            f"{origin}: the line is not JSON: {error}.",
            hint="JSON lines hold one whole object a line, line breaks inside strings written as \\n.",
        ) from error
    if not isinstance(row, dict):
        raise LlamaMoeError(
            f"{origin}: the line is a JSON {type(row).__name__}, not an object.",
            hint='Each line must be an object such as {"text": "..."}.',
        )
    return row


def _row(row: dict[str, Any], domain: str, origin: str) -> Document:
    text = row.get("text")
    if not isinstance(text, str):
        had = "is missing" if "text" not in row else f"is a {type(text).__name__}, not a string"
        raise LlamaMoeError(
            f"{origin}: the field 'text' {had}; the fields are {', '.join(map(str, row)) or 'none'}.",
            hint="Every row must have its document, a string, under 'text'.",
        )
    meta = row.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    if isinstance(name, str) and name:
        domain = REDPAJAMA_DOMAINS.get(name, name)
    return Document(_usable(text, origin), domain, origin)


def _usable(text: str, origin: str) -> str:
    if not text.strip():
        raise LlamaMoeError(f"{origin}: the text is empty.", hint="Remove the row or the file.")
    try:
        text.encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise LlamaMoeError(
            f"{origin}: the text holds half a surrogate pair ({text[error.start]!a}): no valid Unicode.",
            hint="Write the file again from its source, with errors='replace' where it was decoded.",
        ) from error
    return text


def _decode(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise LlamaMoeError(
            f"{origin}: byte {error.start + 1} is not UTF-8 (0x{raw[error.start]:02x}: {error.reason}).",
            hint="Convert the file to UTF-8, for example with iconv.",
        ) from error
