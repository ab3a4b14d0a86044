"""Write the trained model of a run. Not imported by plans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..architectures.targets import TARGETS
from ..checkpoint.files import write_text
from ..checkpoint.manifest import FileEntry
from ..checkpoint.out_folder import TRAINED, TRAINING_RECEIPT_FILE
from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.readme import derived_card
from ..checkpoint.receipts import DOCUMENT_HASHES, documents_fitted_to
from ..errors import ElsewhereError, LlamaMoeError, printable
from ..models.loadable import check_loads
from .lora import merge_adapters
from .model import BLOCK, finish_folder
from .moe_layers import CORRECTION_BIAS
from .native_weights import pending_weights, reshard, save_config
from .ownership import RECIPE, STAGING, close_staging, discard, publish, run_id
from .recipe import PretrainRecipe
from .run_folder import complete
from .saving import all_files, on_all_ranks, write_files, write_index

_FILE_BYTES = 5 * 10**9
"""Bytes of the model from which another rank writes a file of it."""


def export(trainer: Any, folder: Path, source: Path, receipt: dict[str, Any]) -> Path:
    """Write ``model/``: native, in the requested dtype, whole or not at all."""
    final, partial = folder / TRAINED, folder / STAGING / TRAINED
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        reshard(model)
        model = merge_adapters(model)
    name = trainer.parts.recipe.precision.save or SafetensorsCheckpoint(source).config.get("torch_dtype") or "bfloat16"
    trainer.parts.dynamics.gate.detach()
    _cast(model, getattr(torch, str(name).removeprefix("torch.")))

    def first(work: Callable[[], None]) -> None:
        on_all_ranks(work if trainer.args.should_save else lambda: None)

    def finish() -> None:
        finish_folder(partial, source, {"trained": receipt["trained"]} | _router_scale(trainer.parts.recipe, source))
        check_loads(partial)
        write_text(partial / "README.md", _card(trainer.parts.recipe, source, receipt["trained"]))
        write_text(partial / RECIPE, trainer.parts.recipe.to_yaml())
        before = {DOCUMENT_HASHES: documents_fitted_to(source)}
        write_text(partial / TRAINING_RECEIPT_FILE, json.dumps(receipt | before, indent=1) + "\n")
        complete(partial, {"run": run_id(folder), "step": trainer.state.global_step}, written)
        if final.exists():
            discard(folder, final)
        publish(folder, TRAINED)
        close_staging(folder)

    try:
        first(lambda: shutil.rmtree(partial, ignore_errors=True))
        if trainer.is_distributed_loading_by_transformers:  # every rank has a part of the weights
            written = _write_together(model, partial, trainer.args, first)
        else:
            written = {}
            with quiet_transformers():
                first(lambda: model.save_pretrained(partial))
        first(finish)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        if not trainer.args.should_save:
            raise ElsewhereError(f"{final} cannot be written: {reason}, as the first process reports.") from error
        shutil.rmtree(partial, ignore_errors=True)
        raise LlamaMoeError(
            f"{final} cannot be written: {reason}.",
            hint="Free some space, then go on with --resume: only this is done again.",
        ) from error
    return final


def _router_scale(recipe: PretrainRecipe, source: Path) -> dict[str, str]:
    """Return the entry that says that a hard router is no longer hard, if training moved it."""
    block = SafetensorsCheckpoint(source).config.get(BLOCK) or {}
    return {"router_scale": "soft"} if block.get("router_scale") and "router" not in recipe.freeze else {}


def _write_together(
    model: Any, partial: Path, args: Any, first: Callable[[Callable[[], None]], None]
) -> dict[str, FileEntry]:
    """Write a sharded model in files of about `_FILE_BYTES`, by as many ranks; return their entries."""
    first(lambda: save_config(model, partial))
    weights = pending_weights(model, partial, args.process_index, args.world_size, file_bytes=_FILE_BYTES)
    reports = on_all_ranks(lambda: write_files(partial, (), weights))
    first(lambda: write_index(partial, reports))
    return all_files(reports)


def _card(recipe: PretrainRecipe, source: Path, trained: Mapping[str, Any]) -> str:
    """Return the model card: what was trained, for how long, and by which recipe."""
    name = _called(recipe.model)
    helped = f", distilling its dense parent `{_called(recipe.parent)}`" if recipe.parent and recipe.distill else ""
    story = (
        f"`llamamoe pretrain --recipe {RECIPE}` continued the pretraining of `{name}`{helped}: {trained['steps']:,} steps of "
        f"{recipe.batch_size:,} sequences of {recipe.data.block_length:,} tokens, {trained['tokens']:,} tokens in all. "
        f"{RECIPE} is the recipe, {TRAINING_RECEIPT_FILE} says what was found at the start and which versions ran."
    )
    model_type = str(SafetensorsCheckpoint(source).config.get("model_type"))
    moe = model_type if model_type in TARGETS else None
    return derived_card([source], [name], f"{name} after continued pretraining", story, (), moe=moe)


def _called(source: str) -> str:
    """Return a hub id, or the name of a folder or file without its path; unprintable characters are escaped."""
    path = Path(source).expanduser()
    return printable(path.resolve().name if path.exists() else source)


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast to the written dtype, sharded or not; selection biases stay in float32, as a conversion writes them.

    Steps of balancing are below the resolution of bfloat16: rounded biases would select other experts.
    """
    holders = [module for module in model.modules() if isinstance(getattr(module, CORRECTION_BIAS, None), torch.Tensor)]
    kept = [getattr(module, CORRECTION_BIAS).detach().clone() for module in holders]
    model.to(dtype)
    for module, value in zip(holders, kept, strict=True):
        is_parameter = isinstance(getattr(module, CORRECTION_BIAS), torch.nn.Parameter)
        setattr(module, CORRECTION_BIAS, torch.nn.Parameter(value, requires_grad=False) if is_parameter else value)
