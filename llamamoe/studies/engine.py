"""Run the cells of a study with one dense model in memory, replacing its FFNs by one conversion after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from ..alignment.layers import AlignedLayer
from ..calibration.compute import Compute, choose_compute
from ..calibration.gradients import GradientStore
from ..calibration.reading import FITTED, shared_documents
from ..calibration.text import CalibrationText
from ..checkpoint.files import make_folder
from ..checkpoint.locate import Location
from ..checkpoint.scratch import scratch_folder
from ..conversion.plan import SplitPlan
from ..conversion.recipe import AUTO
from ..conversion.texts import make_text, with_clusters
from ..errors import UsageError
from ..evaluation.perplexity import scoring_plan
from ..lazy import np, torch
from ..models.devices import pick_device
from ..models.loading import load_weights, open_model
from ..progress import ProgressCallback, ignore_progress
from .aligned import aligned_layers, folder_of, remove_alignments
from .by_layer import LayerPlans, measure_layers
from .cells import Cell
from .in_memory import InMemory, convert_in_memory
from .measure import finite, perplexity, replaced_ffns, result_of
from .meter import peak_bytes, reset_peak
from .recipe import CompareRecipe
from .store import recipe_facts, sha256_of

SAMPLED = "sampled"
_MEASURING = 0.7
"""Approximate share of the measurement of layers in the time until a cell with a k for each layer can be scored."""
_WORK, _CHECKPOINTS = "work", "checkpoints"


class Engine:
    """The shared state of a study's cells: evaluation text, calibration texts, dense model.

    Args:
        location: The source, a folder or a GGUF file.
        recipe: The study.
        out: Its folder, for checkpoints and large files.
        tokenizer: For a GGUF file, a folder whose tokenizer is used instead of the one in the file.

    Raises:
        UsageError: A text does not exist, or documents are in both texts.
        CheckpointError: The source, or its tokenizer, cannot be loaded.
        LlamaMoeError: A text cannot be read or has nothing to score.
    """

    def __init__(
        self, location: Location, recipe: CompareRecipe, out: Path, *, tokenizer: str | Path | None = None
    ) -> None:
        self.location, self.recipe, self.out, self._tokenizer = location, recipe, out, tokenizer
        self.device = pick_device(recipe.device)
        self.text, self.window = scoring_plan(
            open_model(location.path, tokenizer=tokenizer),
            recipe.evaluation,
            max_tokens=recipe.evaluation_tokens,
            context_length=recipe.context_length,
        )
        self._texts: dict[tuple[str, int, int, int], CalibrationText] = {}

    # ---- texts ------------------------------------------------------------------------------------------------

    @cached_property
    def evaluation_hash(self) -> str:
        """Hash of the scored tokens and their windows."""
        parts = [np.array([[w.document, w.start, w.stop] for w in self.text.windows])]
        names = "\0".join(each.document.domain for each in self.text.encoded)
        parts.append(np.frombuffer(names.encode(), dtype=np.uint8))
        return sha256_of(*parts, *(each.ids for each in self.text.encoded))

    def calibration_hash(self, plan: SplitPlan) -> str | None:
        """Return a hash of the calibration tokens; sampled text is identified by its recipe, without sampling it."""
        if plan.calibration is None:
            return None
        if plan.recipe.calibration == (AUTO,):
            return SAMPLED
        text = self.calibration_text(plan)
        more = [] if text.clusters_S is None else [text.clusters_S]
        if plan.recipe.align is not None:
            more.append(self._alignment_text(plan).ids_ST)
        return sha256_of(text.ids_ST, *more)

    def calibration_text(self, plan: SplitPlan, progress: ProgressCallback = ignore_progress) -> CalibrationText:
        """Return the text of a plan, made once for all cells that share it; refused if it overlaps the evaluation.

        Raises:
            UsageError: Documents are in both texts.
        """
        assert plan.calibration is not None
        text = self._text("calibration", plan, plan.recipe.calibration_tokens, plan.calibration.length, progress)
        return with_clusters(plan, text)

    def _alignment_text(self, plan: SplitPlan, progress: ProgressCallback = ignore_progress) -> CalibrationText:
        """Return the text of an alignment; refused if it overlaps the evaluation."""
        options = plan.recipe.align
        assert options is not None
        assert options.length is not None, "set by the plan"
        return self._text("alignment", plan, options.tokens, options.length, progress)

    def _text(
        self, purpose: str, plan: SplitPlan, tokens: int, length: int, progress: ProgressCallback
    ) -> CalibrationText:
        key = (purpose, plan.recipe.seed, length, tokens)
        if key not in self._texts:
            text = make_text(plan, self._compute(plan), progress, num_tokens=tokens, length=length)
            self._refuse_overlap(text)
            self._texts[key] = text
        return self._texts[key]

    def _refuse_overlap(self, text: CalibrationText) -> None:
        both = shared_documents(text.document_hashes, (each.document for each in self.text.encoded))
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise UsageError(
                f"{both[0]}{more} would be evaluated on, but the same text is in the calibration text.",
                hint=f"Calibrate on other documents: {FITTED}.",
            )

    def text_facts(self) -> dict[str, Any]:
        """Return the amounts of evaluation and calibration text by domain."""
        tokens = {domain: int(self.text.tokens[members].sum()) for domain, members in self.text.domains.items()}
        facts: dict[str, Any] = {"evaluation": {"window": self.window, "scored_tokens": tokens}}
        for (purpose, seed, _, wanted), text in self._texts.items():
            name = f"seed {seed}" if purpose == "calibration" else f"seed {seed}, {wanted} tokens"
            facts.setdefault(purpose, {})[name] = text.facts
        return facts

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings about the calibration texts."""
        return tuple(dict.fromkeys(w for text in self._texts.values() for w in text.warnings))

    # ---- cells ------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> Any:
        """The dense model of transformers."""
        return load_weights(self.text.side, self.recipe.dtype, self.device)

    def _compute(self, plan: SplitPlan) -> Compute:
        return choose_compute(plan.recipe.device, plan.recipe.compute_dtype, plan.source_dtype)

    def measure(self, cell: Cell, advance: Callable[[float], None]) -> dict[str, Any]:
        """Convert in memory, and score.

        Args:
            cell: The cell.
            advance: Called with the finished share, from 0 to 1.

        Returns:
            The result as JSON-compatible data, see `llamamoe.studies.table`.

        Raises:
            LlamaMoeError: A value is not finite, or a text is not available.
        """
        model = self.model  # excluded from the cell's time
        text = self.calibration_text(cell.plan) if cell.plan and cell.plan.calibration else None
        began = time.monotonic()
        facts: Sequence[Mapping[str, Any]] = ()
        reset_peak(self.device)
        walk = 0.0 if cell.plan is None else 0.1 if text is None else 0.8  # share of the time, roughly
        scored = int(self.text.tokens.sum())
        done = 0

        def score(tokens: int) -> None:
            nonlocal done
            done += tokens
            advance(walk + (1 - walk) * min(1.0, done / scored))

        ffns: Mapping[int, Any] = {}
        own: LayerPlans | None = None
        if cell.plan is not None:
            first = _MEASURING if cell.by_layer else 0.0
            own = self._by_layer(cell, text, lambda share: advance(walk * first * share))
            converted = self._convert(cell, text, own, lambda share: advance(walk * (first + (1 - first) * share)))
            ffns, facts = converted.ffns, converted.facts
        with replaced_ffns(model, ffns):
            scores = perplexity(model, self.text, self.recipe.batch_size, score)
        return result_of(cell, scores, own) | {
            "layers": finite(facts),
            "seconds": round(time.monotonic() - began, 3),
            "peak_bytes": peak_bytes(self.device),
            "device": self.device,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _by_layer(
        self, cell: Cell, text: CalibrationText | None, advance: Callable[[float], None]
    ) -> LayerPlans | None:
        """Measure the layers and return the plan of each, if the cell has a k for each layer."""
        if cell.by_layer is None:
            return None
        assert cell.plan is not None
        assert text is not None, "cells without text are refused"
        with scratch_folder() as folder:
            return measure_layers(cell.plan, cell.by_layer, text, self._compute(cell.plan), folder, advance)

    def _convert(
        self,
        cell: Cell,
        text: CalibrationText | None,
        own: LayerPlans | None,
        advance: Callable[[float], None],
    ) -> InMemory:
        plan = cell.plan
        assert plan is not None
        compute, layers, aligned = self._compute(plan), plan.model.spec.num_layers, 0.0
        given: Mapping[int, AlignedLayer] = {}
        if plan.recipe.align is not None:
            assert text is not None, "it needs calibration text"
            assert plan.alignment is not None
            assert plan.calibration is not None
            aligned = plan.alignment.flops / (plan.alignment.flops + plan.calibration.flops)
            more = self._alignment_text(plan)
            folder = self._alignment_folder(plan)
            given = aligned_layers(folder, plan, text, more, compute, lambda share: advance(aligned * share))
        return convert_in_memory(
            plan,
            text,
            compute,
            oracle=cell.oracle,
            by_layer=own.plans if own else (),
            given=given,
            gradients=self._gradients(plan, text),
            folder=self._work(),
            advance=lambda layer: advance(aligned + (1 - aligned) * (layer + 1) / layers),
        )

    def keep_alignments(self, unfinished: Iterable[Cell]) -> None:
        """Delete the saved alignments that none of these cells needs."""
        plans = [cell.plan for cell in unfinished if cell.plan is not None and cell.plan.recipe.align is not None]
        remove_alignments(self.out / _WORK, map(self._alignment_folder, plans))

    def _alignment_folder(self, plan: SplitPlan) -> Path:
        return folder_of(self._work(), json.dumps([recipe_facts(plan), self.calibration_hash(plan)], sort_keys=True))

    def export(self, cell: Cell, progress: ProgressCallback) -> dict[str, Any]:
        """Write the checkpoint of a cell, and measure it with `llamamoe.evaluate`."""
        from ..conversion.split import split
        from ..evaluation.perplexity import evaluate

        assert cell.plan is not None
        name = cell.label.replace("/", "_").replace(" ", "_").replace(",", "")
        folder = self.out / _CHECKPOINTS / name
        make_folder(folder.parent)
        split(self.location.path, folder, cell.plan.recipe, force=True, tokenizer=self._tokenizer, progress=progress)
        found = evaluate(
            folder,
            self.recipe.evaluation,
            max_tokens=self.recipe.evaluation_tokens,
            context_length=self.window,
            batch_size=self.recipe.batch_size,
            dtype=self.recipe.dtype,
            device=self.device,
        )
        return {"folder": f"{_CHECKPOINTS}/{name}", "perplexity": found.model.mean_over_domains.perplexity}

    def _work(self) -> Path:
        folder = self.out / _WORK
        make_folder(folder)
        return folder

    def _gradients(self, plan: SplitPlan, text: CalibrationText | None) -> GradientStore | None:
        if text is None or plan.calibration is None or not plan.calibration.gradients:
            return None

        from ..calibration.gradients import ffn_gradients

        compute = self._compute(plan)
        return ffn_gradients(
            plan.model,
            torch.from_numpy(text.ids_ST),
            folder=self._work() / "gradients",
            device=compute.device,
            compute_dtype=None if compute.dtype == torch.float32 else compute.dtype,
        )

    def close(self) -> None:
        """Delete files that only the run needed."""
        from ..calibration.gradients import remove_gradients

        folder = self.out / _WORK
        if not folder.is_symlink():
            remove_gradients(folder / "gradients")
            with suppress(OSError):  # it does not exist, or contains something else
                folder.rmdir()
