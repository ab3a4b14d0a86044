"""Write a checkpoint derived from another: the same tensors with other values, streamed, whole or not at all."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .._version import __version__
from ..architectures.dense_checkpoint import refuse_foreign
from ..architectures.targets import TARGETS
from ..checkpoint.base import Checkpoint
from ..checkpoint.files import write_text
from ..checkpoint.layout import Shards, as_stored, index_json
from ..checkpoint.ledger import check_left, fingerprint_of, partial_path, remove_states
from ..checkpoint.locate import Location, locate_folder
from ..checkpoint.memory import reused_memory
from ..checkpoint.out_folder import DERIVED_FILE, check_out, check_room, normal_path, recover_replaced, system_errors
from ..checkpoint.reader import INDEX, SINGLE, SafetensorsCheckpoint
from ..checkpoint.readme import derived_card
from ..checkpoint.receipts import DOCUMENT_HASHES, documents_fitted_to
from ..checkpoint.tokenizer import CarriedFiles, carried_files
from ..checkpoint.writer import CheckpointWriter
from ..conversion.verify_files import Hashes
from ..errors import LlamaMoeError
from ..lazy import torch
from ..models.loadable import check_counts, check_loads, check_model
from ..progress import Progress, ProgressCallback, ignore_progress

OUTER = "outer"


@dataclass(frozen=True)
class Rewriting:
    """The description of a derived checkpoint.

    Attributes:
        deed: The command's name; also the key of its entry in config.json.
        title: The headline of the card.
        sources: The source models; the first gives names, shapes, files and tokenizer.
        checkpoints: The opened source models.
        config: The configuration, complete except for the entry about this command.
        make: Returns a tensor by its name: contiguous, on the CPU, with the first source's dtype and shape.
        facts: The facts as JSON-compatible data.
        story: The same for the card, in sentences.
        warnings: Sentences for the user.
        shards: The files to write; None: those of the first source.
        read_too: Other opened models that decide the result.
        record: More facts that decide the result, for the receipt only.
        told: Returns facts of a finished unit for the receipt; asked for once the unit's tensors were made.
        scratch: Bytes of files that the run needs beside the result.
        counts_threads: Whether the bytes depend on the number of threads, because products over text decide them.
        verify: Checks the folder before it appears, given the hashes of the weights; returns what goes into the receipt.
    """

    deed: str
    title: str
    sources: tuple[Location, ...]
    checkpoints: tuple[SafetensorsCheckpoint, ...]
    config: Mapping[str, Any]
    make: Callable[[str], torch.Tensor]
    facts: Mapping[str, Any]
    story: str
    warnings: tuple[str, ...] = ()
    shards: Shards | None = None
    read_too: tuple[Checkpoint, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    told: Callable[[str], Mapping[str, Any]] | None = None
    scratch: int = 0
    counts_threads: bool = False
    verify: Callable[[Path, Hashes], Mapping[str, Any]] | None = None

    @property
    def base(self) -> SafetensorsCheckpoint:
        """The first of the sources."""
        return self.checkpoints[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes for tensors in self.files().values() for _, _, nbytes in tensors.values())

    def files(self) -> Shards:
        """Return the files to write."""
        return as_stored(self.base.tensors) if self.shards is None else self.shards

    def units(self) -> dict[str, list[str]]:
        """Return tensors by the unit that is finished together: a layer, or all tensors outside layers."""
        found: dict[str, list[str]] = {}
        for name in (name for tensors in self.files().values() for name in tensors):
            layer = name.removeprefix("model.layers.").split(".")[0] if name.startswith("model.layers.") else ""
            found.setdefault(f"layer.{layer}" if layer.isdigit() else OUTER, []).append(name)
        return found

    def fingerprint(self) -> str:
        """Return a fingerprint that changes whenever a resumed run would write other bytes."""
        threads = {"number of threads": torch.get_num_threads()} if self.counts_threads else {}
        return fingerprint_of(
            {
                "command": self.deed,
                "version of llamamoe": __version__,
                "version of torch": torch.__version__,
                "source": [checkpoint.fingerprint() for checkpoint in (*self.checkpoints, *self.read_too)],
                "settings": [{**self.facts, **self.record}, dict(self.config), self.files()],
            }
            | threads
        )


def rewrite(
    job: Rewriting,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Write a `Rewriting` into a folder that appears whole or not at all; with one tensor in memory at a time.

    Args:
        job: The checkpoint to write.
        out: The folder to create; it must not exist, or be empty.
        resume: Finish a stopped call with the same arguments.
        force: Replace ``out`` if it holds a checkpoint by llamamoe, and discard the work of a stopped call.
        progress: Called after every layer.

    Returns:
        The receipt, as written to ``llamamoe_derived.json``.

    Raises:
        RefusedError: OUT would harm existing files, or the disk has too little room; nothing was written.
        LlamaMoeError: A value is not finite, or writing failed; then ``resume`` continues.
    """
    place = normal_path(out)
    check_place(
        place,
        [*(source.path for source in job.sources), *(each.path for each in job.read_too)],
        resume=resume,
        force=force,
    )
    check_room(place, job.nbytes + job.scratch, reuse=resume or force)
    check_model(job.config, {name: shape for file in job.files().values() for name, (_, shape, _) in file.items()})
    carried = carried_files(job.base, job.config)
    with (
        system_errors(place),
        CheckpointWriter(
            place, job.files(), fingerprint=job.fingerprint(), resume=resume, restart=force and not resume
        ) as writer,
    ):
        layers = _write_units(job, writer, progress)
        writer.flush()
        remove_states(writer.path)
        receipt = _receipt(job, writer.weights_sha256())
        if job.told is not None:
            receipt["layers"] = [facts for unit in layers if (facts := writer.info(unit))]
        _write_side_files(job, writer.path, carried)
        SafetensorsCheckpoint(writer.path)  # check that the result can be opened
        if job.verify is not None:
            hashes = Hashes(writer.weights_sha256(), writer.unit_sha256())
            receipt["verification"] = dict(job.verify(writer.path, hashes))
        write_text(writer.path / DERIVED_FILE, json.dumps(receipt, indent=2) + "\n")
        for read in (*job.checkpoints, *job.read_too):
            read.check_unchanged()
        writer.publish(replace=force)
    return receipt


def _write_units(job: Rewriting, writer: CheckpointWriter, progress: ProgressCallback) -> list[str]:
    """Write every missing unit; return the units that count as layers."""
    units = job.units()
    layers = [unit for unit in units if unit != OUTER] or [OUTER]
    writer.tell_kept(layers, "layer", progress)
    finished = set(filter(writer.done, layers))  # by an interrupted run
    with reused_memory():
        for unit, names in units.items():
            if not writer.done(unit):
                for name in names:
                    writer.make_room(name)
                    writer.put(name, _finite(name, job))
                writer.finish(unit, names, {} if job.told is None else dict(job.told(unit)))
            finished |= {unit}.intersection(layers)
            progress(Progress(job.deed, len(finished), len(layers), "layer", unit))
    return layers


def check_place(out: Path, read: Sequence[Path], *, resume: bool, force: bool, names: Sequence[str] = ()) -> None:
    """Refuse an OUT that would harm existing files, including models that are read.

    Args:
        out: The folder to write.
        read: The models that are read.
        resume: Whether a stopped call is continued.
        force: Whether a checkpoint by llamamoe in OUT may be replaced.
        names: Names of the first of ``read`` in messages; the others are called MODEL.

    Raises:
        RefusedError: See `llamamoe.checkpoint.out_folder.check_out` and `llamamoe.checkpoint.ledger.check_left`.
    """
    recover_replaced(out)
    for path, name in zip_longest(read, names[: len(read)], fillvalue="MODEL"):
        check_out(out, Path(path), force=force, name=name)
    check_left(partial_path(out), resume=resume, restart=force)


def _finite(name: str, job: Rewriting) -> torch.Tensor:
    from ..checkpoint.tensors import nonfinite

    value = job.make(name)
    if value.is_floating_point() and nonfinite(value):
        raise LlamaMoeError(
            f"{name} would hold NaN or infinite values ({value.dtype}).",
            hint="A source already contains them, or its dtype is too narrow for the result. Start again with another OUT or "
            "--force.",
        )
    return value


def _write_side_files(job: Rewriting, folder: Path, carried: CarriedFiles) -> None:
    if set(job.files()) != {SINGLE}:
        write_text(folder / INDEX, json.dumps(index_json(job.files()), indent=2, sort_keys=True) + "\n")
    block = dict(job.config.get("llamamoe") or {})
    block[job.deed] = [*block.get(job.deed, []), {"version": __version__, **job.facts}]
    config = {**job.config, "llamamoe": block}
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    carried.write(folder)
    check_loads(folder)
    folders, names = [each.path for each in job.checkpoints], [each.name for each in job.sources]
    moe = str(config["model_type"]) if config["model_type"] in TARGETS else None
    card = derived_card(folders, names, job.title, job.story, job.warnings, moe=moe)
    write_text(folder / "README.md", card)


def _receipt(job: Rewriting, weights_sha256: str) -> dict[str, Any]:
    return {
        "llamamoe": __version__,
        "made_by": job.deed,
        "sources": [{"name": source.name, "revision": source.revision} for source in job.sources],
        **job.facts,
        **job.record,
        DOCUMENT_HASHES: documents_fitted_to(*(each.path for each in job.checkpoints)),
        "weights_sha256": weights_sha256,
        "warnings": list(job.warnings),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "safetensors")},
    }


def opened(source: str | Path) -> tuple[Location, SafetensorsCheckpoint]:
    """Open a folder of safetensors whose weights can be rewritten.

    Raises:
        CheckpointError: The path is a file, its files are broken or disagree, it has its own code, or its weights are
            quantised.
    """
    location = locate_folder(source)
    checkpoint = SafetensorsCheckpoint(location.path)
    refuse_foreign(checkpoint)
    check_counts(checkpoint.config, checkpoint.tensors)
    return location, checkpoint


def same_tensors(checkpoints: Sequence[SafetensorsCheckpoint]) -> list[str]:
    """Return the reasons why the tensors of the checkpoints do not correspond one to one; empty if they do."""
    first, reasons = checkpoints[0], []
    for other in checkpoints[1:]:
        for here, there in ((first, other), (other, first)):
            missing = sorted(here.tensors.keys() - there.tensors.keys())
            if missing:
                reasons.append(f"{there.path} lacks {missing[0]} ({len(missing)} tensors of {here.path} are missing)")
        for name in sorted(first.tensors.keys() & other.tensors.keys()):
            shapes = first.tensors[name].shape, other.tensors[name].shape
            if shapes[0] != shapes[1]:
                reasons.append(f"{name} is {list(shapes[0])} in {first.path}, but {list(shapes[1])} in {other.path}")
                break
    return reasons
