"""Memory of a device, time and disk of the recipes for 7B and 70B models, as ``llamamoe pretrain --dry-run`` works them out.

    python benchmarks/recipes_on_paper.py

The parents' headers are written to a temporary folder (sparse files, no weights), `llamamoe.plan_conversion` says what the
conversion would hold, and the estimate is the dry run's own. benchmarks/training_memory.py is its check against measured
steps; operations are checked against torch's counter by tests/training/test_metrics.py. Time is operations over what the
devices can do at most times the share of it that is reached, which is not known before a run, and the bytes of the copies
that grouped products make of tokens over the bandwidth of their memory.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llamamoe
from llamamoe.checkpoint.base import TensorInfo
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.training.estimate.estimate import Estimate, estimate
from llamamoe.training.estimate.hardware import Hardware
from llamamoe.training.recipe import load_pretrain_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.synthetic import LLAMA_2_7B, LLAMA_3_70B, make

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "pretrain"
DEFAULT = {"num_experts": 64, "top_k": 24, "shared": 0.125}
UTILISATION = 0.4


@dataclass(frozen=True)
class Case:
    """A recipe on its machines.

    Attributes:
        recipe: Its name.
        parent: The dense model's configuration.
        split: Sizes of the conversion; the splitter does not change them.
        devices: How many.
        device: What they are called.
        memory: Bytes of one.
        peak_flops: bfloat16 operations per second of one, by its maker's data sheet.
        bandwidth: Bytes per second of its memory, by the same.
    """

    recipe: str
    parent: dict[str, Any]
    split: dict[str, Any]
    devices: int
    device: str
    memory: int
    peak_flops: float
    bandwidth: float


CASES = (
    Case(
        "llama_moe_paper", LLAMA_2_7B, {"num_experts": 16, "top_k": 4}, 112, "A100, 80 GB", 80 * 10**9, 312e12, 2.039e12
    ),
    Case("recover_distill", LLAMA_2_7B, DEFAULT, 8, "H100, 80 GB", 80 * 10**9, 989e12, 3.35e12),
    Case("recover_70b", LLAMA_3_70B, DEFAULT, 64, "H100, 80 GB", 80 * 10**9, 989e12, 3.35e12),
)


def on_paper(case: Case, folder: Path) -> Estimate:
    """Return the output of the dry run."""
    parent = folder / case.recipe
    make(parent, case.parent, num_shards=4, sparse=True)
    plan = llamamoe.plan_conversion(parent, llamamoe.load_recipe(given={**case.split, "method": "random"}))
    tensors = {tensor.name: TensorInfo("BF16", tensor.shape, folder) for tensor in plan.tensors}
    recipe = load_pretrain_recipe(RECIPES / f"{case.recipe}.yaml")
    dense = SafetensorsCheckpoint(parent) if recipe.parent is not None else None
    return estimate(
        recipe, plan.config, tensors,
        Hardware(case.devices, case.memory, case.peak_flops, case.bandwidth, UTILISATION),
        parent_tensors=dense.tensors if dense else None, parent_config=dense.config if dense else None,
    )  # fmt: skip


def main() -> None:
    """Work out every case; print a table in Markdown, and the warnings."""
    print(
        "| recipe | parameters, active | devices | memory of each, peak | tokens | operations, at 40 % of the peak "
        "| copies of tokens, at full bandwidth | time | checkpoint |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    warnings = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            found = on_paper(case, Path(folder))
            assert found.seconds_per_step is not None
            numbers = found.parameters
            copying = found.moved["copies"] / case.bandwidth
            print(
                f"| {case.recipe} | {numbers['total'] / 1e9:.1f} B, {numbers['active'] / 1e9:.1f} B | {case.devices} x {case.device} "
                f"| {found.peak / 1e9:.1f} GB | {found.tokens / 1e9:.0f} B "
                f"| {found.seconds_per_step - copying:.1f} s a step "
                f"| {found.moved['copies'] / 1e12:.1f} TB, {copying:.1f} s a step "
                f"| {found.seconds_per_step * found.steps / 3600:.0f} h ({found.seconds_per_step:.1f} s a step) "
                f"| {found.disk['checkpoint'] / 1e9:.0f} GB |"
            )
            warnings += [f"{case.recipe}: {sentence}" for sentence in found.warnings]
    for sentence in warnings:
        print("!", sentence)


if __name__ == "__main__":
    main()
