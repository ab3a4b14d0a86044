"""Read rows of a Parquet file, a few at a time, with bounded memory whatever the size of its row groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LlamaMoeError
from .compressed import import_for

COLUMNS = ("text", "meta")
_ROWS = 256  # decoded at once
_MOST_UNPACKED = 200
"""Maximum compression ratio of data larger than a document: text compresses 2 to 20 times."""
_SHOWN = 10


def read_rows(path: Path, most_bytes: int) -> Iterator[dict[str, Any] | None]:
    """Yield the columns `COLUMNS` of every row, None for a row of more than ``most_bytes``.

    Raises:
        LlamaMoeError: The file is damaged, has no column ``text``, or unpacks to far more data than text would.
        OSError: The file cannot be read.
    """
    parquet, arrow = import_for("pyarrow.parquet", path), import_for("pyarrow", path)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                raise LlamaMoeError(
                    f"'{path}' has no column 'text'; it has {', '.join(names[:_SHOWN]) or 'none'}{more}.",
                    hint="Rename the column that holds the documents to 'text'.",
                )
            columns = [name for name in COLUMNS if name in names]
            for group in range(file.num_row_groups):
                rows = _rows_at_once(path, file.metadata.row_group(group), columns, most_bytes)
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                    yield from _rows_of(batch, most_bytes)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        message = f"'{path}' is not a valid Parquet file: {error}."
        raise LlamaMoeError(message, hint="Write or download it again.") from error


def _rows_at_once(path: Path, group: Any, columns: list[str], most_bytes: int) -> int:
    """Return how many rows of a row group may be decoded together, from the sizes in its header.

    Raises:
        LlamaMoeError: They unpack to far more data than text would.
    """
    rows = _ROWS
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.split(".")[0] not in columns:
            continue
        packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        if unpacked > most_bytes and unpacked > _MOST_UNPACKED * packed:
            raise LlamaMoeError(
                f"'{path}': {packed:,} bytes of the column {column.path_in_schema!r} unpack to {unpacked:,}, more than "
                f"{_MOST_UNPACKED} times as many: this is not text.",
                hint="Write the file again, with documents of usual sizes.",
            )
        # one entry of a dictionary may occur in every row
        row_bytes = unpacked if column.has_dictionary_page else unpacked // max(1, group.num_rows)
        rows = min(rows, max(1, most_bytes // max(1, row_bytes)))
    return rows


def _rows_of(batch: Any, most_bytes: int) -> Iterator[dict[str, Any] | None]:
    if batch.nbytes <= most_bytes:
        yield from batch.to_pylist()
        return
    for at in range(batch.num_rows):
        row = batch.slice(at, 1)
        yield row.to_pylist()[0] if row.nbytes <= most_bytes else None
