"""Read the header of a GGUF file: its metadata and the location of each tensor.

The package ``gguf`` has its own reader, but that builds an array per string (seconds for a real vocabulary) and
reports a broken file by numpy's errors. This one checks every length against the file before using it.
"""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ...errors import CheckpointError
from ...lazy import require
from ..paths import refuse_pointer

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 20  # metadata keys or tensors: far above any model, far below a denial of service
_MAX_ITEMS = 1 << 26  # elements of one metadata array
_MAX_DIMS = 4
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg", b"GGML", b"GGMF", b"GGJT", b"GGLA")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file stores it.

    Attributes:
        name: Its name in llama.cpp.
        shape: Its shape, row-major as in torch.
        kind: Name of its type, for example ``"Q4_K"``.
        type_id: The number of that type.
        offset: Offset of its bytes in the file.
        nbytes: Number of its bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    type_id: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The content of a GGUF file before its tensor data."""

    path: Path
    file_size: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def require_gguf() -> ModuleType:
    """Return the package ``gguf``.

    Raises:
        MissingExtraError: The package is not installed.
    """
    module: ModuleType = require("gguf", "gguf", "Reading a GGUF file")
    return module


def read_header(path: Path) -> GgufHeader:
    """Read the header of the GGUF file ``path``.

    Raises:
        CheckpointError: The file is not GGUF, truncated, big-endian, split over files, or malformed.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    require_gguf()
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file.", hint="Give the .gguf file itself.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        refuse_pointer(path, start + file.read(64) if start == b"version " else start)
        _check_magic(path, start)
        cursor = _Cursor(path, file, size)
        tensor_count, key_count = cursor.count(_MAX_ENTRIES, "tensors"), cursor.count(_MAX_ENTRIES, "keys")
        metadata = _read_metadata(cursor, key_count)
        _refuse_split(path, metadata)
        tensors = _read_tensors(cursor, tensor_count, metadata)
    return GgufHeader(path, size, metadata, tensors)


def _check_magic(path: Path, start: bytes) -> None:
    if start[:4] in _OLD_MAGICS:
        raise CheckpointError(
            f"{path} is in a format older than GGUF (it begins with {start[:4]!r}).",
            hint="Convert the original checkpoint again with a llama.cpp of 2023-10 or later.",
        )
    if start[:4] != b"GGUF":
        raise CheckpointError(
            f"{path} is not a GGUF file: it begins with {start[:4]!r}, not with b'GGUF'.",
            hint="An unfinished download looks like this: check the size of the file.",
        )
    if len(start) < 8:
        raise CheckpointError(f"{path} is cut off after {len(start)} bytes.", hint="Download it again.")
    (version,) = struct.unpack("<I", start[4:])
    if version & 0xFFFF == 0:
        raise CheckpointError(
            f"{path} is a big-endian GGUF file, which is not supported.",
            hint="Turn it into a little-endian one with: gguf-convert-endian FILE little",
        )
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3 are supported.")
    if sys.byteorder != "little":
        raise CheckpointError("GGUF files can be read on little-endian machines only.")


def _refuse_split(path: Path, metadata: dict[str, Any]) -> None:
    match = _SPLIT_NAME.search(path.name)
    parts = metadata.get("split.count", 0)
    if match is None and not (isinstance(parts, int) and parts > 1):
        return
    total = int(match.group(2)) if match else parts
    raise CheckpointError(
        f"{path.name} is one of {total} parts of a split GGUF file, which cannot be read in parts.",
        hint="Join them first: llama-gguf-split --merge FIRST-PART OUT.gguf",
    )


class _Cursor:
    """A cursor over the bytes of a header that never passes their end."""

    def __init__(self, path: Path, file: IO[bytes], size: int) -> None:
        self.path, self._file, self.size, self.at = path, file, size, 8

    def take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self.size - self.at else b""
        if len(data) < count:
            raise CheckpointError(
                f"{self.path} is cut off or broken: its header needs {count} bytes at byte {self.at}, "
                f"but the file has {self.size} bytes.",
                hint="Download or convert it again.",
            )
        self.at += count
        return data

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return shortest(value) if code == "f" else value

    def count(self, limit: int, what: str) -> int:
        value: int = self.scalar("Q")
        if value > limit:
            raise CheckpointError(
                f"{self.path} is broken: its header claims {value} {what} (at most {limit} are accepted)."
            )
        return value

    def string(self, errors: str = "replace") -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors=errors)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is broken: its header holds a value of the unknown kind {kind}.")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind = self.scalar("I")
        count = self.count(_MAX_ITEMS, "items in one array")
        if kind == _STRING:
            # A vocabulary may hold broken characters, which must stay distinct.
            return [self.string("surrogateescape") for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is broken: its header holds an array of the unsupported kind {kind}.")
        code = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))


def shortest(value: float) -> float:
    """Return the float with the fewest digits that equals ``value`` in float32: 1e-05, not 9.999999747378752e-06.

    GGUF stores settings in float32; their authors wrote them in decimal, as other files of the model do.
    """
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        # Rounding up the largest float32 would exceed float32.
        if abs(short) <= 3.4028234e38 and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{cursor.path} is broken: the metadata key {key!r} appears twice.")
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata


def _read_tensors(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, GgufTensor]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.path} is broken: general.alignment = {alignment!r} is not a power of two.")
    rough: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        name = cursor.string()
        dims = cursor.scalar("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise CheckpointError(f"{cursor.path} is broken: tensor {name!r} claims {dims} dimensions.")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
        rough.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_id, offset in rough:
        if name in tensors:
            raise CheckpointError(f"{cursor.path} is broken: the tensor {name!r} appears twice.")
        tensors[name] = _place(cursor, name, shape, type_id, start + offset)
    return tensors


def _place(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
    constants = require_gguf().constants
    try:
        kind = constants.GGMLQuantizationType(type_id)
        block, nbytes_block = constants.GGML_QUANT_SIZES[kind]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} has the unknown type {type_id}.",
            hint="Upgrade the package gguf, or use a file quantised to a common type (Q4_K, Q8_0, F16, ...).",
        ) from error
    if 0 in shape or shape[-1] % block:
        raise CheckpointError(
            f"{cursor.path} is broken: tensor {name!r} has shape {shape}, "
            f"but rows of {kind.name} come in blocks of {block}."
        )
    nbytes = prod(shape) // block * nbytes_block
    if offset + nbytes > cursor.size:
        raise CheckpointError(
            f"{cursor.path} is cut off: tensor {name!r} ends at byte {offset + nbytes}, "
            f"but the file has {cursor.size} bytes.",
            hint="Download or convert it again.",
        )
    return GgufTensor(name, shape, kind.name, type_id, offset, nbytes)
