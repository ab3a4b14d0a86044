"""Trains in forks that may kill themselves on the way. Run by test_pretrain_kills.py, see `dying.serve`.

A job is ``{"recipe": FILE, "out": ..., "resume": ..., "at": ...}``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401  # what training imports, once for all forks

import llamamoe.models.loading  # noqa: F401
from llamamoe import pretrain
from llamamoe.checkpoint import manifest, tensor_file
from llamamoe.training import checkpoints, dynamics, export, metrics, objective, saving, shards
from llamamoe.training.recipe import load_pretrain_recipe

from .dying import Points, serve

POINTS: Points = {
    "micro_batch": (objective.Objective, "__call__"),
    "metrics": (metrics.MetricsFile, "write"),
    "config": (checkpoints, "save_config"),
    "file": (shards, "write_tensors"),
    "tensor": (tensor_file, "tensor_bytes"),
    "written": (tensor_file, "FileEntry"),
    "index": (saving, "write_text"),
    "state": (dynamics.Dynamics, "save"),
    "marker": (manifest, "write_text"),
    "rotate": (checkpoints, "rotate"),
    "finish": (export, "finish_folder"),
    "rename": (Path, "rename"),
    "model": (export, "publish"),
}


def run(job: dict[str, Any]) -> None:
    """One run, or what was left of it."""
    pretrain(load_pretrain_recipe(job["recipe"]), job["out"], resume=job["resume"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(POINTS, run)
