"""Read and write ``index.json`` of a folder of tokens: its content, text and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..checkpoint.json_files import read_json
from ..checkpoint.paths import refuse_pointers
from ..errors import CheckpointError

INDEX_FILE = "index.json"
FORMAT = "llamamoe tokens"
VERSION = 1
TRAIN, VALIDATION = "train", "validation"
LONGEST_FOLDER = 200


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Part):
    """One file of token ids: raw, little endian.

    Attributes:
        file: Its path relative to the folder, with ``/``.
        tokens: Number of ids.
        sha256: SHA-256 of its bytes.
    """

    file: str
    tokens: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class DomainEntry(_Part):
    """One domain of one split.

    Attributes:
        documents: Number of documents; each is followed by one end-of-sequence token.
        tokens: Tokens of all shards, separators included.
        text_bytes: UTF-8 bytes of the documents.
        largest_id: The largest token id among them.
        shards: Files in reading order; a document may continue in the next one.
    """

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    largest_id: int = Field(ge=0)
    shards: tuple[ShardEntry, ...]


class TokenizerEntry(_Part):
    """The tokenizer that made the ids.

    Attributes:
        name: Its folder's name, for display.
        sha256: Hash of all that decides ids, in a form that saving the tokenizer again does not change.
        file_sha256: Hash of the bytes of ``tokenizer.json``, or of the files of the vocabulary.
        ids_sha256: Hash of vocabulary, merges and the ids of probe text; empty in older folders.
    """

    name: str
    sha256: str
    file_sha256: str
    ids_sha256: str = ""


class BadRows(_Part):
    """Rows without a usable document, which were skipped.

    Attributes:
        total: Their number.
        by_domain: Their number by the domain of their file (their own cannot be read).
        first: The first few, each with its origin.
    """

    total: int = 0
    by_domain: dict[str, int] = {}
    first: tuple[str, ...] = ()


class SourceFile(_Part):
    """A file of text that was read; ``bytes`` as on disk."""

    file: str
    bytes: int


class TokenIndex(_Part):
    """The index of a folder of tokens.

    Attributes:
        tokenizer: The tokenizer that made the ids.
        vocab_size: One more than the tokenizer's largest id.
        eos_token_id: The token after every document.
        bos_token_id: The token before every document; None if the tokenizer itself adds none.
        dtype: Dtype of the shards.
        splits: Entries by split and domain; domains are sorted by name.
        validation: The rule by which documents were held out, or None.
        bad_rows: Skipped rows.
        sources: Every input file, in order.
    """

    format: Literal["llamamoe tokens"] = "llamamoe tokens"
    version: Literal[1] = 1
    tokenizer: TokenizerEntry
    vocab_size: int = Field(ge=1)
    eos_token_id: int = Field(ge=0)
    bos_token_id: int | None
    dtype: Literal["uint16", "uint32"]
    splits: dict[str, dict[str, DomainEntry]]
    validation: dict[str, Any] | None
    bad_rows: BadRows
    sources: tuple[SourceFile, ...]

    @model_validator(mode="after")
    def _within_vocabulary(self) -> TokenIndex:
        for split, domains in self.splits.items():
            for name, entry in domains.items():
                if entry.largest_id >= self.vocab_size:
                    raise PydanticCustomError(
                        "id",
                        "{split}.{name} holds the id {id}, but the vocabulary has {size}",
                        {"split": split, "name": name, "id": entry.largest_id, "size": self.vocab_size},
                    )
        return self

    def tokens(self, split: str = TRAIN) -> dict[str, int]:
        """Return the tokens of each domain of a split."""
        return {name: entry.tokens for name, entry in self.splits.get(split, {}).items()}

    def to_json(self) -> str:
        """Return the index as JSON text, as it is written."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def domain_folder(domain: str) -> str:
    """Return the folder of a domain: its name with all but letters, digits, ``_`` and ``-`` escaped.

    Raises:
        CheckpointError: The name is too long for a file system.
    """
    name = quote(domain, safe="").replace(".", "%2E").replace("~", "%7E")
    if not 0 < len(name) <= LONGEST_FOLDER:
        raise CheckpointError(
            f"{domain[:60]!r}{'...' if len(domain) > 60 else ''} cannot be the name of a domain: it is empty or too long.",
            hint="Name the domain of these files in the recipe, under domains.",
        )
    return name


def shard_file(domain: str, split: str, number: int) -> str:
    """Return the path of a shard in the finished folder."""
    prefix = "" if split == TRAIN else f"{split}-"
    return f"{domain_folder(domain)}/{prefix}{number:05d}.bin"


def read_index(folder: Path) -> TokenIndex:
    """Read ``index.json``.

    Raises:
        CheckpointError: The index is missing, invalid, or was written by a newer version.
    """
    path = folder / INDEX_FILE
    refuse_pointers([path])
    if not path.is_file():
        raise CheckpointError(
            f"'{folder}' is not a folder of tokens: it has no {INDEX_FILE}.",
            hint="Write one with llamamoe tokenize; a stopped run is finished with --resume.",
        )
    try:
        data = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"'{folder}': {error.message}", hint="Tokenise the text again.") from None
    if data.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is not the index of a folder of tokens.", hint="Name another folder.")
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"'{path}' has format version {data.get('version')!r}, and this llamamoe reads version {VERSION}.",
            hint="Update llamamoe, or tokenise the text again.",
        )
    try:
        return TokenIndex.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"'{path}' is damaged: {place}: {first['msg']}.", hint="Tokenise the text again."
        ) from None
