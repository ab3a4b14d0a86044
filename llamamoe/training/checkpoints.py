"""Save and load the checkpoints of a run, of one process or many. Not imported by plans."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import distributed as dist

from ..checkpoint.files import make_folder
from ..errors import ElsewhereError, LlamaMoeError
from .lora import save_rest
from .native_weights import pending_weights, save_config
from .optimizer_state import load_optimizer, load_random, optimizer_state, random_state, save_schedule
from .ownership import STAGING, publish
from .ranks import several_ranks
from .resuming import OPTIMIZER, by_deepspeed, metrics_facts, note_files, optimizer_file, state_errors
from .run_folder import checkpoints, is_of_the_disk, rotate
from .saving import Background, Report, all_files, on_all_ranks, write_files, write_index
from .shards import PendingFile, pending_shard

if TYPE_CHECKING:
    from .trainer import MoeTrainer

_PATIENCE = timedelta(days=1)
"""Longest time in which ranks wait for the slowest one to write; a rank that dies is noticed at once."""


class Checkpoints:
    """The checkpoints of a run.

    Weights are divided among the ranks by layers, as a native checkpoint in several files; the optimiser's state as it is
    sharded, each part once. Every rank writes, syncs and hashes its files and reports them to the first, which writes
    the list of all files last and then renames the folder: a checkpoint without its list, or in the staging folder, is
    never taken for whole, and no rank has to trust what its file system shows of the files of others.

    In the background, each rank first copies its part to main memory, so that training goes on; the ranks meet in a
    process group of their own, and the next save waits for this one.

    Adapters are saved by peft, and the state of a run by DeepSpeed in DeepSpeed's own files.

    Args:
        trainer: The Trainer of the run.
    """

    def __init__(self, trainer: MoeTrainer) -> None:
        self._trainer, self._parts, self._args = trainer, trainer.parts, trainer.args
        self._recipe, self._folder = trainer.parts.recipe, trainer.parts.folder
        self.divides_weights = not by_deepspeed(self._recipe) and self._recipe.lora is None
        self._background = Background() if self._recipe.save_in_background else None
        self._group: Any = None
        if self._background is not None and several_ranks():
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def save(self, save_others: Callable[[], None]) -> None:
        """Write the checkpoint of the present step; then delete older ones. Every rank must call it.

        In the background only the large files are written, after this function has returned.

        Args:
            save_others: Writes what transformers saves, on the ranks that it chooses.

        Raises:
            LlamaMoeError: A file cannot be written on some rank; raised on all of them. In the background, it is a file of
                the checkpoint before this one.
        """
        self.finish()
        step = self._trainer.state.global_step
        folder = self._folder / STAGING / f"checkpoint-{step}"
        with self._write_errors(folder):
            on_all_ranks(lambda: self._first(lambda: shutil.rmtree(folder, ignore_errors=True)))
            on_all_ranks(lambda: self._save_small(folder, save_others))
            pending = self._pending(folder)
        write = partial(self._save_large, folder, *pending, step=step, metrics=self._metrics())
        if self._background is not None:
            self._background.start(write)
        else:
            write()
            self._rotate()

    def _metrics(self) -> dict[str, Any]:
        return metrics_facts(self._folder) if self._args.should_save else {}

    def finish(self) -> None:
        """Wait for the checkpoint that is written in the background, if any. Every rank must call it.

        Raises:
            LlamaMoeError: It could not be written; raised on all ranks.
        """
        if self._background is not None and self._background.wait():
            self._rotate()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Wait at the end of the block, after an error as well; not after Ctrl-C."""
        try:
            yield
        except Exception:
            with suppress(Exception):  # the first error tells why
                self.finish()
            raise
        self.finish()

    def _rotate(self) -> None:
        on_all_ranks(lambda: self._first(lambda: rotate(self._folder, self._recipe.keep)))

    def _first(self, work: Callable[[], None]) -> None:
        if self._args.should_save:
            work()

    def _save_small(self, folder: Path, save_others: Callable[[], None]) -> None:
        """Write what one rank writes: configuration, tokenizer, the state of schedule, mixture and gate."""
        make_folder(folder / OPTIMIZER)
        save_others()
        if self._args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # an unused pickle
            self._parts.finish_checkpoint(folder)
            self._parts.dynamics.save(folder, self._trainer.state.global_step)
            if self._recipe.lora is not None:
                save_rest(self._trainer.model, folder)
            if not by_deepspeed(self._recipe):
                save_schedule(self._trainer.lr_scheduler, folder)

    def _pending(self, folder: Path) -> tuple[Sequence[PendingFile], PendingFile | None]:
        """Return this rank's part of the optimiser's state, and of the weights."""
        if by_deepspeed(self._recipe):
            return (), None
        rank, world, copy = self._args.process_index, self._args.world_size, self._background is not None
        state = optimizer_state(self._trainer.optimizer) | random_state(rank)
        shard = pending_shard(state, folder / optimizer_file(rank), copy=copy)
        if not self.divides_weights:
            return (shard,), None
        return (shard,), pending_weights(self._trainer.model, folder, rank, world, copy=copy)

    def _save_large(
        self,
        folder: Path,
        pending: Sequence[PendingFile],
        weights: PendingFile | None,
        *,
        step: int,
        metrics: dict[str, Any],
    ) -> None:
        """Write this rank's files, then on the first rank index and manifest; then rename the folder."""
        with self._write_errors(folder):
            reports = on_all_ranks(lambda: write_files(folder, pending, weights), self._group)
            publish_all = partial(self._publish, folder, reports, step=step, metrics=metrics)
            on_all_ranks(lambda: self._first(publish_all), self._group)

    def _publish(self, folder: Path, reports: Sequence[Report], *, step: int, metrics: dict[str, Any]) -> None:
        write_index(folder, reports)
        note_files(
            folder,
            self._folder,
            self._recipe,
            step=step,
            ranks=self._args.world_size,
            written=all_files(reports),
            metrics=metrics,
        )
        publish(self._folder, folder.name)

    @contextmanager
    def _write_errors(self, folder: Path) -> Iterator[None]:
        """Report an error of the disk as one of the checkpoint."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_of_the_disk(error):  # a device or another rank failed, which is reported elsewhere
                raise
            raise self._not_saved(folder, error) from error

    def _not_saved(self, folder: Path, error: Exception) -> LlamaMoeError:
        self._first(lambda: shutil.rmtree(folder, ignore_errors=True))
        there = checkpoints(self._folder)
        last = f"The last good checkpoint is {there[-1].name}" if there else "No checkpoint was written before it"
        reason = getattr(error, "strerror", None) or str(error)
        if not self._args.should_save:
            return ElsewhereError(f"{folder.name} cannot be written: {reason}, as the first process reports.")
        name = Path(getattr(error, "filename", None) or folder)
        if name.is_relative_to(folder) and name != folder:
            reason += f" ({name.relative_to(folder)})"
        return LlamaMoeError(
            f"{folder.name} cannot be written: {reason}. {last}.",
            hint="Free some space, then go on with --resume."
            if there
            else "Free some space; --resume begins at the first step.",
        )

    def save_model(self, folder: Path) -> None:
        """Write the model's configuration, whose weights are divided among the ranks."""
        self._first(lambda: save_config(self._trainer.model, folder))

    def load_optimizer(self, folder: Path) -> None:
        """Read the state of optimiser and schedule. Every rank must call it.

        Raises:
            CheckpointError: It does not fit the run.
        """
        with state_errors(str(folder)):
            load_optimizer(self._trainer.optimizer, self._trainer.lr_scheduler, folder)

    def load_random(self, folder: Path) -> None:
        """Set the generators of random numbers.

        Raises:
            CheckpointError: Their state is damaged.
        """
        seed = self._recipe.seed + self._trainer.state.global_step
        with state_errors(str(folder)):
            load_random(folder, self._args.process_index, self._args.world_size, seed)
