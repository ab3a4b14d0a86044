"""Run ``llamamoe tokenize`` on many nodes by datatrove's executors (Slurm, Ray), with byte-identical results.

    files = SlurmPipelineExecutor([TokenizeFiles(recipe, "tokens")], tasks=64, logging_dir="logs/files", ...)
    SlurmPipelineExecutor([MergeIndex(recipe, "tokens")], tasks=1, depends=files, logging_dir="logs/merge", ...).run()

``recipes/tokenize/cluster.py`` is such a script. All nodes must have the same paths. Units are tokenised and put
together by the functions that ``llamamoe tokenize`` uses; only the record of a finished unit differs. There one process
writes a ledger under a lock; here tasks on several nodes share no lock, so each unit's record is beside its shards.

On one machine `processes.spread` is faster than datatrove's local executor (BENCHMARKS.md), starts with the largest
units, and leaves no process behind when the main one is killed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint.files import is_locked, write_text
from ..checkpoint.ledger import LEDGER, in_use, partial_path
from ..errors import LlamaMoeError, RefusedError, UsageError
from ..lazy import require
from .recipe import TokenizeRecipe
from .token_index import TokenIndex
from .token_merge import WORK, assemble, check_out, publish
from .token_plan import plan_tokenize
from .tokenizing import Settings, Unit, UnitRecord, holds, tokenizer_of
from .vocabulary import open_vocabulary

PipelineStep: Any = require("datatrove.pipeline.base", "cluster", "Tokenising on many nodes").PipelineStep
RECORD = "unit.json"


class TokenizeFiles(PipelineStep):  # type: ignore[misc]  # datatrove is optional, and has no types
    """The step that tokenises every unit whose number equals the task's rank modulo the number of tasks.

    Args:
        recipe: As for `llamamoe.tokenize`, with the same result; ``workers`` is ignored.
        out: The folder to create.
        strict: Whether a row without usable text is an error.

    Raises:
        UsageError: The recipe holds out a number of documents, which requires reading all text first.
        RefusedError: ``out`` is not empty.
    """

    type = "llamamoe"
    name = "tokenise files"

    def __init__(self, recipe: TokenizeRecipe, out: str | Path, *, strict: bool = False) -> None:
        super().__init__()
        if recipe.validation is not None and recipe.validation.documents is not None:
            raise UsageError(
                "validation.documents needs all text to be read before anything is written, which a single task cannot do.",
                hint="Hold out a share (validation.share).",
            )
        self.recipe, self.out, self.strict = recipe, Path(out).absolute(), strict
        check_out(self.out)
        if is_locked(partial_path(self.out) / LEDGER):
            raise in_use(partial_path(self.out))
        if (partial_path(self.out) / LEDGER).exists():
            raise RefusedError(
                f"{partial_path(self.out)} is left from a run of llamamoe tokenize.",
                hint="Finish it there with --resume, or remove it.",
            )

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Tokenise the task's units; called by datatrove."""
        plan, vocabulary = plan_tokenize(self.recipe), open_vocabulary(self.recipe.tokenizer)
        fingerprint, work = plan.fingerprint(vocabulary), partial_path(self.out) / WORK
        rule = self.recipe.validation
        held_out = None if rule is None else rule.hash_limit
        settings = Settings(work, vocabulary, self.recipe.shard_tokens, self.strict, held_out)
        tokenize = tokenizer_of(settings)
        for unit in plan.units[rank::world_size]:
            record = _finished(work, unit, fingerprint)
            if record is None:
                with self.track_time("unit"):
                    record = tokenize(unit)
                kept = {"fingerprint": fingerprint, "record": record.to_json()}
                write_text(work / unit.name / RECORD, json.dumps(kept))
            for split, found in record.splits.items():
                for domain, entry in found.items():
                    self.stat_update(f"{split}/{domain}", value=entry.tokens, unit="unit")
        return data


class MergeIndex(PipelineStep):  # type: ignore[misc]
    """The step that orders the shards of all units, writes the index and publishes OUT; one task, after the others.

    Args:
        recipe: The same as for `TokenizeFiles`.
        out: The same as for `TokenizeFiles`.
    """

    type = "llamamoe"
    name = "merge"

    def __init__(self, recipe: TokenizeRecipe, out: str | Path) -> None:
        super().__init__()
        self.recipe, self.out = recipe, Path(out).absolute()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Merge the units; called by datatrove."""
        if rank == 0:
            merge(self.recipe, self.out)
        return data


def merge(recipe: TokenizeRecipe, out: Path) -> TokenIndex:
    """See `MergeIndex`. Reads the records, not the shards.

    Raises:
        LlamaMoeError: Units are not finished, or were finished with another recipe, tokenizer or text.
        RefusedError: ``out`` is not empty.
    """
    check_out(out)
    plan, vocabulary = plan_tokenize(recipe), open_vocabulary(recipe.tokenizer)
    fingerprint, partial = plan.fingerprint(vocabulary), partial_path(out)
    records = {unit.name: _record(partial / WORK, unit, fingerprint) for unit in plan.units}
    whole = {name: record for name, record in records.items() if record is not None}
    missing = [name for name in records if name not in whole]
    if missing:
        raise LlamaMoeError(
            f"{len(missing)} of {len(records)} units in {partial} are not finished, or belong to another recipe, tokenizer "
            f"or text; the first is {missing[0]}.",
            hint="Run the tasks of TokenizeFiles again: they only process missing units.",
        )
    index = assemble(partial, plan, vocabulary, whole)
    publish(partial, out)
    return index


def _record(work: Path, unit: Unit, fingerprint: str) -> UnitRecord | None:
    try:
        data = json.loads((work / unit.name / RECORD).read_text(encoding="utf-8"))
        return UnitRecord.from_json(data["record"]) if data["fingerprint"] == fingerprint else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _finished(work: Path, unit: Unit, fingerprint: str) -> UnitRecord | None:
    """Return the record of a unit that an earlier run finished, if its shards are unchanged."""
    record = _record(work, unit, fingerprint)
    if record is None:
        return None
    shards = [((work / unit.name / shard.file,), shard.sha256) for _, _, shard in record.shards()]
    return record if holds(shards) else None
