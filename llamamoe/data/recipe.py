"""Recipes of ``llamamoe tokenize``: text, tokenizer and output files."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ..recipes import Count, Paths, Recipe, form

DomainName = Annotated[
    str, form(r"[^\x00-\x1f\x7f]{1,80}", "must have 1 to 80 characters, none of them a control character")
]


class Validation(BaseModel):
    """The held-out part of every domain: a share of its documents, or a number of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float | None = Field(None, gt=0, lt=1, description="Share of each domain's documents, approximately.")
    documents: int | None = Field(None, ge=1, description="Number of documents per domain.")

    @model_validator(mode="after")
    def _one(self) -> Validation:
        if (self.share is None) == (self.documents is None):
            raise PydanticCustomError("validation", "give either share or documents")
        return self

    @property
    def hash_limit(self) -> int | None:
        """With ``share``: limit below which texts are held out by their 64-bit hash."""
        return None if self.share is None else round(self.share * 2**64)


class TokenizeRecipe(Recipe):
    """Everything that decides what ``llamamoe tokenize`` writes, and with how many processes."""

    tokenizer: str = Field(min_length=1, description="Model folder or .gguf file with the tokenizer.")
    text: Paths = Field((), description="Files, folders or globs; the domain is the row's, the file's or the folder's.")
    domains: dict[DomainName, Paths] | None = Field(
        None, min_length=1, description="Files, folders or globs by domain; overrides the domains in the rows."
    )
    text_column: str = Field(
        "text",
        min_length=1,
        description="Field of JSON lines, or column of Parquet and Arrow files, with the documents.",
    )
    shard_tokens: Annotated[int, Count] = Field(
        2**28, ge=1, le=2**40, description="Maximum number of tokens in one output file."
    )
    gather_bytes: int = Field(
        0, ge=0, description="Input files are grouped, in order, up to this many bytes; 0: each is its own group."
    )
    workers: int | None = Field(None, ge=1, le=4096, description="Number of processes; null: one per core.")
    validation: Validation | None = Field(
        None, description="Held-out part of every domain, chosen by the hash of the text; null: none."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TokenizeRecipe:
        if not self.text and not self.domains:
            raise PydanticCustomError("text", "no text is named: give text, domains, or both")
        for name, paths in (self.domains or {}).items():
            if not paths:
                raise PydanticCustomError("domains", "domains.{name}: no path is named", {"name": name})
        return self

    def deciding(self) -> dict[str, Any]:
        """Return the keys that decide the result: all but the number of processes."""
        return self.model_dump(mode="json", exclude={"workers"})

    def to_yaml(self) -> str:
        """Return the recipe as YAML, for the result's folder."""
        return yaml.safe_dump(self.deciding(), sort_keys=False, allow_unicode=True)


load_tokenize_recipe = TokenizeRecipe.load
