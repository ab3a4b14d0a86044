"""Read a tokenizer for tokenising: everything that decides ids, and a hash of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .token_index import TokenizerEntry

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that needs no transformers, for worker processes.

    Attributes:
        backend: The fast tokenizer as JSON.
        entry: Entry for the index.
        size: One more than the largest id.
        bos: The id that the tokenizer itself adds before a text, or None.
        eos: The id that ends a document.
        split_special: Whether special tokens in a text are treated as text (transformers' default: no).
    """

    backend: str
    entry: TokenizerEntry
    size: int
    bos: int | None
    eos: int
    split_special: bool = False

    @property
    def dtype(self) -> str:
        """The narrowest dtype that holds every id."""
        return "uint16" if self.size <= 2**16 else "uint32"


def open_vocabulary(folder: str | Path) -> Vocabulary:
    """Read the tokenizer of a model's folder or GGUF file, without the network and without remote code.

    Raises:
        UsageError: The folder or file does not exist.
        CheckpointError: There is no usable tokenizer: none at all, no fast one, or one without an end of
            sequence.
    """
    from ..checkpoint.tokenizer_difference import ids_sha256
    from ..models.loading import open_model

    opened = open_model(Path(folder))
    tokenizer = opened.tokenizer
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer of '{folder}' ({type(tokenizer).__name__}) has no fast form.",
            hint="Save it once as a fast tokenizer, so that there is a tokenizer.json.",
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokenizer of '{folder}' has no end-of-sequence token, so documents cannot be separated.",
            hint="Name one as eos_token in tokenizer_config.json.",
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # state of its last use
    canonical = json.dumps(backend, sort_keys=True, ensure_ascii=False)
    split_special = bool(tokenizer.backend_tokenizer.encode_special_tokens)
    entry = TokenizerEntry(
        name=Path(folder).resolve().name,
        sha256=hashlib.sha256(canonical.encode() + b"split special" * split_special).hexdigest(),
        file_sha256=_files_sha256(Path(folder).expanduser()),
        ids_sha256=ids_sha256(tokenizer),
    )
    size = 1 + max(tokenizer.get_vocab().values())
    return Vocabulary(canonical, entry, size, opened.bos, tokenizer.eos_token_id, split_special)


def _files_sha256(folder: Path) -> str:
    """Hash the files that decide ids; empty for a GGUF file, whose tokenizer is identified by ``ids_sha256``."""
    digest = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
            if name == "tokenizer.json":  # it contains everything
                break
    return digest.hexdigest()
