"""A program whose speed is known, and a model that takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llamamoe.errors import LlamaMoeError
from llamamoe.studies.speed.runtimes import Load
from llamamoe.studies.speed.shapes import ModelShape

TINY = ModelShape("tiny", 64, 512, 2, 4, 2, 300)


class Fake:
    """A program as fast as its models are small; ten times as slow each time it runs, as a machine that others use."""

    name = "fake"

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.refuses = ""

    def prepare(self, folder: Path, room: Path) -> Path:
        return folder

    def rates(self, model: Path, load: Load) -> dict[str, float]:
        if self.refuses and self.refuses in model.name:
            raise LlamaMoeError("it fell over.")
        self.runs.append(model.name)
        config = json.loads((model / "config.json").read_text())
        width = config.get("moe_intermediate_size", 0) * config.get("num_experts_per_tok", 0)
        width += config.get("shared_expert_intermediate_size", 0) if width else config["intermediate_size"]
        return {task: 1e6 / width / 10 ** len(self.runs) for task in load.measures}

    def facts(self) -> dict[str, Any]:
        return {"versions": {"fake": "1"}, "threads": 1}
