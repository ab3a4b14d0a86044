"""``llamamoe.export_tokens``: a folder of tokens as the indexed datasets that Megatron-LM and Megatron-Bridge train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..checkpoint.files import replacing
from ..checkpoint.ledger import Ledger, partial_path
from ..checkpoint.out_folder import check_apart, free_bytes, normal_path, system_errors
from ..errors import RefusedError, UsageError, near_misses
from ..progress import RESUMED, Progress, ProgressCallback, ignore_progress
from .shards import TokenCorpus, changed_shard
from .token_index import TokenIndex, domain_folder, read_index
from .token_merge import check_out, publish

FORMATS = ("megatron",)
HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {"uint16": (8, "<u2"), "uint32": (4, "<i4")}
"""By dtype of the shards: Megatron's code of the dtype with the same bytes, and that dtype. It has no uint32."""
_AT_ONCE = 1 << 22
"""Number of tokens, or entries of an index, that are in memory at a time."""
_ENTRY = 4 + 8 + 8
"""Bytes of a document in the index: length, place, and that a document ends there."""


@dataclass(frozen=True)
class ExportedDomain:
    """One domain of one split, as ``PREFIX.bin`` and ``PREFIX.idx``.

    Attributes:
        split: ``train`` or ``validation``.
        domain: Its name.
        prefix: Path of both files without their ending, relative to OUT.
        documents: Number of documents, each with its end-of-sequence token.
        tokens: Number of tokens, end-of-sequence tokens included.
    """

    split: str
    domain: str
    prefix: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class TokensExport:
    """The result of an export.

    Attributes:
        out: The folder.
        dtype: Dtype of a token in the ``.bin`` files, as numpy calls it.
        domains: What was written.
        warnings: Sentences for the user.
    """

    out: Path
    dtype: str
    domains: tuple[ExportedDomain, ...]
    warnings: tuple[str, ...]

    def data_path(self, split: str) -> list[str]:
        """Return the arguments of Megatron's ``--data-path`` for a split: each domain's tokens and its prefix."""
        found = [each for each in self.domains if each.split == split]
        return [word for each in found for word in (str(each.tokens), str(self.out / each.prefix))]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        splits = dict.fromkeys(each.split for each in self.domains)
        paths = {split: self.data_path(split) for split in splits}
        return {**asdict(self), "out": str(self.out), "data_path": paths}


def export_tokens(
    tokens: str | Path,
    out: str | Path,
    *,
    format: str = "megatron",
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> TokensExport:
    """Write a folder of tokens as one indexed dataset per split and domain, for another training program.

    A dataset is ``OUT/SPLIT/DOMAIN.bin``, the tokens of the domain's shards one after another, and ``.idx``, the length
    and place of every document: tokens up to and including an end-of-sequence token, as Megatron's own
    ``preprocess_data.py --append-eod`` writes them. The shards' hashes are checked while they are copied. Files are
    written to ``OUT.partial/``, which is renamed to ``OUT``. Memory: 4 bytes for each document of a domain.

    Reference: ``megatron/core/datasets/indexed_dataset.py`` of Megatron-LM.

    Args:
        tokens: A folder that `llamamoe.tokenize` wrote.
        out: The folder to create; it must not exist, or be empty.
        format: ``"megatron"``.
        resume: Continue a stopped run from ``OUT.partial/``.
        force: Discard the files of a stopped run.
        progress: Called after every shard.

    Raises:
        UsageError: The format is unknown.
        CheckpointError: The folder is not one of tokens, or a shard is damaged.
        RefusedError: ``out`` is not empty or in use, the disk is too small, or the ids do not fit.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown.", hint=near_misses(format, list(FORMATS)))
    index, place = read_index(Path(tokens).expanduser()), normal_path(out)
    corpora = {split: TokenCorpus(tokens, split) for split, entries in index.splits.items() if entries}
    code, dtype = _dtype(index)
    with system_errors(place):
        check_apart(place, next(iter(corpora.values())).folder, "the folder of tokens")
        check_out(place)
        _check_room(place, index, resume=resume)
        run = _Run(corpora, index, code, np.dtype(dtype), partial_path(place), progress)
        fingerprint = hashlib.sha256(json.dumps([c.fingerprint for c in corpora.values()]).encode()).hexdigest()
        ledger = Ledger(
            run.folder, f"export-tokens {format} {fingerprint}", resume=resume, restart=force and not resume
        )
        try:
            domains = tuple(run.domains(ledger))
            publish(run.folder, place)
        finally:
            ledger.close()
    return TokensExport(place, np.dtype(dtype).name, domains, tuple(run.warnings(domains)))


def _dtype(index: TokenIndex) -> tuple[int, str]:
    largest = max((entry.largest_id for split in index.splits.values() for entry in split.values()), default=0)
    if largest >= 2**31:
        raise RefusedError(
            f"the largest token id is {largest:,}, but Megatron reads ids as int32, below {2**31:,}.",
            hint="Tokenise the text with a smaller vocabulary.",
        )
    return DTYPES[index.dtype]


def _check_room(out: Path, index: TokenIndex, *, resume: bool) -> None:
    entries = [entry for split in index.splits.values() for entry in split.values()]
    need = sum(entry.tokens * np.dtype(index.dtype).itemsize + (entry.documents + 4) * _ENTRY for entry in entries)
    have = free_bytes(out, resume=resume)
    if have < need:
        raise RefusedError(
            f"the export takes {need:,} bytes, and the disk of '{out}' has {have:,} free.",
            hint="Free some space, or choose an OUT on another disk.",
        )


@dataclass
class _Run:
    corpora: dict[str, TokenCorpus]
    index: TokenIndex
    code: int
    dtype: np.dtype[Any]
    folder: Path
    progress: ProgressCallback

    def domains(self, ledger: Ledger) -> Iterator[ExportedDomain]:
        """Write every domain that an earlier run did not finish."""
        prefixes = [f"{split}/{domain_folder(d)}" for split, corpus in self.corpora.items() for d in corpus.domains]
        if ledger.units:
            self.progress(Progress(RESUMED, sum(map(ledger.units.__contains__, prefixes)), len(prefixes), "domain"))
        total = sum(len(entry.shards) for split in self.index.splits.values() for entry in split.values())
        done = 0
        for split, corpus in self.corpora.items():
            (self.folder / split).mkdir(exist_ok=True)
            for domain in corpus.domains:
                found = ExportedDomain(split, domain, f"{split}/{domain_folder(domain)}", 0, corpus.tokens(domain))
                kept = ledger.units.get(found.prefix)
                documents = None if kept is None else self._kept(found, kept["info"]["documents"])
                if documents is None:
                    documents = self._write(corpus, found, done, total)
                    ledger.append({"unit": found.prefix, "info": {"documents": documents}, "sha256": {}})
                done += len(self.index.splits[split][domain].shards)
                yield replace(found, documents=documents)

    def _kept(self, domain: ExportedDomain, documents: int) -> int | None:
        """Return the number of documents of files that an earlier run finished; None if they are not whole."""
        sizes = {"bin": domain.tokens * self.dtype.itemsize, "idx": len(HEADER) + 25 + documents * _ENTRY + 8}
        paths = {self.folder / f"{domain.prefix}.{ending}": size for ending, size in sizes.items()}
        whole = all(path.is_file() and not path.is_symlink() and path.stat().st_size == n for path, n in paths.items())
        return documents if whole else None

    def _write(self, corpus: TokenCorpus, domain: ExportedDomain, done: int, total: int) -> int:
        """Write both files of a domain; the number of its documents."""
        path, lengths, rest = self.folder / domain.prefix, [], 0
        with replacing(path.with_name(f"{path.name}.bin")) as file:
            for number, shard in enumerate(self.index.splits[domain.split][domain.domain].shards, start=1):
                digest = hashlib.sha256()
                for piece in self._pieces(corpus.folder / shard.file):
                    digest.update(piece)
                    file.write(piece)
                    found, rest = _lengths(np.frombuffer(piece, self.dtype), self.index.eos_token_id, rest)
                    lengths.append(found)
                if digest.hexdigest() != shard.sha256:
                    raise changed_shard(corpus.folder / shard.file)
                self.progress(Progress("export tokens", done + number, total, "file"))
        if rest:
            lengths.append(np.array([rest], dtype=np.int32))
        lengths_D = np.concatenate(lengths) if lengths else np.empty(0, np.int32)
        with replacing(path.with_name(f"{path.name}.idx")) as file:
            _write_index(file, self.code, self.dtype.itemsize, lengths_D)
        return len(lengths_D)

    def _pieces(self, path: Path) -> Iterator[bytes]:
        """Yield the bytes of a shard, of a few million whole ids at a time."""
        with path.open("rb") as file:
            while piece := file.read(_AT_ONCE * self.dtype.itemsize):
                yield piece

    def warnings(self, domains: tuple[ExportedDomain, ...]) -> Iterator[str]:
        """Yield what a user should know of the documents."""
        for each in domains:
            documents = self.index.splits[each.split][each.domain].documents
            if each.documents != documents:
                yield (
                    f"{each.split}/{each.domain} has {documents:,} documents and {each.documents:,} end-of-sequence tokens: "
                    "Megatron sees a document end at each of them."
                )


def _lengths(ids: np.ndarray, eos: int, rest: int) -> tuple[np.ndarray, int]:
    """Return lengths of the documents that end in these ids, int32, and the number of tokens after the last of them.

    Args:
        ids: The next tokens of a domain.
        eos: The token that ends a document.
        rest: Number of tokens before them that no end followed.
    """
    ends = np.flatnonzero(ids == eos) + 1
    if not len(ends):
        return np.empty(0, np.int32), rest + len(ids)
    lengths = np.diff(ends, prepend=0)
    lengths[0] += rest
    return lengths.astype(np.int32), len(ids) - int(ends[-1])


def _write_index(file: IO[bytes], code: int, itemsize: int, lengths_D: np.ndarray) -> None:
    """Write the index: header, then length, byte offset and end of each document."""
    documents = len(lengths_D)
    file.write(HEADER + VERSION.to_bytes(8, "little") + code.to_bytes(1, "little"))
    file.write(documents.to_bytes(8, "little") + (documents + 1).to_bytes(8, "little"))
    file.write(lengths_D.astype("<i4").tobytes())
    offset = 0
    for start in range(0, documents, _AT_ONCE):
        nbytes = lengths_D[start : start + _AT_ONCE].astype("<i8") * itemsize
        ends = offset + np.cumsum(nbytes)
        file.write((ends - nbytes).astype("<i8").tobytes())
        offset = int(ends[-1])
    for start in range(0, documents + 1, _AT_ONCE):
        file.write(np.arange(start, min(start + _AT_ONCE, documents + 1), dtype="<i8").tobytes())
