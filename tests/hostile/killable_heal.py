"""Heals in forks that may kill themselves on the way. Run by test_heal_kills.py, see `dying.serve`.

A job is ``{"args": [model, out], "parent": ..., "given": {...}, "keys": {...}, "at": ...}``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401  # what healing imports, once for all forks
from transformers import AutoTokenizer  # noqa: F401

import llamamoe.calibration.sampled
import llamamoe.models.loading  # noqa: F401
from llamamoe.checkpoint import files, ledger, writer
from llamamoe.healing import train_layer, walk
from llamamoe.healing.heal import heal
from llamamoe.healing.ranks import Handoff
from llamamoe.healing.recipe import load_heal_recipe

from .dying import Points, serve

POINTS: Points = {
    "pwrite": (os, "pwrite"),
    "append": (ledger.Ledger, "append"),
    "layer": (walk, "heal_layer"),
    "loss": (train_layer._Joint, "__call__"),
    "give": (Handoff, "give"),
    "write_text": (files, "write_bytes"),
    "rename": (Path, "rename"),
    "publish": (writer.CheckpointWriter, "publish"),
}


def run(job: dict[str, Any]) -> None:
    """One healing, or what was left of it."""
    heal(*job["args"], load_heal_recipe(given=job["given"]), parent=job["parent"], **job["keys"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(POINTS, run)
