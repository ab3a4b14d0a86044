"""Load the model to train, and complete its folder beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..architectures.config_compat import addable_keys
from ..architectures.dense_checkpoint import refuse_foreign
from ..architectures.expert_weighting import routes_attention
from ..architectures.sources import SOURCES
from ..architectures.targets import TARGETS
from ..checkpoint.files import copy_file, write_text
from ..checkpoint.json_files import read_json
from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.reader import LICENSE_FILES, SIDE_FILES, SafetensorsCheckpoint
from ..checkpoint.text_part import whole_hint
from ..checkpoint.unmapped import unmapped
from ..errors import CheckpointError, RefusedError, UsageError
from ..lazy import safetensors, torch, transformers
from .recipe import PretrainRecipe

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configurations that tell of experts, whatever the architecture."""
BLOCK = "llamamoe"
"""The key of llamamoe's facts in ``config.json``."""


def check_folder(folder: Path, *, allow_dense: bool = False) -> dict[str, Any]:
    """Return the configuration of a converted checkpoint, after checking its files by their headers.

    Args:
        folder: The checkpoint.
        allow_dense: Whether to accept a dense model of a supported family.

    Raises:
        CheckpointError: Files are missing or broken, it has its own code, or its weights are quantised.
        RefusedError: It is a dense model.
    """
    checkpoint = SafetensorsCheckpoint(folder)
    config = checkpoint.config
    refuse_foreign(checkpoint)
    name = config.get("model_type")
    if (name not in TARGETS or name == "dense") and not (allow_dense and name in SOURCES):
        hint = "Convert it first: llamamoe split SOURCE OUT. To train a dense model as a control, set allow_dense=true."
        if any(config.get(key) for key in _EXPERTS):
            known = ", ".join(each.name for each in TARGETS if each.routed)
            hint = f"It has experts, but its routers are not known here; those of {known} are."
        raise RefusedError(
            f"{folder}: model_type {name!r} is not a mixture of experts that can be trained here.",
            hint=whole_hint(config, hint),
        )
    return dict(config)


def load_model(folder: Path, recipe: PretrainRecipe, device: torch.device | str) -> Any:
    """Load the native model in the trained dtype, by transformers' own loading.

    Args:
        folder: The converted checkpoint, or a checkpoint of a run.
        recipe: Dtype, implementation, sharding.
        device: Its device, unless transformers shards it.

    Raises:
        CheckpointError: Transformers reports a missing or unexpected tensor, or a file was truncated after the check.
    """
    auto: Any = transformers.AutoModelForCausalLM
    keys: dict[str, Any] = {"dtype": getattr(torch, recipe.precision.parameters)}
    model_type = str(read_json(folder / "config.json").get("model_type"))
    experts = recipe.experts_on(str(device).split(":")[0])
    if experts is not None and model_type in TARGETS and not routes_attention(model_type):
        keys["experts_implementation"] = _implementation(experts)
    if recipe.attn_implementation is not None:
        keys["attn_implementation"] = recipe.attn_implementation
    if recipe.distributed.sharded:
        from transformers.distributed.configuration_utils import DistributedConfig

        sizes = recipe.distributed.model_dump()
        given = {k: v for k, v in sizes.items() if v > 1}
        mixed = recipe.gathers_bfloat16(model_type)
        keys["distributed_config"] = DistributedConfig(**given, fsdp_mixed_precision=mixed)
    try:
        with quiet_transformers(), unmapped(), telling_attention(recipe.attn_implementation):
            model, info = auto.from_pretrained(
                folder,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **keys,
            )
    except safetensors.SafetensorError as error:
        SafetensorsCheckpoint(folder)  # gives a better message
        raise CheckpointError(f"{folder}: its weights cannot be loaded: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise CheckpointError(
                f"{folder}: transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}."
            )
    model.config.use_cache = False
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # the built-in balance loss is pooled over layers and scales wrongly
    return model if recipe.distributed.sharded else model.to(device)


@contextmanager
def telling_attention(name: str | None) -> Iterator[None]:
    """Turn transformers' refusal of an attention implementation into a `UsageError`."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if name is None or "attention" not in str(error).lower():
            raise
        raise UsageError(
            f"attn_implementation = {name}: {str(error).splitlines()[0]}",
            hint="Install what it needs, or leave it to transformers: attn_implementation=null.",
        ) from error


def _implementation(name: str) -> str:
    if name.startswith("llamamoe"):
        from ..models.experts import register_experts

        register_experts()
    return name


def finish_folder(folder: Path, source: Path, facts: dict[str, Any] | None = None) -> None:
    """Complete the output of ``save_pretrained``: tokenizer, licence, both spellings of the configuration, facts.

    Args:
        folder: The written folder.
        source: The converted checkpoint, whose side files are copied.
        facts: Facts for llamamoe's entry in the configuration.
    """
    for name in (*SIDE_FILES, *LICENSE_FILES):
        if (source / name).is_file():
            copy_file(source / name, folder / name)
    path = folder / "config.json"
    if not path.exists():  # an adapter's folder
        return
    config, before = read_json(path), read_json(source / "config.json")
    config["use_cache"] = before.get("use_cache", True)
    for key in ("output_router_logits", "router_aux_loss_coef"):
        if key in before:
            config[key] = before[key]
    config = {k: v for k, v in config.items() if not k.endswith("experts_implementation")}
    if BLOCK in before or facts:
        factors = {key: config[BLOCK][key] for key in ("factor", "baked_factor") if key in (config.get(BLOCK) or {})}
        config[BLOCK] = {**before.get(BLOCK, {}), **factors, **(facts or {})}
    config |= addable_keys(config)
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
