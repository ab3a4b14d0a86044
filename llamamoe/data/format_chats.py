"""``llamamoe.format_chats``: instruction and preference data sets as the rows that TRL reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import replacing
from ..errors import LlamaMoeError, RefusedError, UsageError
from ..progress import Progress, ProgressCallback, ignore_progress
from .chat_formats import BadRowError, format_of
from .compressed import check_packages, lines, open_bytes, reading
from .parquet import read_rows
from .text import MAX_DOCUMENT_BYTES

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
_MOST_JSON = 1 << 31
"""Maximum bytes of a .json file, which is read whole."""
_SHOWN = 5


@dataclass(frozen=True)
class FormattedChats:
    """The result of `format_chats`.

    Attributes:
        out: The written file.
        kind: ``conversations`` (rows with ``messages``) or ``preferences`` (``prompt``, ``chosen``, ``rejected``).
        rows: Number of rows written.
        formats: Number of rows by the format in which they were found.
        left_out: Number of rows that are not usable.
        reasons: The first of them: place and reason.
    """

    out: Path
    kind: str
    rows: int
    formats: Mapping[str, int]
    left_out: int
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return {**asdict(self), "out": str(self.out)}


def format_chats(
    files: Sequence[str | Path], out: str | Path, *, force: bool = False, progress: ProgressCallback = ignore_progress
) -> FormattedChats:
    """Write instruction or preference data of the usual formats as JSON lines for ``trl sft`` and ``trl dpo``.

    Each row's format is recognised by its fields (`llamamoe.data.chat_formats.FORMATS`): ShareGPT, Firefly, Alpaca, OpenAI's
    messages, HH-RLHF, UltraFeedback and others. Rows that are not usable, such as conversations without an answer, are left
    out and counted. ``out`` appears whole. A ``.json`` file is read whole; of others a few rows are in memory.

    Args:
        files: Files with rows: ``.jsonl`` (also ``.gz``, ``.zst``), ``.json`` (a list), ``.parquet``.
        out: The file to write, a ``.jsonl``.
        force: Replace ``out`` if it exists.
        progress: Called after every file.

    Raises:
        UsageError: There is no file, one is of another kind, or ``out`` is not a ``.jsonl``.
        RefusedError: ``out`` exists, no row is usable, or rows of both kinds are mixed.
        MissingExtraError: zstandard or pyarrow is needed and not installed.
        LlamaMoeError: A file cannot be read or decoded, or ``out`` cannot be written.
    """
    place, paths = Path(out).expanduser(), [_checked(Path(each).expanduser()) for each in files]
    _check(place, paths, force=force)
    check_packages(paths)
    formats: Counter[str] = Counter()
    kinds: dict[str, str] = {}
    bad: list[str] = []
    left_out = 0
    try:
        with replacing(place) as file:
            for done, path in enumerate(paths, start=1):
                for origin, row in _rows(path):
                    try:
                        found = _formatted(row, origin, kinds)
                    except BadRowError as error:
                        left_out += 1
                        bad += [f"{origin}: {error}"] if len(bad) < _SHOWN else []
                        continue
                    file.write(found[1])
                    formats[found[0]] += 1
                progress(Progress("format-chats", done, len(paths), "file"))
            if not formats:
                raise RefusedError("no row is usable: " + ("; ".join(bad[:1]) or "the files have no rows") + ".")
    except OSError as error:
        raise LlamaMoeError(f"'{place}' cannot be written: {error.strerror or error}.") from error
    return FormattedChats(place, next(iter(kinds)), formats.total(), dict(formats), left_out, tuple(bad))


def _check(place: Path, paths: Sequence[Path], *, force: bool) -> None:
    if not paths:
        raise UsageError("No file was given.", hint="Name at least one .jsonl, .json or .parquet file.")
    if not place.name.endswith(".jsonl"):
        raise UsageError(
            f"{str(place)!r} is not the name of a .jsonl file.", hint="Choose a name such as conversations.jsonl."
        )
    if place.resolve() in {path.resolve() for path in paths}:
        raise UsageError(f"{str(place)!r} is read and written.", hint="Choose another name for the result.")
    if place.is_dir() or not place.absolute().parent.is_dir():
        raise UsageError(f"{str(place)!r} is not a file name in an existing folder.")
    if place.exists() and not force:
        raise RefusedError(f"{str(place)!r} already exists.", hint="--force replaces it.")


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(
            f"{str(path)!r} is not a file.", hint="Give files; the shell expands globs such as data/*.jsonl."
        )
    if not path.name.endswith(_SUFFIXES):
        raise UsageError(f"{str(path)!r} is of an unknown kind; known are {', '.join(_SUFFIXES)}.")
    return path


def _formatted(row: Any, origin: str, kinds: dict[str, str]) -> tuple[str, bytes]:
    if not isinstance(row, Mapping):
        raise BadRowError(f"the row is of type {type(row).__name__}, not an object")
    format_ = format_of(row)
    converted = format_.convert(row)
    kinds.setdefault(format_.kind, origin)
    if len(kinds) > 1:
        told = " and ".join(f"{kind} ({place})" for kind, place in kinds.items())
        raise RefusedError(f"the files hold {told}, which one training run does not take.", hint="Format them apart.")
    try:
        return format_.name, (json.dumps(converted, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        raise BadRowError("a text holds half a surrogate pair, which is not valid Unicode") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and content of every row."""
    with reading(path):
        if path.suffix == ".parquet":
            for number, row in enumerate(read_rows(path, MAX_DOCUMENT_BYTES, None), 1):
                yield _not_too_large(f"{path}: row {number}", row)
        elif path.suffix == ".json":
            with open_bytes(path) as stream:
                rows = _parsed(stream.read(_MOST_JSON), str(path))
            if not isinstance(rows, list):
                raise LlamaMoeError(
                    f"'{path}' holds a JSON {type(rows).__name__}, not a list of rows.",
                    hint="Files with an object per line are named .jsonl.",
                )
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
        else:
            for place, line in lines(path, MAX_DOCUMENT_BYTES):
                origin, raw = _not_too_large(place, line)
                if raw.strip():
                    yield origin, _parsed(raw, origin)


def _not_too_large(origin: str, row: Any | None) -> tuple[str, Any]:
    if row is None:
        raise LlamaMoeError(f"{origin}: the row is larger than {MAX_DOCUMENT_BYTES:,} bytes.")
    return origin, row


def _parsed(raw: bytes, origin: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise LlamaMoeError(
            f"{origin} is not JSON in UTF-8: {error}.", hint="Write or download the file again."
        ) from error
