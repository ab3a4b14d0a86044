"""Read rows of Parquet files, a few at a time, with bounded memory whatever the size of row groups; and of Arrow streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LlamaMoeError
from .compressed import import_for

META = "meta"
"""The column that may tell a row's domain."""
_ROWS = 256  # decoded at once
_MOST_UNPACKED = 200
"""Maximum compression ratio of data larger than a document: text compresses 2 to 20 times."""
_SHOWN = 10


def read_rows(path: Path, most_bytes: int, column: str | None = "text") -> Iterator[dict[str, Any] | None]:
    """Yield ``column`` and `META` of every row, None for a row of more than ``most_bytes``.

    Args:
        path: A Parquet file, or an Arrow stream (``.arrow``) as ``save_to_disk`` of the package datasets writes it.
        most_bytes: Maximum size of a row.
        column: The column with the documents; None: all columns.

    Raises:
        LlamaMoeError: The file is damaged, has no such column, or unpacks to far more data than text would.
        OSError: The file cannot be read.
    """
    parquet, arrow = import_for("pyarrow.parquet", path), import_for("pyarrow", path)
    stream = path.suffix == ".arrow"
    try:
        if stream:
            with path.open("rb") as file, arrow.ipc.open_stream(file) as batches:
                columns = _columns(path, batches.schema.names, column)
                for batch in batches:
                    yield from _rows_of(batch.select(columns), most_bytes)
            return
        with parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, column)
            for group in range(file.num_row_groups):
                rows = _rows_at_once(path, file.metadata.row_group(group), columns, most_bytes)
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                    yield from _rows_of(batch, most_bytes)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        message = f"'{path}' is not a valid {'Arrow' if stream else 'Parquet'} file: {error}."
        raise LlamaMoeError(message, hint="Write or download it again.") from error


def _columns(path: Path, names: list[str], column: str | None) -> list[str]:
    """Return the columns to read.

    Raises:
        LlamaMoeError: The file has no such column.
    """
    if column is None:
        return names
    if column in names:
        return [name for name in names if name in (column, META)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise LlamaMoeError(
        f"'{path}' has no column {column!r}; it has {', '.join(names[:_SHOWN]) or 'none'}{more}.",
        hint=f"Rename the column that holds the documents to {column!r}; tokenize reads that of text_column.",
    )


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
