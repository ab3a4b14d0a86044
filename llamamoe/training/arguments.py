"""Build the arguments of transformers' Trainer from a recipe. Not imported by plans."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .recipe import PretrainRecipe
from .resuming import by_deepspeed


def training_arguments(recipe: PretrainRecipe, folder: Path, device: str, *, evaluates: bool) -> TrainingArguments:
    """Return the Trainer's arguments, from the recipe and the keys that it passes through."""
    every = recipe.evaluate_every or recipe.max_steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ours: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.micro_batch_size,
        "per_device_eval_batch_size": recipe.micro_batch_size,
        # DeepSpeed reads it while the arguments are made; divisibility is checked right after.
        "gradient_accumulation_steps": max(1, recipe.batch_size // (recipe.micro_batch_size * world)),
        "learning_rate": recipe.optimizer.lr,
        "max_grad_norm": recipe.optimizer.max_grad_norm,
        "seed": recipe.seed,
        "bf16": recipe.precision.compute == "bfloat16",
        "use_cpu": device == "cpu",
        "activation_checkpointing": recipe.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if recipe.gradient_checkpointing else None,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": every,
        "eval_on_start": evaluates,
        "save_strategy": "steps",
        "save_steps": recipe.save_every or recipe.max_steps,
        "ignore_data_skip": True,
        "save_only_model": not by_deepspeed(recipe),  # the optimiser's state is saved by this package
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if recipe.distributed.sharded and recipe.distributed.dp_replicate_size == 1:
        # By default the Trainer sums unsharded gradients over micro-batches on every rank and shards the sum: for a model
        # that is sharded because it does not fit, each micro-batch's gradients must be sharded at once. (HSDP does that.)
        ours["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    args = TrainingArguments(**{**ours, **recipe.trainer})
    args._n_gpu = min(args.n_gpu, 1)  # with several GPUs visible to a process, transformers would use nn.DataParallel
    return args
