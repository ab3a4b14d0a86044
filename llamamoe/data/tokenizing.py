"""Turn text into shards of token ids, one unit of input files at a time, with the same bytes on every machine.

A unit is written into its own folder, ``WORK/000012/SPLIT/DOMAIN/00000.bin``, which appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import make_folder, sync_path
from ..checkpoint.manifest import file_sha256
from ..errors import LlamaMoeError
from ..lazy import tokenizers
from .shard_writer import DomainWriter
from .text import Document, read_files
from .token_index import TRAIN, VALIDATION, DomainEntry, ShardEntry, domain_folder
from .vocabulary import Vocabulary

BATCH_CHARACTERS = 1 << 18
FIRST_BAD = 3


@dataclass(frozen=True)
class Unit:
    """Input files that one process turns into shards.

    Attributes:
        number: Its index in the order of all units.
        files: Path, and the domain for rows without one.
        fixed: For each file, whether the domain applies to all its rows.
        nbytes: Size of the files.
        column: The field or column of rows with the documents.
    """

    number: int
    files: tuple[tuple[Path, str], ...]
    fixed: tuple[bool, ...]
    nbytes: int
    column: str = "text"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Settings:
    """The settings that all units share.

    Attributes:
        work: The folder of the units' folders.
        vocabulary: The tokenizer.
        shard_tokens: Maximum number of tokens per shard.
        strict: Whether a row without usable text is an error.
        held_out: Limit of `text_hash` (of all domains, or by domain) below which documents are for validation.
    """

    work: Path
    vocabulary: Vocabulary
    shard_tokens: int
    strict: bool
    held_out: int | dict[str, int] | None = None


@dataclass
class UnitRecord:
    """The result of a unit; the shards' files are relative to its folder."""

    splits: dict[str, dict[str, DomainEntry]] = field(default_factory=dict)
    bad_rows: dict[str, int] = field(default_factory=dict)
    bad_first: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-compatible data."""
        splits = {s: {d: e.model_dump(mode="json") for d, e in found.items()} for s, found in self.splits.items()}
        return {"splits": splits, "bad_rows": self.bad_rows, "bad_first": self.bad_first}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UnitRecord:
        """Return the record from the data of `to_json`."""
        splits = {
            s: {d: DomainEntry.model_validate(e) for d, e in found.items()} for s, found in data["splits"].items()
        }
        return cls(splits, dict(data["bad_rows"]), list(data["bad_first"]))

    def shards(self) -> Iterator[tuple[str, str, ShardEntry]]:
        """Yield split, domain and entry of every shard, in order."""
        for split, found in self.splits.items():
            for domain, entry in found.items():
                yield from ((split, domain, shard) for shard in entry.shards)


def text_hash(text: str) -> int:
    """Return the first 64 bits of the SHA-256 of a document's exact text, equal for equal texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def read_unit(unit: Unit, record: UnitRecord, *, strict: bool) -> Iterator[Document]:
    """Yield the documents of a unit; rows without usable text are counted in ``record``, or refused by ``strict``."""
    for (path, domain), fixed in zip(unit.files, unit.fixed, strict=True):

        def count(error: LlamaMoeError, domain: str = domain) -> None:
            record.bad_rows[domain] = record.bad_rows.get(domain, 0) + 1
            if len(record.bad_first) < FIRST_BAD:
                record.bad_first.append(error.message)

        for document in read_files([(path, domain)], on_bad_row=None if strict else count, column=unit.column):
            yield Document(document.text, domain, document.origin) if fixed else document


def holds(job: Sequence[tuple[tuple[Path, ...], str]]) -> bool:
    """Return whether each file is at one of its places with its hash."""
    return all(any(file_sha256(path) == digest for path in places) for places, digest in job)


def lowest_hashes(unit: Unit, count: int) -> dict[str, list[int]]:
    """Return the ``count`` smallest `text_hash` of each domain's distinct texts, ascending. Reads the unit once."""
    found: dict[str, list[int]] = {}
    for document in read_unit(unit, UnitRecord(), strict=False):
        hashes = found.setdefault(document.domain, [])
        hashes.append(text_hash(document.text))
        if len(hashes) > 2 * count + 10_000:
            found[document.domain] = sorted(set(hashes))[:count]
    return {domain: sorted(set(hashes))[:count] for domain, hashes in found.items()}


def tokenizer_of(settings: Settings) -> Callable[[Unit], UnitRecord]:
    """Return a function that tokenises one unit; see `tokenize_unit`. Cheap, because transformers is not used."""
    tokenizer = tokenizers.Tokenizer.from_str(settings.vocabulary.backend)
    tokenizer.encode_special_tokens = settings.vocabulary.split_special
    return lambda unit: tokenize_unit(unit, settings, tokenizer)


def tokenize_unit(unit: Unit, settings: Settings, tokenizer: Any) -> UnitRecord:
    """Tokenise a unit's documents into ``WORK/UNIT/``; every byte is on disk when this returns.

    Each document is the tokenizer's leading token (if it has one), its ids, and the end-of-sequence token; nothing is
    dropped. In memory are a batch of documents and a few megabytes of each domain's tokens.

    Raises:
        LlamaMoeError: A file cannot be read or is damaged, or with ``strict`` a row holds no usable text.
        OSError: The shards cannot be written.
    """
    make_folder(settings.work)
    folder = Path(tempfile.mkdtemp(prefix=f"{unit.name}.", dir=settings.work))
    try:
        record = UnitRecord()
        writers: dict[tuple[str, str], DomainWriter] = {}
        for batch in _batches(read_unit(unit, record, strict=settings.strict)):
            _add(batch, settings, tokenizer, writers, folder)
        for (split, domain), writer in sorted(writers.items()):
            record.splits.setdefault(split, {})[domain] = writer.close()
        final = settings.work / unit.name
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        sync_path(settings.work)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return record


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _add(
    batch: list[Document],
    settings: Settings,
    tokenizer: Any,
    writers: dict[tuple[str, str], DomainWriter],
    folder: Path,
) -> None:
    vocabulary, limit = settings.vocabulary, settings.held_out
    before = [] if vocabulary.bos is None else [vocabulary.bos]
    encoded = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
    for document, encoding in zip(batch, encoded, strict=True):
        bound = limit.get(document.domain, 0) if isinstance(limit, dict) else limit
        split = VALIDATION if bound and text_hash(document.text) < bound else TRAIN
        key = (split, document.domain)
        if key not in writers:
            place = f"{split}/{domain_folder(document.domain)}"
            writers[key] = DomainWriter(folder, place, np.dtype(vocabulary.dtype), settings.shard_tokens)
        ids = np.array([*before, *encoding.ids, vocabulary.eos], dtype=writers[key].dtype)
        writers[key].add(ids, len(document.text.encode()))
