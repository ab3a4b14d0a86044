"""Mixes, resplits and retops in forks that may kill themselves on the way. Run by test_transform_kills.py, see `dying.serve`.

A job is ``{"verb": ..., "args": [...], "keys": {...}, "at": ...}``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401  # what they import, once for all forks

import llamamoe
from llamamoe.checkpoint import files, ledger, writer

from .dying import Points, serve

POINTS: Points = {
    "pwrite": (os, "pwrite"),
    "append": (ledger.Ledger, "append"),
    "finish": (writer.CheckpointWriter, "finish"),
    "write_text": (files, "write_bytes"),
    "rename": (Path, "rename"),
    "publish": (writer.CheckpointWriter, "publish"),
}


def run(job: dict[str, Any]) -> None:
    """One command, or what was left of it."""
    args, keys = job["args"], job["keys"]
    if job["verb"] == "mix":
        llamamoe.mix(*args[:2], llamamoe.load_mix_recipe(given={"experts": args[2:], "target": "mixtral"}), **keys)
    elif job["verb"] == "resplit":
        llamamoe.resplit(*args, 2, **keys)
    else:
        llamamoe.retop(*args, 3, **keys)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(POINTS, run)
