"""``llamamoe.tokenize``: turn text into shards of token ids, in many processes, whole or not at all.

Files are written to ``OUT.partial/``. Its ledger has a line for every finished unit of input files, with the hashes
of its shards; ``resume`` checks them and processes the others.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.ledger import LEDGER, Ledger, check_left, partial_path
from ..checkpoint.out_folder import normal_path, system_errors
from ..errors import LlamaMoeError
from ..progress import RESUMED, Progress, ProgressCallback, ignore_progress
from .processes import spread
from .recipe import TokenizeRecipe
from .token_index import INDEX_FILE, VALIDATION, TokenIndex, read_index
from .token_merge import WORK, assemble, check_out, final_places, publish
from .token_plan import TokenizePlan, plan_tokenize
from .tokenizing import Settings, Unit, UnitRecord, holds, lowest_hashes, tokenizer_of
from .vocabulary import Vocabulary, open_vocabulary

HELD_OUT = "held out"
"""Name of the ledger's line with the limits of `Settings.held_out`."""


@dataclass(frozen=True)
class Tokenized:
    """The result of a tokenisation.

    Attributes:
        out: The output folder.
        index: The content of its ``index.json``.
        units: Number of units of input files.
        kept: Number of units that an earlier run had finished.
        seconds: Duration of this run.
        warnings: Sentences for the user.
    """

    out: Path
    index: TokenIndex
    units: int
    kept: int
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data, without the list of shards."""
        splits = {
            split: {
                domain: entry.model_dump(mode="json", exclude={"shards"}) | {"shards": len(entry.shards)}
                for domain, entry in found.items()
            }
            for split, found in self.index.splits.items()
        }
        return {
            "out": str(self.out),
            **self.index.model_dump(mode="json", exclude={"splits", "sources", "format", "version"}),
            "splits": splits,
            "sources": len(self.index.sources),
            "units": self.units,
            "kept": self.kept,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


def tokenize(
    recipe: TokenizeRecipe,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    strict: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> Tokenized:
    """Turn text into a folder of tokens, which `llamamoe.data.shards.TokenCorpus` reads.

    Documents of a domain are concatenated in the order of files and rows, each followed by one
    end-of-sequence token; nothing is dropped. The bytes depend on text, tokenizer and recipe only, not on the number of
    processes or on stops. Cost: one core tokenises a few megabytes of text a second; ``validation.documents`` reads
    the text twice.

    Several workers are spawned processes, so a script needs ``if __name__ == "__main__":``.

    Args:
        recipe: The recipe.
        out: The folder to create; it must not exist, or be empty.
        resume: Continue a stopped run from ``OUT.partial/``.
        force: Discard the work of a stopped run.
        strict: Whether a row without usable text is an error; else it is skipped, counted and reported.
        progress: Called after every finished unit.

    Raises:
        UsageError: The text does not exist.
        RefusedError: ``out`` is not empty, is in use by another process, or ``resume`` is for another output.
        CheckpointError: The tokenizer's folder has no usable tokenizer.
        LlamaMoeError: A file is damaged, a domain has no document, with ``strict`` a bad row, or writing failed.
    """
    started = time.monotonic()
    plan, out = plan_tokenize(recipe), normal_path(out)
    check_left(partial_path(out), resume=resume, restart=force)
    vocabulary = open_vocabulary(recipe.tokenizer)
    fingerprint = plan.fingerprint(vocabulary)
    run = _Run(plan, vocabulary, partial_path(out), strict, progress)
    with system_errors(out):
        if not (resume and _published(out, fingerprint)):
            check_out(out)
            with _TokenLedger.opened(run.partial, fingerprint, resume=resume, restart=force and not resume) as ledger:
                records = run.records(ledger)
                assemble(run.partial, plan, vocabulary, records)
                publish(run.partial, out)
        index = read_index(out)
    return Tokenized(out, index, len(plan.units), run.kept, time.monotonic() - started, tuple(_warnings(index, plan)))


def _published(out: Path, fingerprint: str) -> bool:
    """Return whether a run was stopped between the rename to OUT and its last step, and do that step."""
    ledger = out / LEDGER
    if out.is_symlink() or not (ledger.is_file() and (out / INDEX_FILE).is_file()):
        return False
    try:
        first = json.loads(ledger.read_text(encoding="utf-8").split("\n", 1)[0])
    except ValueError:
        return False
    if not isinstance(first, dict) or first.get("fingerprint") != fingerprint:
        return False
    ledger.unlink()
    return True


class _TokenLedger(Ledger):
    """The ledger of a folder whose whole content llamamoe wrote, subfolders included."""

    @classmethod
    def opened(cls, folder: Path, fingerprint: str, *, resume: bool, restart: bool) -> _TokenLedger:
        return cls(folder, fingerprint, resume=resume, restart=restart)

    def __enter__(self) -> _TokenLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Run:
    plan: TokenizePlan
    vocabulary: Vocabulary
    partial: Path
    strict: bool
    progress: ProgressCallback
    kept: int = 0

    def records(self, ledger: Ledger) -> dict[str, UnitRecord]:
        """Process every unit and return its record, in order."""
        records = self._finished(ledger)
        self.kept = len(records)
        if ledger.units:
            self.progress(Progress(RESUMED, self.kept, len(self.plan.units), "unit"))
        if self.strict:
            self._refuse_bad(list(records.values()))
        work = self.partial / WORK
        for path in work.iterdir() if work.exists() else ():  # left by a killed run
            if path.name not in records:
                shutil.rmtree(path)
        settings = Settings(work, self.vocabulary, self.plan.recipe.shard_tokens, self.strict)
        settings = replace(settings, held_out=self._held_out(ledger))
        todo = [unit for unit in self.plan.units if unit.name not in records]
        done = self.plan.nbytes - sum(unit.nbytes for unit in todo)
        # the largest first, so that none starts after all others are done
        todo.sort(key=lambda unit: (-unit.nbytes, unit.number))
        for number, record in spread(tokenizer_of, settings, todo, self.plan.workers):
            unit = todo[number]
            hashes = {shard.file: shard.sha256 for _, _, shard in record.shards()}
            ledger.append({"unit": unit.name, "sha256": hashes, "info": record.to_json()})
            records[unit.name] = record
            done += unit.nbytes
            self.progress(Progress("tokenize", done, self.plan.nbytes, "byte", _detail(unit, record)))
        return {unit.name: records[unit.name] for unit in self.plan.units}

    def _finished(self, ledger: Ledger) -> dict[str, UnitRecord]:
        """Return the units that an earlier run finished and whose shards still match the ledger."""
        units = [unit.name for unit in self.plan.units if unit.name in ledger.units]
        records = {name: UnitRecord.from_json(ledger.units[name]["info"]) for name in units}
        moved = final_places(records) if len(units) == len(self.plan.units) else {}
        jobs = [
            [(tuple(self._places(name, shard.file, moved)), shard.sha256) for _, _, shard in records[name].shards()]
            for name in units
        ]
        good = set()
        for done, (number, held) in enumerate(spread(_checker, None, jobs, self.plan.workers), start=1):
            if held:
                good.add(units[number])
            self.progress(Progress("check", done, len(jobs), "unit"))
        return {name: record for name, record in records.items() if name in good}

    def _places(self, unit: str, file: str, moved: dict[tuple[str, str], str]) -> Iterator[Path]:
        yield self.partial / WORK / unit / file
        if (unit, file) in moved:
            yield self.partial / moved[unit, file]

    def _refuse_bad(self, records: Sequence[UnitRecord]) -> None:
        for record in records:
            if record.bad_first:
                raise LlamaMoeError(
                    record.bad_first[0], hint="Correct the file, or skip such rows by omitting --strict."
                )

    def _held_out(self, ledger: Ledger) -> int | dict[str, int] | None:
        """See `Settings.held_out`."""
        rule = self.plan.recipe.validation
        if rule is None:
            return None
        if rule.documents is None:
            return rule.hash_limit
        if HELD_OUT not in ledger.units:
            limits = self._limits(rule.documents)
            ledger.append({"unit": HELD_OUT, "sha256": {}, "info": limits})
            return limits
        return {domain: int(limit) for domain, limit in ledger.units[HELD_OUT]["info"].items()}

    def _limits(self, count: int) -> dict[str, int]:
        found: dict[str, set[int]] = {}
        jobs, done = self.plan.units, 0
        for number, hashes in spread(_hasher, count, jobs, self.plan.workers):
            for domain, lowest in hashes.items():
                found.setdefault(domain, set()).update(lowest)
            done += jobs[number].nbytes
            self.progress(Progress("hold out", done, self.plan.nbytes, "byte"))
        for domain, different in sorted(found.items()):
            if len(different) < count:
                raise LlamaMoeError(
                    f"The domain {domain!r} has only {len(different)} different documents, so {count} cannot be held out.",
                    hint="Hold out fewer (validation.documents), or a share (validation.share).",
                )
        return {domain: sorted(different)[count - 1] + 1 for domain, different in found.items()}


def _checker(_: None) -> Callable[[Any], bool]:
    return holds


def _hasher(count: int) -> Callable[[Unit], dict[str, list[int]]]:
    return functools.partial(lowest_hashes, count=count)


def _detail(unit: Unit, record: UnitRecord) -> str:
    tokens = sum(shard.tokens for _, _, shard in record.shards())
    more = f" and {len(unit.files) - 1} more" if len(unit.files) > 1 else ""
    return f"{unit.files[0][0].name}{more}: {tokens:,} tokens"


def _warnings(index: TokenIndex, plan: TokenizePlan) -> Iterator[str]:
    bad = index.bad_rows
    if bad.total:
        yield f"{bad.total:,} rows had no usable text and were left out, the first: {'; '.join(bad.first[:3])}"
    if plan.recipe.validation is not None:
        without = [domain for domain in index.splits["train"] if domain not in index.splits.get(VALIDATION, {})]
        if without:
            yield f"no document of {', '.join(without)} was held out for validation: the share is too small for so few"
