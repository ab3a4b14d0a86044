"""Read a folder of tokens: blocks of a domain's stream, memory-mapped, as if its shards were one array."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..checkpoint.manifest import file_sha256
from ..checkpoint.paths import check_regular, refuse_pointers
from ..errors import CheckpointError, RefusedError, UsageError, near_misses
from ..progress import Progress, ProgressCallback, ignore_progress
from .token_index import INDEX_FILE, TRAIN, VALIDATION, DomainEntry, TokenIndex, read_index

OPEN_FILES = 128
"""Number of shards mapped at a time: each keeps a file open, and their number per process is limited."""


def changed_shard(path: Path) -> CheckpointError:
    """Return the refusal of a shard whose bytes are not those that the index has the hash of."""
    return CheckpointError(
        f"'{path}' was changed since the text was tokenised: its hash differs.",
        hint="Copy the folder again, or tokenise again.",
    )


class TokenCorpus:
    """One split of a folder that `llamamoe.tokenize` wrote.

    A domain's tokens are cut into consecutive blocks of a length that the caller chooses; only the last incomplete
    block is never read. Opening checks the size of every file and reads none.

    Args:
        folder: The folder, or ``FOLDER/SPLIT``, such as ``tokens/validation``, for a split by its path.
        split: ``"train"`` or ``"validation"``; None: the path's split, else ``"train"``.

    Attributes:
        folder: The folder.
        split: The split.
        index: The index of the folder.
        domains: Names, in order.

    Raises:
        CheckpointError: The index is missing, damaged or empty, or a shard is missing or differs in size from the
            index.
        UsageError: The folder has no such split.
    """

    def __init__(self, folder: str | Path, split: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        above = self.folder.parent
        if not self.folder.exists() and self.folder.name in (TRAIN, VALIDATION) and (above / INDEX_FILE).is_file():
            self.folder, split = above, split or self.folder.name
        self.split = split = split or TRAIN
        self.index: TokenIndex = read_index(self.folder)
        if split not in self.index.splits:
            raise UsageError(
                f"'{self.folder}' has no split {split!r}.", hint=near_misses(split, sorted(self.index.splits))
            )
        self._entries: Mapping[str, DomainEntry] = self.index.splits[split]
        if not self._entries:
            raise CheckpointError(
                f"'{self.folder}' has no domain in its split {split!r}.", hint="Tokenise the text again."
            )
        self.domains = tuple(self._entries)
        self.dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._paths: dict[str, list[Path]] = {}
        self._ends: dict[str, np.ndarray] = {}
        self._maps: OrderedDict[Path, np.ndarray] = OrderedDict()
        for domain, entry in self._entries.items():
            self._paths[domain] = [self._sized(shard.file, shard.tokens) for shard in entry.shards]
            self._ends[domain] = np.cumsum([shard.tokens for shard in entry.shards], dtype=np.int64)

    def _sized(self, file: str, tokens: int) -> Path:
        parts = PurePosixPath(file).parts
        if len(parts) != 2 or ".." in parts or "\\" in file or file.startswith("/") or not file.isprintable():
            raise CheckpointError(f"the index of '{self.folder}' names {file!r}, which is not a file in it: refused.")
        path, expected = self.folder / file, tokens * self.dtype.itemsize
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise CheckpointError(
                    f"'{path}' is a symbolic link out of the folder (to '{path.resolve()}'): refused.",
                    hint="Copy the file into the folder.",
                )
            check_regular(path)
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"'{path}' cannot be read: {error.strerror or error}.", hint="Copy the folder again, or tokenise again."
            ) from None
        if size != expected:
            refuse_pointers([path])
            change = "cut short" if size < expected else "too long"
            raise CheckpointError(
                f"'{path}' is {change}: {size:,} bytes, and its {tokens:,} tokens take {expected:,}.",
                hint="Copy the folder again, or tokenise again.",
            )
        return path

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}  # every process has its own maps

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the content of blocks: equal fingerprints mean equal tokens."""
        shards = {domain: [shard.sha256 for shard in entry.shards] for domain, entry in self._entries.items()}
        return hashlib.sha256(json.dumps([self.index.dtype, shards]).encode()).hexdigest()

    def tokens(self, domain: str) -> int:
        """Return the number of tokens of a domain."""
        return self._entry(domain).tokens

    def num_blocks(self, domain: str, length: int) -> int:
        """Return the number of complete blocks of ``length`` tokens of a domain."""
        if length < 1:
            raise UsageError(f"The length of a block is {length}, but must be at least 1.")
        return self._entry(domain).tokens // length

    def _entry(self, domain: str) -> DomainEntry:
        if domain not in self._entries:
            raise UsageError(f"'{self.folder}' has no domain {domain!r}.", hint=near_misses(domain, list(self.domains)))
        return self._entries[domain]

    def verify(self, progress: ProgressCallback = ignore_progress) -> None:
        """Read all shards and compare them with the hashes of the index.

        Raises:
            CheckpointError: A shard has changed since it was written.
        """
        shards = [shard for entry in self._entries.values() for shard in entry.shards]
        for done, shard in enumerate(shards, start=1):
            if file_sha256(self.folder / shard.file) != shard.sha256:
                raise changed_shard(self.folder / shard.file)
            progress(Progress("check tokens", done, len(shards), "file"))

    def check_tokenizer(self, model: str | Path) -> None:
        """Refuse a model for which these ids have another meaning.

        Args:
            model: The model's folder.

        Raises:
            RefusedError: Its tokenizer produces other ids, begins or ends documents with other tokens, or the model has
                no embedding for an id that is used.
            CheckpointError: The folder has no tokenizer that can be loaded.
        """
        from ..models.loading import open_model
        from .vocabulary import open_vocabulary

        other, ours = open_vocabulary(model), self.index
        hint = f"Tokenise the text again with the tokenizer of '{model}'."
        # A folder written before ids_sha256 existed only has hashes of the tokenizer's files.
        alike = other.entry.sha256 == ours.tokenizer.sha256 or (
            other.entry.ids_sha256 == ours.tokenizer.ids_sha256
            if ours.tokenizer.ids_sha256
            else other.entry.file_sha256 == ours.tokenizer.file_sha256
        )
        if not alike:
            raise RefusedError(
                f"'{self.folder}' was written by the tokenizer of {ours.tokenizer.name}, and '{model}' has a different one.",
                hint=hint,
            )
        for what, there, here in (
            ("end-of-sequence", other.eos, ours.eos_token_id),
            ("leading", other.bos, ours.bos_token_id),
        ):
            if there != here:
                raise RefusedError(
                    f"The {what} token of '{model}' is {there}, but {here} in '{self.folder}'.", hint=hint
                )
        rows = open_model(Path(model)).config.vocab_size
        largest = max(entry.largest_id for entry in self._entries.values())
        if largest >= rows:
            raise RefusedError(
                f"'{self.folder}' holds the token {largest}, but '{model}' has a vocabulary of {rows}.", hint=hint
            )

    # ---- blocks ----------------------------------------------------------------------------------------------------

    def block(self, domain: str, index: int, length: int) -> np.ndarray:
        """Return one block, int64 ``[length]``. See `blocks`."""
        found: np.ndarray = self.blocks(domain, np.array([index]), length)[0]
        return found

    def blocks(self, domain: str, indices_B: np.ndarray, length: int) -> np.ndarray:
        """Return blocks of a domain, int64 ``[B, length]``: tokens ``i * length`` to ``(i + 1) * length`` each.

        Raises:
            UsageError: The domain does not exist.
            IndexError: The block does not exist.
            CheckpointError: A shard holds an id that the index excludes.
        """
        count = self.num_blocks(domain, length)
        starts_B = np.asarray(indices_B, dtype=np.int64) * length
        if len(starts_B) and not 0 <= starts_B.min() <= starts_B.max() < count * length:
            raise IndexError(f"the domain {domain!r} has {count} blocks of {length} tokens")
        out_BL = np.empty((len(starts_B), length), dtype=np.int64)
        ends = self._ends[domain]
        shard_B = np.searchsorted(ends, starts_B, side="right")
        inside_B = starts_B + length <= ends[shard_B] if len(starts_B) else np.empty(0, bool)
        for shard in np.unique(shard_B[inside_B]):
            rows = np.flatnonzero(inside_B & (shard_B == shard))
            begin = ends[shard - 1] if shard else 0
            windows = np.lib.stride_tricks.sliding_window_view(self._map(domain, shard), length)
            out_BL[rows] = windows[starts_B[rows] - begin]
        for row in np.flatnonzero(~inside_B):  # few: those that continue in the next shard
            out_BL[row] = np.concatenate(list(self._pieces(domain, int(starts_B[row]), length)))
        self._check_ids(domain, starts_B, out_BL)
        return out_BL

    def _check_ids(self, domain: str, starts_B: np.ndarray, ids_BL: np.ndarray) -> None:
        """Refuse an id above the largest in the index, for which the model's vocabulary was checked."""
        largest = self._entry(domain).largest_id
        if not ids_BL.size or int(ids_BL.max()) <= largest:
            return
        row, column = np.argwhere(ids_BL > largest)[0]
        place, ends = int(starts_B[row] + column), self._ends[domain]
        shard = int(np.searchsorted(ends, place, side="right"))
        raise CheckpointError(
            f"'{self._paths[domain][shard]}' holds the id {ids_BL[row, column]} at token "
            f"{place - int(ends[shard - 1] if shard else 0):,}, but by the index the largest is {largest}, of a vocabulary "
            f"of {self.index.vocab_size:,}.",
            hint="The file was changed or damaged: copy the folder again, or tokenise again.",
        )

    def gather(self, domain_B: np.ndarray, block_B: np.ndarray, length: int) -> np.ndarray:
        """Return blocks of several domains, int64 ``[B, length]``, in the order given.

        Args:
            domain_B: Index of each block's domain in `domains`.
            block_B: Index of the block in that domain; see `blocks`.
            length: Tokens per block.
        """
        out_BL = np.empty((len(domain_B), length), dtype=np.int64)
        for number in np.unique(domain_B):
            rows = np.flatnonzero(domain_B == number)
            out_BL[rows] = self.blocks(self.domains[number], block_B[rows], length)
        return out_BL

    def _pieces(self, domain: str, start: int, length: int) -> Iterator[np.ndarray]:
        ends = self._ends[domain]
        shard = int(np.searchsorted(ends, start, side="right"))
        while length:
            begin = int(ends[shard - 1]) if shard else 0
            piece = self._map(domain, shard)[start - begin : start - begin + length]
            yield piece
            start, length, shard = start + len(piece), length - len(piece), shard + 1

    def _map(self, domain: str, shard: int) -> np.ndarray:
        path = self._paths[domain][shard]
        if path in self._maps:
            self._maps.move_to_end(path)
            return self._maps[path]
        try:
            found = np.memmap(path, dtype=self.dtype, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}' cannot be read: {error}.", hint="It was there at the start.") from None
        self._maps[path] = found
        if len(self._maps) > OPEN_FILES:
            self._maps.popitem(last=False)
        return found
