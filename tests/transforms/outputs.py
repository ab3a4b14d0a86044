"""Logits of a checkpoint in plain transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def logits(folder: Path) -> torch.Tensor:
    """Return float32 logits of fixed tokens; the files must hold exactly what the architecture has."""
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found
