"""``llamamoe.resplit``: partition the experts of a mixture into smaller experts, all or some of which are selected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..architectures.moe_checkpoint import ConvertedModel, check_shapes
from ..architectures.moe_layout import MoeLayout, Neurons, OutTensor, Router
from ..calibration.compute import choose_compute
from ..calibration.text import calibration_text
from ..checkpoint.layout import deal
from ..checkpoint.ledger import STATES, partial_path
from ..checkpoint.locate import Location
from ..checkpoint.out_folder import normal_path
from ..checkpoint.tokenizer_loading import needed_tokenizer
from ..conversion.calibration_cost import most_tokens
from ..errors import UsageError
from ..methods.splitters import SPLITTERS
from ..models.devices import check_device
from ..models.loadable import check_model
from ..progress import ProgressCallback, ignore_progress
from ..recipes import plugin
from .finer_experts import FinerExperts
from .resplitting.layer import PieceRouting
from .resplitting.plan import ResplitResult as ResplitResult
from .resplitting.plan import changed_config, check_recipe, planned
from .resplitting.recipe import ResplitRecipe, load_resplit_recipe
from .resplitting.run import RoutedPieces
from .rewrite import Rewriting, check_place, opened, rewrite


def resplit(
    model: str | Path,
    out: str | Path | None,
    pieces: int | None = None,
    *,
    recipe: ResplitRecipe | None = None,
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
    **keys: Any,
) -> ResplitResult:
    """Write a copy of a mixture of experts whose N experts are each partitioned into m = ``pieces`` smaller ones.

    The neurons of an expert are partitioned as `split` partitions those of a dense FFN. Its router row is repeated for
    its m pieces, and k m experts are selected instead of k: pieces of one expert have equal logits, so exactly the
    pieces of the k experts run that ran before. Where the router's weights sum to one, or are a softmax over all
    experts, each piece gets 1/m of its expert's weight; routed outputs are multiplied by m in return, in
    ``routed_scaling_factor`` if the architecture has one, else in the down projections. The result computes the function
    of the source, exactly if m is a power of two; training can then make the pieces differ.

    With ``top_k`` below k m and ``calibration`` text, a token costs less, and the function is approximated. Each expert is
    partitioned by the tokens that the router sends to it; a piece's router row is its expert's own plus one that predicts
    the size of the piece's output among those of the expert (ridge regression of the log contributions, on the same tokens);
    down projections are refitted to the outputs of the source's routed experts. Shared experts stay as they are.

    Reference: fine-grained experts (DeepSeekMoE, arXiv:2401.06066); the hierarchical split of CMoE (arXiv:2502.04416), of
    which the fitted rows and the repair are not part.

    Args:
        model: A mixture of experts of a supported architecture, converted or not.
        out: The folder to create; None for a dry run.
        pieces: m, at least 2; their widths are rounded up to a multiple of 8 with zero neurons.
        recipe: All keys at once, instead of ``pieces`` and ``keys``.
        dry_run: Return the sizes and write nothing.
        resume: Finish a stopped call with the same arguments.
        force: Replace ``out`` if it holds a checkpoint by llamamoe, and discard the work of a stopped call.
        progress: Called after every layer.
        keys: Other keys of the recipe, such as ``method``, ``seed``, ``top_k`` or ``calibration``; see
            `llamamoe.transforms.resplitting.recipe.ResplitRecipe`.

    Raises:
        UsageError: The recipe is invalid or does not suit the mixture, or the text cannot be used.
        RefusedError: The model is not a supported mixture, its router selects groups of experts, or OUT cannot be
            written.
    """
    if recipe is None:
        recipe = load_resplit_recipe(given={**({} if pieces is None else {"pieces": pieces}), **keys})
    location, checkpoint = opened(model)
    if out is not None:
        check_place(normal_path(out), [location.path], resume=resume, force=force)
    task = _task(location, ConvertedModel(checkpoint), recipe)
    if dry_run:
        return task.plan
    if out is None:
        raise UsageError("OUT is missing.", hint="Name a folder, or plan with dry_run.")
    job = _job(task) if task.plan.calibration is None else _calibrated(task, normal_path(out))
    receipt = rewrite(job, out, resume=resume, force=force, progress=progress)
    return replace(task.plan, out=Path(out).expanduser(), warnings=job.warnings, receipt=receipt)


@dataclass(frozen=True)
class _Task:
    """A call of `resplit`, checked and planned.

    Attributes:
        location: The place of the source.
        source: The source.
        recipe: The recipe.
        layout: The sizes of the result, in the form that targets take.
        plan: The plan.
        tensors: Tensors of the result by name.
        finer: Makes those that do not depend on text.
    """

    location: Location
    source: ConvertedModel
    recipe: ResplitRecipe
    layout: MoeLayout
    plan: ResplitResult
    tensors: Mapping[str, OutTensor]
    finer: FinerExperts

    @property
    def entries(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Dtype, shape and bytes of every tensor of the result."""
        return {name: self.finer.entry(tensor) for name, tensor in self.tensors.items()}

    def dtype(self, kind: type[Router] | type[Neurons]) -> str:
        """Return the dtype of the routers, or of the experts."""
        return self.finer.entry(next(each for each in self.tensors.values() if isinstance(each.origin, kind)))[0]


def _task(location: Location, source: ConvertedModel, recipe: ResplitRecipe) -> _Task:
    """Check recipe and source, and plan. Reads headers."""
    check_recipe(source, recipe)
    check_shapes(source)
    checkpoint = source.checkpoint
    check_model(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    layout, plan = planned(source, recipe, _text_tokens(recipe))
    tensors = {tensor.name: tensor for tensor in source.target.tensors(source.spec, layout)}
    # with text the splitter is applied elsewhere: only tensors that are not routed are taken from here
    finer = FinerExperts(source, tensors, recipe.pieces, plugin(SPLITTERS, recipe.chosen), recipe.seed, plan.baked)
    task = _Task(location, source, recipe, layout, plan, tensors, finer)
    return replace(task, plan=replace(plan, nbytes=sum(nbytes for _, _, nbytes in task.entries.values())))


def _job(task: _Task) -> Rewriting:
    """Return the description of the result, whose function is that of the source."""
    recipe, plan = task.recipe, task.plan
    return Rewriting(
        deed="resplit",
        title=f"{task.location.name} with experts split into {recipe.pieces}",
        sources=(task.location,),
        checkpoints=(task.source.checkpoint,),
        config=changed_config(task.source, recipe, task.layout, plan),
        make=task.finer.make,
        facts={"pieces": recipe.pieces, "method": recipe.chosen.name, "seed": recipe.seed, **plan.facts},
        story=_story(task.location, recipe, plan),
        warnings=plan.warnings,
        shards=deal(task.entries, recipe.shard_size),
    )


def _text_tokens(recipe: ResplitRecipe) -> int | None:
    """Return an upper bound of the text's tokens, as a token has a byte; None without text. Finds the files.

    Raises:
        UsageError: There are no such files, or the device cannot be available.
    """
    if not recipe.calibration:
        return None
    check_device(recipe.device)
    return most_tokens(recipe.calibration)


def _calibrated(task: _Task, out: Path) -> Rewriting:
    """Return the job with experts made from text, which is read here, before anything is written."""
    job, source, recipe, needed = _job(task), task.source, task.recipe, task.plan.calibration
    assert needed is not None
    text = calibration_text(
        recipe.calibration,
        needed_tokenizer(
            source.checkpoint,
            f"{source.checkpoint.path} has no tokenizer, so text cannot be read.",
            "Put the tokenizer's files beside the weights.",
        ),
        num_tokens=recipe.calibration_tokens,
        length=needed.length,
        weights=recipe.calibration_weights,
        seed=recipe.seed,
        vocab_size=source.spec.vocab_size,
    )
    dtype, factor = task.dtype(Neurons), task.layout.combine.factor
    compute = choose_compute(recipe.device, recipe.compute_dtype, dtype)
    routing = PieceRouting(recipe, source, task.layout, factor, task.plan.baked, task.dtype(Router), dtype)
    mapped = needed.input_place != "memory"
    folder = partial_path(out) / STATES
    made = RoutedPieces(routing, task.finer, task.tensors, text, compute, folder, map_inputs=mapped)
    return replace(
        job,
        make=made.make,
        told=made.told,
        scratch=needed.disk_bytes + needed.input_bytes,
        counts_threads=True,
        facts={**job.facts, "repair": recipe.repair.name, "calibration_tokens": text.num_tokens},
        record={"recipe": recipe.deciding(), "calibration": text.facts, "computed": compute.to_json()},
        warnings=tuple(dict.fromkeys((*job.warnings, *text.warnings))),
    )


def _story(location: Location, recipe: ResplitRecipe, plan: ResplitResult) -> str:
    """Return the card's words."""
    (few, many), (before, after) = plan.top_k, plan.num_experts
    start = (
        f"Each of the {before} experts of `{location.name}` was partitioned into {recipe.pieces} (`{recipe.chosen.name}`); {many} of "
        f"{after} are selected per token instead of {few}. "
    )
    if plan.calibration is None:
        return start + "The model computes the function of its source."
    used, of = plan.active_neurons[1], plan.active_neurons[0]
    return start + (
        f"A token uses {used:,} neurons of routed experts in each layer instead of {of:,}, so the function of the source is approximated: "
        f"router rows were fitted on calibration text, and down projections refitted (`{recipe.repair.name}`)."
    )
