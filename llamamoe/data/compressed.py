"""Open a file as bytes, decompressing by its suffix, and detect truncation.

fsspec (2026.9) does not do this: it reads a zstandard file through the reader of the package zstandard, and a file
that was truncated ends there without an error, with the following documents missing. `compression.zstd` of Python 3.14
detects it, reads frame after frame and bounds its memory; it can replace `_ZstdStream` once 3.14 is the oldest
Python supported.
"""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ..checkpoint.paths import check_regular
from ..errors import LlamaMoeError
from ..lazy import require

_COMPRESSED_BYTES = 1 << 10
"""Bytes passed to zstandard at once: it returns everything that they unpack to, up to 32,768 times as much."""
_WINDOW_BYTES = 1 << 27
"""Maximum memory that a zstandard file may require, as in the command line tool; enough for its --long."""
_BUFFER_BYTES = 1 << 20  # passed to the line splitter at once


def open_bytes(path: Path) -> IO[bytes]:
    """Open ``path`` for reading; ``.gz`` and ``.zst`` are decompressed in pieces.

    Raises:
        UsageError: The path is not a regular file.
        OSError: The file cannot be opened or, while reading, is not gzip.
        EOFError, zlib.error: While reading: the gzip file is truncated or damaged.
        LlamaMoeError: While reading: the zstandard file is truncated or damaged, or needs too much memory.
    """
    check_regular(path)
    if path.name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path))
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path), buffer_size=_BUFFER_BYTES)
    return path.open("rb")


def import_for(module: str, path: Path) -> Any:
    """Import a module of an optional package that reading ``path`` needs.

    Raises:
        MissingExtraError: The package is not installed.
    """
    return require(module, "data", f"Reading '{path}'")


def check_packages(paths: Iterable[Path]) -> None:
    """Import the optional packages that reading these files needs.

    Raises:
        MissingExtraError: One is not installed; the message names a file that needs it.
    """
    for path in paths:
        if path.name.endswith(".zst"):
            import_for("zstandard", path)
        elif path.name.endswith((".parquet", ".arrow")):
            import_for("pyarrow.parquet", path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report a file that cannot be read or decompressed as one error.

    Raises:
        LlamaMoeError: It cannot; the message names it.
    """
    try:
        yield
    except (EOFError, zlib.error) as error:  # from gzip
        raise damaged(path, error) from error
    except OSError as error:
        raise LlamaMoeError(f"Cannot read '{path}': {error.strerror or error}.") from error


def lines(path: Path, most_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield place (``FILE:LINE``, from 1) and content of every line, None for one of more than ``most_bytes``."""
    with open_bytes(path) as stream:
        number = 0
        while line := stream.readline(most_bytes + 1):
            number += 1
            too_long = len(line) > most_bytes
            yield f"{path}:{number}", None if too_long else line
            while too_long and line and not line.endswith(b"\n"):  # skip the rest of the line
                line = stream.readline(_BUFFER_BYTES)


def damaged(path: Path, error: Exception | str) -> LlamaMoeError:
    """Return the error for a compressed file that cannot be decompressed."""
    return LlamaMoeError(
        f"'{path}' is cut short or damaged: {str(error).rstrip('.')}.", hint="Download or compress it again."
    )


class _ZstdStream(io.RawIOBase):
    """The decompressed bytes of a zstandard file, frame after frame.

    zstandard's own reader ends silently at a truncation; this one raises.
    """

    def __init__(self, path: Path) -> None:
        self._zstd = importlib.import_module("zstandard")
        self._path = path
        self._file = path.open("rb")
        self._frame: Any = None
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        """See `io.IOBase.readable`."""
        return True

    def close(self) -> None:
        """See `io.IOBase.close`."""
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase.readinto`."""
        while not self._pending:
            piece = self._file.read(_COMPRESSED_BYTES)
            if not piece:
                if self._frame is not None:
                    raise damaged(self._path, "it ends inside a zstandard frame")
                return 0
            self._pending = memoryview(self._decompress(piece))
        taken = min(len(buffer), len(self._pending))
        buffer[:taken], self._pending = self._pending[:taken], self._pending[taken:]
        return taken

    def _decompress(self, piece: bytes) -> bytes:
        out = []
        while piece:
            if self._frame is None:
                self._frame = self._zstd.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
            try:
                out.append(self._frame.decompress(piece))
            except self._zstd.ZstdError as error:
                if "too much memory" in str(error):
                    raise LlamaMoeError(
                        f"'{self._path}' needs a window of more than {_WINDOW_BYTES >> 20} MiB to be unpacked.",
                        hint="Compress it again: zstd -d --long=31 -c OLD | zstd -o NEW",
                    ) from error
                raise damaged(self._path, error) from error
            piece = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return b"".join(out)
