"""Read documents, one at a time: plain text, JSON lines (both also as gzip or zstandard), Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import LlamaMoeError
from .compressed import check_packages, lines, open_bytes, reading
from .files import find_files, suffix_of
from .parquet import read_rows

REDPAJAMA_DOMAINS = {
    "RedPajamaArXiv": "arxiv",
    "RedPajamaBook": "book",
    "RedPajamaC4": "c4",
    "RedPajamaCommonCrawl": "commoncrawl",
    "RedPajamaGithub": "github",
    "RedPajamaStackExchange": "stackexchange",
    "RedPajamaWikipedia": "wikipedia",
}
"""Short names of the domains in ``meta.redpajama_set_name`` of SlimPajama and RedPajama."""

MAX_DOCUMENT_BYTES = 1 << 26
"""Maximum bytes of one unpacked document (in JSON lines: of a line). Tokenising takes about 25 times its size."""
OnBadRow = Callable[[LlamaMoeError], None]  # the message begins with the row's origin


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text, neither empty nor only white space, encodable as UTF-8.
        domain: The kind of text it is, for example ``"arxiv"``.
        origin: Its place, for messages: ``FILE``, ``FILE:LINE`` or ``FILE: row N`` (Parquet); from 1.
    """

    text: str
    domain: str
    origin: str


def read_documents(patterns: Sequence[str | Path], *, on_bad_row: OnBadRow | None = None) -> Iterator[Document]:
    """Read documents in a fixed order: patterns as given, files sorted by path, rows in order.

    Each pattern is a file, a folder (read recursively; hidden files and files of other kinds are left out)
    or a glob (``**`` allowed). File names end in one of `llamamoe.data.files.SUFFIXES`: a ``txt`` file is one document,
    rows of the others have a ``text`` column. A file that two patterns name is read once. Only one line, or a few
    hundred Parquet rows, are in memory at a time (a ``txt`` file is read whole), and none of more than
    `MAX_DOCUMENT_BYTES`. Only regular files are read. A file or folder that a pattern names may be a link; links that
    are found in a folder, or by a glob, must not lead out of it.

    The domain is ``meta.redpajama_set_name`` if a row has it (in the short form of `REDPAJAMA_DOMAINS`).
    Else it is the file's name without its suffix, or if that is not descriptive (``part-0001``, ``train``) the
    name of the nearest folder that is. For ``txt`` files found in a folder or by a glob it is the folder's.

    Args:
        patterns: Files, folders and globs.
        on_bad_row: Called for each row without usable text, which is then skipped; None: such a row is an error.

    Returns:
        An iterator over the documents; patterns, suffixes and needed packages are checked before.

    Raises:
        UsageError: No pattern, a pattern that matches nothing, or a file of an unknown kind or that is not a regular
            file.
        RefusedError: A link leads out of a folder.
        MissingExtraError: zstandard or pyarrow is needed and not installed.
        LlamaMoeError: While iterating: a file cannot be read or decoded, is broken or truncated, or has a
            row without usable text or with too much. The message names file and line.
    """
    return read_files(find_files(patterns), on_bad_row=on_bad_row)


def read_files(
    files: Sequence[tuple[Path, str]], *, on_bad_row: OnBadRow | None = None, column: str = "text"
) -> Iterator[Document]:
    """Read documents like `read_documents`, from files as listed by `find_files`."""
    check_packages(path for path, _ in files)
    return _read_all(files, on_bad_row, column)


def _read_all(files: Iterable[tuple[Path, str]], on_bad_row: OnBadRow | None, column: str) -> Iterator[Document]:
    for path, domain in files:
        with reading(path):
            for row in _READERS[suffix_of(path).split(".")[1]](path, domain, column):
                document = _attempt(row, on_bad_row)
                if document is not None:
                    yield document


_Row = Callable[[], Document | None]  # makes a document from a row; None for an empty line


def _attempt(row: _Row, on_bad_row: OnBadRow | None) -> Document | None:
    try:
        return row()
    except LlamaMoeError as error:
        if on_bad_row is None:
            raise
        on_bad_row(error)
    return None


def _too_large(origin: str) -> Document:
    raise LlamaMoeError(
        f"{origin}: the document is larger than {MAX_DOCUMENT_BYTES:,} bytes, the most that is read at once.",
        hint="Cut it into several documents, such as rows of a .jsonl file.",
    )


def _read_txt(path: Path, domain: str, column: str) -> Iterator[_Row]:
    with open_bytes(path) as stream:
        raw = stream.read(MAX_DOCUMENT_BYTES + 1)
    origin = str(path)
    if len(raw) > MAX_DOCUMENT_BYTES:
        yield partial(_too_large, origin)
    else:
        yield lambda: Document(_usable(_decode(raw, origin), origin), domain, origin)


def _read_jsonl(path: Path, domain: str, column: str) -> Iterator[_Row]:
    for origin, line in lines(path, MAX_DOCUMENT_BYTES):
        yield partial(_too_large, origin) if line is None else partial(_line, line, domain, origin, column)


def _line(line: bytes, domain: str, origin: str, column: str) -> Document | None:
    text = _decode(line, origin)
    return _row(_parse(text, origin), domain, origin, column) if text.strip() else None


def _read_columns(path: Path, domain: str, column: str) -> Iterator[_Row]:
    for number, row in enumerate(read_rows(path, MAX_DOCUMENT_BYTES, column), 1):
        origin = f"{path}: row {number}"
        yield partial(_too_large, origin) if row is None else partial(_row, row, domain, origin, column)


_READERS: dict[str, Callable[[Path, str, str], Iterator[_Row]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_columns,
    "arrow": _read_columns,
}


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of too many digits
        raise LlamaMoeError(
            f"{origin}: the line is not JSON: {error}.",
            hint="JSON lines hold one complete object per line, line breaks inside strings written as \\n.",
        ) from error
    if not isinstance(row, dict):
        raise LlamaMoeError(
            f"{origin}: the line is a JSON {type(row).__name__}, not an object.",
            hint='Each line must be an object such as {"text": "..."}.',
        )
    return row


def _row(row: dict[str, Any], domain: str, origin: str, column: str) -> Document:
    text = row.get(column)
    if not isinstance(text, str):
        had = "is missing" if column not in row else f"is of type {type(text).__name__}, not a string"
        raise LlamaMoeError(
            f"{origin}: the field {column!r} {had}; the fields are {', '.join(map(str, row)) or 'none'}.",
            hint=f"Every row must have its document, a string, under {column!r}; tokenize reads that of text_column.",
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
        text.encode()  # JSON can spell half a surrogate pair, which tokenizers reject
    except UnicodeEncodeError as error:
        raise LlamaMoeError(
            f"{origin}: the text holds half a surrogate pair ({text[error.start]!a}): not valid Unicode.",
            hint="Write the file again from its source, with errors='replace' where it was decoded.",
        ) from error
    return text


def _decode(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # some editors start a file with a byte order mark
    except UnicodeDecodeError as error:
        raise LlamaMoeError(
            f"{origin}: byte {error.start + 1} is not UTF-8 (0x{raw[error.start]:02x}: {error.reason}).",
            hint="Convert the file to UTF-8, for example with iconv.",
        ) from error
