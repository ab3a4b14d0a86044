"""Order and name the shards of all units, and publish them with their index, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..checkpoint.files import remove_temporaries, sync_path, write_text
from ..checkpoint.ledger import LEDGER
from ..errors import LlamaMoeError, RefusedError
from .token_index import (
    INDEX_FILE,
    TRAIN,
    VALIDATION,
    BadRows,
    DomainEntry,
    ShardEntry,
    SourceFile,
    TokenIndex,
    shard_file,
)
from .token_plan import TokenizePlan
from .tokenizing import UnitRecord
from .vocabulary import Vocabulary

WORK = "work"
"""Name of the folder for the units' folders, in ``OUT.partial/``."""
RECIPE_FILE = "llamamoe_recipe.yaml"
_FIRST_BAD = 10


def check_out(out: Path) -> None:
    """Refuse an OUT that is not empty.

    Raises:
        RefusedError: OUT is a file, a link, or a folder that is not empty.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        kind = "a symbolic link" if out.is_symlink() else "not a folder"
        raise RefusedError(f"OUT ({out}) exists and is {kind}.", hint="Choose another name.")
    if out.exists() and any(out.iterdir()):
        raise RefusedError(f"OUT ({out}) exists and is not empty.", hint="Choose another name, or remove it first.")


def final_places(records: Mapping[str, UnitRecord]) -> dict[tuple[str, str], str]:
    """Return the destination of each unit's shards.

    Args:
        records: Records by unit, in the order of the units.

    Returns:
        (unit, file in its folder) to the file in the finished folder.
    """
    places: dict[tuple[str, str], str] = {}
    counts: dict[tuple[str, str], int] = {}
    for unit, record in records.items():
        for split, domain, shard in record.shards():
            number = counts.get((split, domain), 0)
            counts[split, domain] = number + 1
            places[unit, shard.file] = shard_file(domain, split, number)
    return places


def assemble(
    partial: Path, plan: TokenizePlan, vocabulary: Vocabulary, records: Mapping[str, UnitRecord]
) -> TokenIndex:
    """Move every shard to its place and write the index last. A second call finishes what a kill interrupted.

    Args:
        partial: The folder in which OUT is assembled.
        plan: The plan.
        vocabulary: The tokenizer.
        records: Records by unit, in the order of the units; the shards are in the units' folders or, if already
            moved, in their final place.

    Raises:
        LlamaMoeError: There is no document at all, or a domain of the recipe has none (or none left for training).
        OSError: Moving or writing failed.
    """
    places = final_places(records)
    index = _index(plan, vocabulary, records, places)
    _check(index, plan)
    for (unit, file), place in places.items():
        target, source = partial / place, partial / WORK / unit / file
        if source.exists():
            target.parent.mkdir(exist_ok=True)
            source.replace(target)
    for folder in {(partial / place).parent for place in places.values()}:
        sync_path(folder)
    write_text(partial / RECIPE_FILE, plan.recipe.to_yaml())
    write_text(partial / INDEX_FILE, index.to_json())
    sync_path(partial)
    return index


def publish(partial: Path, out: Path) -> None:
    """Rename the finished folder to ``OUT``.

    Raises:
        RefusedError: Another process filled it meanwhile.
    """
    shutil.rmtree(partial / WORK, ignore_errors=True)
    remove_temporaries(partial)
    if out.exists():
        if any(out.iterdir()):
            raise RefusedError(f"OUT ({out}) was filled by another process meanwhile.", hint="Choose another name.")
        out.rmdir()
    partial.rename(out)
    sync_path(out.parent)
    (out / LEDGER).unlink(missing_ok=True)  # after the rename: without it a stopped run could not be recognised


def _index(
    plan: TokenizePlan,
    vocabulary: Vocabulary,
    records: Mapping[str, UnitRecord],
    places: Mapping[tuple[str, str], str],
) -> TokenIndex:
    gathered: dict[str, dict[str, list[tuple[str, DomainEntry]]]] = {}
    for unit, record in records.items():
        for split, found in record.splits.items():
            for domain, entry in found.items():
                gathered.setdefault(split, {}).setdefault(domain, []).append((unit, entry))
    splits = {
        split: {domain: _joined(gathered[split][domain], places) for domain in sorted(gathered[split])}
        for split in sorted(gathered)
    }
    rule = plan.recipe.validation
    return TokenIndex(
        tokenizer=vocabulary.entry,
        vocab_size=vocabulary.size,
        eos_token_id=vocabulary.eos,
        bos_token_id=vocabulary.bos,
        dtype="uint16" if vocabulary.dtype == "uint16" else "uint32",
        splits=splits,
        validation=None if rule is None else rule.model_dump(mode="json", exclude_none=True),
        bad_rows=_bad_rows(list(records.values())),
        sources=tuple(SourceFile(file=str(path), bytes=path.stat().st_size) for path, _ in plan.files),
    )


def _joined(parts: Sequence[tuple[str, DomainEntry]], places: Mapping[tuple[str, str], str]) -> DomainEntry:
    entries = [entry for _, entry in parts]
    return DomainEntry(
        documents=sum(entry.documents for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        text_bytes=sum(entry.text_bytes for entry in entries),
        largest_id=max(entry.largest_id for entry in entries),
        shards=tuple(_moved(parts, places)),
    )


def _moved(parts: Sequence[tuple[str, DomainEntry]], places: Mapping[tuple[str, str], str]) -> Iterator[ShardEntry]:
    for unit, entry in parts:
        for shard in entry.shards:
            yield shard.model_copy(update={"file": places[unit, shard.file]})


def _bad_rows(records: Sequence[UnitRecord]) -> BadRows:
    by_domain: dict[str, int] = {}
    for record in records:
        for domain, count in record.bad_rows.items():
            by_domain[domain] = by_domain.get(domain, 0) + count
    first = [line for record in records for line in record.bad_first]
    total = sum(by_domain.values())
    return BadRows(total=total, by_domain=dict(sorted(by_domain.items())), first=tuple(first[:_FIRST_BAD]))


def _check(index: TokenIndex, plan: TokenizePlan) -> None:
    train, held_out = index.splits.get(TRAIN, {}), index.splits.get(VALIDATION, {})
    bad = (
        f" {index.bad_rows.total} rows held none, the first: {index.bad_rows.first[0]}" if index.bad_rows.total else ""
    )
    if not train and not held_out:
        raise LlamaMoeError(f"The text contains no document.{bad}", hint="Each row needs its text under 'text'.")
    for domain in plan.recipe.domains or {}:
        if domain not in train and domain not in held_out:
            raise LlamaMoeError(
                f"The domain {domain!r} is named in the recipe, but its files contain no document.{bad}",
                hint="Give it other files, or remove it from the recipe.",
            )
    emptied = sorted(held_out.keys() - train.keys())
    if emptied:
        raise LlamaMoeError(
            f"All documents of {', '.join(emptied)} would be held out for validation.", hint="Hold out less."
        )
