"""The world's model as a mixture of experts that runs, for what acts on routers while they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import llamamoe

from .world import World

EXPERTS = 8


def convert(world: World, out: Path) -> Path:
    """Eight experts under soft routers that prefer some of them by a lot."""
    given = {
        "method": "kmeans",
        "num_experts": EXPERTS,
        "top_k": 2,
        "target": "qwen2_moe",
        "router": {"name": "random", "std": 0.3},
        "router_scale": "soft",
        "rescale": "llama_moe",
    }
    return llamamoe.split(world.folder, out, llamamoe.load_recipe(given=given), verify=False).out


def load(folder: Path, **keys: Any) -> Any:
    """In training mode, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **keys).train()


def text(world: World) -> torch.Tensor:
    """Four short sequences of the world's text."""
    return torch.from_numpy(world.ids_ST[:4, :48])
