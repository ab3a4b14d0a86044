"""``llamamoe.resplit``: partition the experts of a mixture into smaller experts; the function stays the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..architectures.expert_weighting import complete_config, rescaled_block
from ..architectures.moe_checkpoint import ConvertedModel, check_shapes
from ..architectures.moe_layout import MoeLayout, weight
from ..architectures.rescales import RESCALES
from ..checkpoint.layout import check_size, deal
from ..checkpoint.out_folder import normal_path
from ..conversion.preference import LEAST_WIDTH
from ..errors import RefusedError, UsageError, near_misses
from ..methods.splitters import SPLITTERS
from ..models.loadable import check_model
from ..numerics import is_power_of_two
from ..progress import ProgressCallback, ignore_progress
from .finer_experts import FinerExperts
from .rewrite import Rewriting, check_place, opened, rewrite


@dataclass(frozen=True)
class ResplitResult:
    """The result of `resplit`, or its plan.

    Attributes:
        out: The output folder; None for a plan.
        num_experts: N before and after.
        top_k: k before and after.
        expert_width: Neurons of one expert before and after, padding included.
        padding: Zero neurons that are added to each expert of the source.
        factor: Factor of the routed outputs that makes up for smaller router weights.
        where: Place of that factor: ``"config"``, ``"weights"`` or, if it is 1, ``"nowhere"``.
        exact: Whether it does not round.
        nbytes: Bytes of all tensors.
        receipt: The content of ``llamamoe_derived.json``; empty for a plan.
        warnings: Sentences for the user.
    """

    out: Path | None
    num_experts: tuple[int, int]
    top_k: tuple[int, int]
    expert_width: tuple[int, int]
    padding: int
    factor: float
    where: str
    exact: bool
    nbytes: int
    receipt: dict[str, Any]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return {"out": None if self.out is None else str(self.out), "bytes": self.nbytes, **self.facts, **self.receipt}

    @property
    def facts(self) -> dict[str, Any]:
        """The sizes, as they are recorded."""
        names = ("num_experts", "top_k", "expert_width", "padding", "factor", "where", "exact")
        return {name: getattr(self, name) for name in names}


def resplit(
    model: str | Path,
    out: str | Path | None,
    pieces: int,
    *,
    method: str = "kmeans",
    seed: int = 0,
    shard_size: str = "5GB",
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> ResplitResult:
    """Write a copy of a mixture of experts whose N experts are each partitioned into m = ``pieces`` smaller ones.

    The neurons of an expert are partitioned as `split` partitions those of a dense FFN. Its router row is repeated for
    its m pieces, and k m experts are selected instead of k: pieces of one expert have equal logits, so exactly the
    pieces of the k experts run that ran before. Where the router's weights sum to one, or are a softmax over all
    experts, each piece gets 1/m of its expert's weight; routed outputs are multiplied by m in return, in
    ``routed_scaling_factor`` if the architecture has one, else in the down projections. The result computes the function
    of the source, exactly if m is a power of two; training can then make the pieces differ.

    Reference: fine-grained experts (DeepSeekMoE, arXiv:2401.06066); the hierarchical split of CMoE (arXiv:2502.04416).

    Args:
        model: A mixture of experts of a supported architecture, converted or not.
        out: The folder to create; None for a dry run.
        pieces: m, at least 2; experts whose width it does not divide are padded with zero neurons.
        method: A splitter that needs no text: ``"kmeans"`` or ``"random"``.
        seed: Seed of the splitter.
        shard_size: Maximum size of a file, such as ``"5GB"``.
        dry_run: Return the sizes and write nothing.
        resume: Finish a stopped call with the same arguments.
        force: Replace ``out`` if it holds a checkpoint by llamamoe, and discard the work of a stopped call.
        progress: Called after every layer.

    Raises:
        UsageError: The number of pieces or the method is invalid.
        RefusedError: The model is not a supported mixture, its router selects groups of experts, or OUT cannot be
            written.
    """
    check_size(shard_size)
    location, checkpoint = opened(model)
    if out is not None:
        check_place(normal_path(out), [location.path], resume=resume, force=force)
    source = ConvertedModel(checkpoint)
    _check(source, pieces, method)
    check_shapes(source)
    check_model(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    layout, plan = _planned(source, pieces)
    tensors = {tensor.name: tensor for tensor in source.target.tensors(source.spec, layout)}
    baked = plan.factor if plan.where == "weights" else 1.0
    finer = FinerExperts(source, tensors, pieces, SPLITTERS.get(method)(), seed, baked)
    entries = {name: finer.entry(tensor) for name, tensor in tensors.items()}
    plan = replace(plan, nbytes=sum(nbytes for _, _, nbytes in entries.values()))
    if dry_run:
        return plan
    if out is None:
        raise UsageError("OUT is missing.", hint="Name a folder, or plan with dry_run.")
    job = Rewriting(
        deed="resplit",
        title=f"{location.name} with experts split into {pieces}",
        sources=(location,),
        checkpoints=(checkpoint,),
        config=_config(source, layout, plan),
        make=finer.make,
        facts={"pieces": pieces, "method": method, "seed": seed, **plan.facts},
        story=f"Each of the {plan.num_experts[0]} experts of `{location.name}` was partitioned into {pieces} (`{method}`); "
        f"{layout.top_k} of {layout.num_experts} are selected per token instead of {plan.top_k[0]}. The model computes the "
        "function of its source.",
        warnings=plan.warnings,
        shards=deal(entries, shard_size),
    )
    receipt = rewrite(job, out, resume=resume, force=force, progress=progress)
    return replace(plan, out=Path(out).expanduser(), receipt=receipt)


def usable_methods() -> list[str]:
    """Return the splitters that partition an expert exactly without text."""
    found = (SPLITTERS.get(name) for name in SPLITTERS.names())
    kept = (each for each in found if each.routed and each.parity == "exact" and each.needs in ("nothing", "weights"))
    return [each.name for each in kept if each().parts(2) == 2]


def _check(source: ConvertedModel, pieces: int, method: str) -> None:
    """Check what can be read from the configuration."""
    width = source.layout.expert_width
    if not 2 <= pieces <= width:
        raise UsageError(f"{pieces} pieces, but it must be from 2 to {width}, the width of an expert.")
    known = usable_methods()
    if method not in known:
        hint = near_misses(method, known) if method not in SPLITTERS else f"Without text: {', '.join(known)}."
        raise UsageError(f"the method {method!r} cannot split experts.", hint=hint)
    groups = source.checkpoint.config.get("n_group")
    if groups not in (None, 1):
        raise RefusedError(
            f"its router selects among {groups} groups of experts by their two best (n_group): repeated rows would change "
            "which groups win.",
            hint="llamamoe supports n_group = 1.",
        )


def _finer(source: ConvertedModel, pieces: int) -> MoeLayout:
    """Return the sizes of the result.

    Raises:
        RefusedError: The shared expert's width would not be a multiple of the experts'.
    """
    old = source.layout
    width = math.ceil(old.expert_width / pieces)
    if source.target.shared == "one":
        raise RefusedError(
            f"{source.target.name} stores one shared expert, as wide as a routed one: experts cannot become narrower than it."
        )
    if source.target.shared == "multiple" and old.shared_width % width:
        raise RefusedError(
            f"{source.target.name} stores shared neurons in units of an expert's width, and {old.shared_width} is not a multiple of "
            f"{width} = {old.expert_width} / {pieces}, rounded up.",
            hint=f"Take a number of pieces that divides {old.expert_width}.",
        )
    return replace(old, num_experts=old.num_experts * pieces, top_k=old.top_k * pieces, expert_width=width)


def _planned(source: ConvertedModel, pieces: int) -> tuple[MoeLayout, ResplitResult]:
    """Return the sizes of the result in the form that targets take, and in the form of the plan."""
    old, layout, mixing = source.layout, _finer(source, pieces), source.mixing
    ratio = weight(mixing.weighting, old.num_experts, old.top_k) / weight(
        mixing.weighting, layout.num_experts, layout.top_k
    )
    factor = 1.0 if abs(ratio - 1) < 1e-12 else round(ratio, 12)
    where = "nowhere" if factor == 1 else "config" if source.target.scaling_knob else "weights"
    if where == "config":
        layout = replace(layout, combine=replace(layout.combine, factor=mixing.factor * factor))
    exact = where != "weights" or is_power_of_two(factor)
    padding = pieces * layout.expert_width - old.expert_width
    plan = ResplitResult(
        out=None,
        num_experts=(old.num_experts, layout.num_experts),
        top_k=(old.top_k, layout.top_k),
        expert_width=(old.expert_width, layout.expert_width),
        padding=padding,
        factor=factor,
        where=where,
        exact=exact,
        nbytes=0,
        receipt={},
        warnings=tuple(_warnings(source, layout, exact, padding)),
    )
    return layout, plan


def _config(source: ConvertedModel, layout: MoeLayout, plan: ResplitResult) -> dict[str, Any]:
    """Return the configuration of the result: the source's, with the keys that the sizes decide."""
    config, target = source.checkpoint.config, source.target
    before, after = (target.config(source.spec, each) for each in (source.layout, layout))
    known = complete_config(config).keys() | config.keys()
    changed = {key: value for key, value in after.items() if value != before.get(key) and key in known}
    block = source.block
    if not block:
        return {**config, **changed}
    sizes = {"num_experts": layout.num_experts, "top_k": layout.top_k, "expert_width": layout.expert_width}
    ratio = {} if plan.where == "nowhere" else {plan.where: plan.factor}
    block = rescaled_block(block, **ratio) | {key: value for key, value in sizes.items() if key in block}
    if not _same_rescale(source, layout):
        block["rescale"] = None
    return {**config, **changed, "llamamoe": block}


def _same_rescale(source: ConvertedModel, layout: MoeLayout) -> bool:
    """Return whether the rescale's formula gives the pieces the coefficient that they have."""
    name = source.block.get("rescale")
    if name is None:
        return True
    coefficient, old = RESCALES.get(name)().coefficient, source.layout
    return math.isclose(coefficient(layout.num_experts, layout.top_k), coefficient(old.num_experts, old.top_k))


def _warnings(source: ConvertedModel, layout: MoeLayout, exact: bool, padding: int) -> list[str]:
    found = []
    if not exact:
        found.append(
            "the experts' down projections are rounded once to their dtype: the number of pieces is not a power of two"
        )
    if padding:
        found.append(f"the pieces do not divide an expert's width: {padding} zero neurons are added to each expert")
    if layout.expert_width < LEAST_WIDTH:
        found.append(
            f"experts of {layout.expert_width} neurons are narrow: programs compute them slowly, and formats with blocks of 32 numbers "
            "cannot quantise them"
        )
    if not _same_rescale(source, layout):
        found.append(
            f"the rescale {source.block['rescale']} depends on the number of experts, so it is no longer recorded: `retop` "
            "will leave the router's weights unchanged"
        )
    return found
