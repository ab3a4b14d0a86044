"""Check the keys of transformers' TrainingArguments that a recipe may pass through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from ..errors import near_misses
from ..lazy import transformers

_OURS = {
    "output_dir": "--out",
    "max_steps": "steps or tokens",
    "num_train_epochs": "steps or tokens",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.max_grad_norm",
    "optim": "optimizer",
    "optim_args": "optimizer",
    "optim_target_modules": "optimizer",
    "label_smoothing_factor": "",
    "fsdp": "distributed.fsdp_size",
    "fsdp_config": "distributed.fsdp_size",
    "lr_scheduler_type": "lr_schedule.shape",
    "lr_scheduler_kwargs": "lr_schedule",
    "warmup_steps": "lr_schedule.warmup",
    "warmup_ratio": "lr_schedule.warmup",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "use_cpu": "device",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
    "eval_steps": "evaluate_every",
    "eval_strategy": "evaluate_every",
    "eval_on_start": "evaluate_every",
    "save_steps": "save_every",
    "save_strategy": "save_every",
    "save_total_limit": "keep",
    "ignore_data_skip": "",
    "resume_from_checkpoint": "--resume",
    "remove_unused_columns": "",
    "dataloader_num_workers": "",
    "label_names": "",
    "load_best_model_at_end": "",
    "auto_find_batch_size": "",
    "accelerator_config": "distributed",
    "save_only_model": "",
}
"""Arguments that the recipe sets itself, with the key that sets them; empty: always."""


def check_trainer_keys(value: Any) -> Any:
    """Validate that the arguments exist in transformers and are not set by the recipe.

    Transformers is imported only if there is a key to look up.
    """
    if not isinstance(value, Mapping):
        raise PydanticCustomError("choice", "must be a mapping of TrainingArguments")
    if not value:
        return {}
    import dataclasses

    known = [field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init]
    wrong = []
    for key in map(str, value):
        if key in _OURS:
            instead = f"; set {_OURS[key]}" if _OURS[key] else ""
            wrong.append(f"{key} is decided by the recipe{instead}")
        elif key not in known:
            wrong.append(f"{key}: transformers has no such training argument. {near_misses(key, known)[:300]}")
    if wrong:
        raise PydanticCustomError("choice", "; ".join(wrong))
    return dict(value)
