"""Plan ``llamamoe tokenize``: its input, units and approximate cost, without opening files of text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LlamaMoeError, UsageError
from .files import find_files, unpacked_bytes
from .recipe import TokenizeRecipe
from .text import read_files
from .token_index import FORMAT, VERSION
from .tokenizing import Unit
from .vocabulary import Vocabulary

BYTES_PER_TOKEN = 4.2
"""Approximate bytes per token of English text and code, for vocabularies of 32 000 to 128 000."""
TEXT_BYTES_PER_SECOND = 1.7e6
"""Approximate speed of one core: see BENCHMARKS.md."""


@dataclass(frozen=True)
class TokenizePlan:
    """The plan of a tokenisation.

    Attributes:
        recipe: The recipe.
        units: Units of input files, in order.
        workers: Number of processes.
    """

    recipe: TokenizeRecipe
    units: tuple[Unit, ...]
    workers: int

    @property
    def files(self) -> list[tuple[Path, str]]:
        """All input files with their domain, in order."""
        return [file for unit in self.units for file in unit.files]

    @property
    def nbytes(self) -> int:
        """Size of the input files."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def text_bytes(self) -> float:
        """Estimate of the unpacked text."""
        return unpacked_bytes(path for path, _ in self.files)

    @property
    def tokens(self) -> float:
        """Estimate of the tokens."""
        return self.text_bytes / BYTES_PER_TOKEN

    @property
    def seconds(self) -> float:
        """Estimate of the time; no unit is cut, so the largest one is a bound."""
        largest = max(unit.nbytes for unit in self.units) / max(1, self.nbytes)
        return max(1 / self.workers, largest) * self.text_bytes / TEXT_BYTES_PER_SECOND

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "files": [
                {"file": str(path), "domain": domain, "bytes": path.stat().st_size} for path, domain in self.files
            ],
            "units": len(self.units),
            "workers": self.workers,
            "bytes": self.nbytes,
            "estimate": {
                "text_bytes": round(self.text_bytes),
                "tokens": round(self.tokens),
                "seconds": round(self.seconds, 1),
            },
        }

    def fingerprint(self, vocabulary: Vocabulary) -> str:
        """Return a hash of all that decides the result; sources by path, size and time of change."""
        files = []
        for unit in self.units:
            for (path, domain), fixed in zip(unit.files, unit.fixed, strict=True):
                facts = path.stat()
                files.append([unit.number, str(path), domain, fixed, facts.st_size, facts.st_mtime_ns])
        tokenizer = [vocabulary.entry.sha256, vocabulary.bos, vocabulary.eos]
        data = [FORMAT, VERSION, self.recipe.deciding(), tokenizer, files]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def plan_tokenize(recipe: TokenizeRecipe) -> TokenizePlan:
    """Find the text and divide it into units.

    Raises:
        UsageError: Paths that match nothing, files of an unknown kind, or a file that two domains claim.
        MissingExtraError: zstandard or pyarrow is needed and not installed.
    """
    found = list(_named(recipe))
    read_files([(path, domain) for path, domain, _ in found])  # only checks that the packages are installed
    units: list[Unit] = []
    group: list[tuple[Path, str, bool]] = []
    size = 0
    for path, domain, fixed in found:
        nbytes = _size(path)
        if group and size + nbytes > recipe.gather_bytes:
            units.append(_unit(len(units), group, size, recipe.text_column))
            group, size = [], 0
        group.append((path, domain, fixed))
        size += nbytes
    units.append(_unit(len(units), group, size, recipe.text_column))
    return TokenizePlan(recipe, tuple(units), min(recipe.workers or _cores(), len(units)))


def _named(recipe: TokenizeRecipe) -> Iterator[tuple[Path, str, bool]]:
    """Yield every file once, with its domain and whether the recipe names that domain."""
    owner: dict[Path, str] = {}
    for domain, patterns in (recipe.domains or {}).items():
        try:
            files = find_files(patterns)
        except UsageError as error:
            raise UsageError(f"the domain {domain!r} has no text: {error.message}", hint=error.hint) from None
        for path, _ in files:
            other = owner.setdefault(path.resolve(), domain)
            if other != domain:
                raise UsageError(
                    f"'{path}' belongs to two domains: {other} and {domain}.", hint="Give each file to one domain."
                )
            yield path, domain, True
    for path, domain in find_files(recipe.text) if recipe.text else []:
        if path.resolve() not in owner:
            yield path, domain, False


def _unit(number: int, group: list[tuple[Path, str, bool]], size: int, column: str) -> Unit:
    return Unit(number, tuple((p, d) for p, d, _ in group), tuple(fixed for _, _, fixed in group), size, column)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise LlamaMoeError(f"Cannot read '{path}': {error.strerror or error}.") from error


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not available on every system
        return os.cpu_count() or 1
