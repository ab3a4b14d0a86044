"""``llamamoe.mix``: fine-tuned models of one architecture as the experts of one mixture (Branch-Train-MiX)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.reader import SafetensorsCheckpoint
from ..conversion.provenance import config_block
from ..conversion.verify_files import Hashes
from ..lazy import torch
from ..progress import ProgressCallback, ignore_progress
from .mixing.checks import check_tokenizers
from .mixing.experts import MixTensors
from .mixing.plan import MixPlan, check_mix_place, plan_mix
from .mixing.prompts import prompt_rows
from .mixing.recipe import MixRecipe
from .mixing.texts import fit_text_router
from .mixing.verify import verify_mix
from .rewrite import Rewriting, rewrite

Verify = Callable[[Path, Hashes], Mapping[str, Any]]


@dataclass(frozen=True)
class MixResult:
    """The result of `mix`.

    Attributes:
        out: The output folder.
        plan: The executed plan.
        receipt: The content of ``llamamoe_derived.json``.
        warnings: Sentences for the user.
    """

    out: Path
    plan: MixPlan
    receipt: dict[str, Any]
    warnings: tuple[str, ...]


def mix(
    base: str | Path,
    out: str | Path,
    recipe: MixRecipe,
    *,
    verify: bool = True,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> MixResult:
    """Write a mixture whose experts are the FFNs of several dense models, and which plain transformers loads.

    Expert i of every layer is the FFN of the i-th model, bit for bit; attention, norms, embedding and head are BASE's, or
    an average (`MixRecipe.backbone`).
    The router's weights of the k selected experts sum to one, so copies of one model compute that model, and one expert
    computes BASE with the FFNs of its model: that model itself where only its FFNs were trained. The models must have one
    architecture, one shape and one tokenizer.

    One FFN is in memory at a time, however many models there are. ``out`` appears when everything in it is written and
    verified.

    Args:
        base: The model that all were trained from: a folder or Hub id.
        out: The folder to create; it must not exist, or be empty.
        recipe: The recipe, which names the models of the experts.
        verify: Run each expert alone beside the model that it should compute, before ``out`` appears.
        resume: Finish a stopped call with the same arguments.
        force: Replace ``out`` if it holds a checkpoint by llamamoe, and discard the work of a stopped call.
        progress: Called after every layer.

    Raises:
        CheckpointError: A model is not a dense checkpoint of a known family.
        UsageError: Prompts or a text are missing or invalid.
        RefusedError: The models do not fit together, no target can hold them, or OUT cannot be written.
        VerificationError: The result is not what it should be; it stays in ``OUT.partial/``.
        LlamaMoeError: Writing failed; ``resume`` continues.
    """
    plan = plan_mix(base, recipe)
    check_mix_place(plan, out, resume=resume, force=force)
    warnings = (*plan.warnings, *check_tokenizers(plan.models))

    rows: Mapping[int, torch.Tensor] = {}
    told: dict[str, Any] = {}
    if plan.prompts is not None:
        rows = prompt_rows(plan.base, plan.prompts, recipe, plan.layout.dtype, progress)
        told = {"prompts_sha256": plan.prompts.sha256()}
    elif recipe.texts is not None:
        fitted = fit_text_router(plan.base, recipe, plan.layout.dtype, progress)
        rows, told, warnings = fitted.rows, fitted.facts, (*warnings, *fitted.warnings)

    def check(folder: Path, hashes: Hashes) -> dict[str, Any]:
        return verify_mix(plan, folder, hashes, progress)

    job = _rewriting(plan, rows, told, warnings, check if verify else None)
    receipt = rewrite(job, out, resume=resume, force=force, progress=progress)
    return MixResult(Path(out).expanduser(), plan, receipt, warnings)


def _rewriting(
    plan: MixPlan,
    rows: Mapping[int, torch.Tensor],
    told: Mapping[str, Any],
    warnings: tuple[str, ...],
    check: Verify | None,
) -> Rewriting:
    base, *experts = plan.places
    layout, names = plan.layout, [place.name for place in experts]
    facts = {
        "base": base.name,
        "experts": names,
        "router": plan.recipe.router,
        "top_k": plan.recipe.top_k,
        "recipe": plan.recipe.deciding(),
    }
    if rows:
        facts |= {**told, "rows_sha256": _rows_sha256(rows)}
    block = config_block(layout, base) | {
        "method": "mix",
        "router": plan.recipe.router,
        "recipe_sha256": plan.recipe.sha256(),
        "parity": "none",
        "exactness": plan.exactness,
    }
    return Rewriting(
        deed="mix",
        title=f"A mixture of {len(names)} models",
        sources=plan.places,
        checkpoints=tuple(_folder(model.checkpoint) for model in plan.models),
        config={**layout.config, "llamamoe": block},
        make=MixTensors(plan, rows).make,
        facts=facts,
        story=_story(plan, names),
        warnings=warnings,
        shards=layout.shards,
        verify=check,
    )


def _backbone(plan: MixPlan) -> str:
    if plan.recipe.backbone == "base":
        return f"those of `{plan.places[0].name}`"
    pairs = zip(plan.places, plan.recipe.shares, strict=True)
    return "averages of " + ", ".join(f"`{place.name}` ({share:.4g})" for place, share in pairs if share)


def _rows_sha256(rows: Mapping[int, torch.Tensor]) -> str:
    """Return a hash of the router, which a resumed run compares: hidden states depend on threads and device."""
    digest = hashlib.sha256()
    for layer in sorted(rows):
        digest.update(rows[layer].numpy().tobytes())
    return digest.hexdigest()


def _folder(checkpoint: Any) -> SafetensorsCheckpoint:
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    return checkpoint


def _story(plan: MixPlan, names: list[str]) -> str:
    models = ", ".join(f"`{name}`" for name in names)
    return (
        f"The experts of each layer are the FFNs of {models}, in this order, {plan.recipe.top_k} of them selected per token. "
        f"Attention, norms, embedding and head are {_backbone(plan)}. The router is {_ROUTER[plan.recipe.router]}. "
        f"Architecture: `{plan.layout.config['architectures'][0]}` of transformers, no remote code."
    )


_ROUTER = {
    "random": "random, so the mixture must be trained before use",
    "hidden": "made from hidden states of prompts for each expert",
    "text": "fitted to tell the texts of the experts apart",
}
