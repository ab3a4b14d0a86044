"""A tiny dense model and what is measured on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.calibration.compute import Compute
from llamamoe.calibration.text import CalibrationText
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.conversion.plan import plan_split
from llamamoe.conversion.recipe import build_recipe
from llamamoe.studies.budget.sensitivities.base import Task

SIZES: dict[float, dict[str, int]] = {0.4: {"top_k": 1, "shared": 24}, 0.6: {"top_k": 2, "shared": 40}}


def open_model(folder: Path) -> DenseModel:
    return understand(open_checkpoint(locate(folder)))


def make_text(sequences: int = 10, length: int = 16) -> CalibrationText:
    ids = np.random.default_rng(0).integers(3, 128, (sequences, length))
    return CalibrationText(ids, ("a",) * sequences, None, {}, ())


def make_task(
    model: DenseModel, folder: Path, *, text: CalibrationText | None = None, held: int = 64, **keys: Any
) -> Task:
    """Conversions at about 0.4 and 0.6 of the model's FFNs."""
    values: dict[str, Any] = {"method": "kmeans", "repair": "least_squares", "calibration": "unread", "num_experts": 4}
    plans = [plan_split(model, build_recipe(values | sizes | keys)) for sizes in SIZES.values()]
    compute = Compute(torch.device("cpu"), torch.float32)
    return Task(tuple(plans), tuple(SIZES), text or make_text(), compute, folder, held)
