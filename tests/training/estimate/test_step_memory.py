"""Memory of a real micro-batch under every gate, loss and term: what is left after it, and its peak next to the estimate."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

import llamamoe
from benchmarks.meters import CpuMeter
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.training.build import assemble
from llamamoe.training.distillation_options import DistillOptions
from llamamoe.training.estimate.estimate import estimate
from llamamoe.training.estimate.hardware import Hardware
from llamamoe.training.gates import GATES
from llamamoe.training.losses import LOSSES
from llamamoe.training.recipe import PretrainRecipe, load_pretrain_recipe

from ...dense import make_dense
from ..runs import BASE, make_tokens

FACTOR = 0.1
"""Tolerance of the estimate relative to the measurement."""
LEFT = 256
"""Bytes that may be left: sums of losses, of which there is a number each."""
JETMOE = {"top_k": 2, "method": "random", "target": "jetmoe"}
TERMS = sorted(set(DistillOptions.model_fields) - {"lm"})
CASES: dict[str, dict[str, Any]] = {
    **{f"gate {name}": {"gate": name} for name in GATES.names()},
    **{f"loss {name}": {"losses": [{"name": name}]} for name in LOSSES.names()},
    **{f"loss {name}, noise": {"losses": [{"name": name}], "gate": "noisy_top_k"} for name in LOSSES.names()},
    "loss competitive, experts learn": {"losses": [{"name": "competitive", "experts": True}]},
    "loss competitive, adapters learn": {"losses": [{"name": "competitive", "experts": True}], "lora": {"rank": 2}},
    **{f"term {name}": {"distill": {name: {}}} for name in TERMS},
    "documents apart": {"data": {"documents": "apart"}},
    **{f"experts {name}": {"experts_implementation": f"llamamoe_{name}"} for name in ("auto", "sorted", "masked")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 layers with 16 experts of 16 neurons, for each k that a gate works with; parent and tokens."""
    where = tmp_path_factory.mktemp("memory")
    dense = make_dense(where / "dense", num_hidden_layers=4, intermediate_size=256)
    make_tokens(where / "train", dense, 0)
    for k in {GATES.get(name).top_k or 2 for name in GATES.names()}:
        given = {"num_experts": 16, "top_k": k, "method": "random", "target": "mixtral"}
        llamamoe.split(dense, where / f"moe{k}", llamamoe.load_recipe(given=given), verify=False)
    return where


def recipe_of(folder: Path, keys: dict[str, Any], checkpointing: bool) -> PretrainRecipe:
    """512 tokens in one micro-batch; logits in chunks, so that the layers have the peak."""
    k = GATES.get(keys.get("gate", "top_k")).top_k or 2
    data = {"train": str(folder / "train" / "tokens"), "block_length": 128}
    paths = {"model": str(folder / f"moe{k}"), "parent": str(folder / "dense"), "data": data}
    sizes = {"batch_size": 4, "micro_batch_size": 4, "logits_at_once": 2**14, "evaluate_every": None, "steps": 2}
    given = {"experts_implementation": "grouped_mm", "gradient_checkpointing": checkpointing}
    return load_pretrain_recipe(given=BASE | given | sizes | paths | {**keys, "data": data | keys.get("data", {})})


def measure(recipe: PretrainRecipe, out: Path) -> tuple[int, int]:
    """Bytes above weights and moments: at most, and beside the gradients when a micro-batch is over."""
    trainer, _ = assemble(recipe, out, Path(recipe.model), Path(str(recipe.parent)), None)
    model: Any = trainer.model
    model.train()
    if recipe.gradient_checkpointing:  # as the Trainer does when training begins
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    first, second = list(trainer.parts.batches)
    learned = [*model.parameters(), *trainer.parts.dynamics.gate_parameters()]
    trainer.compute_loss(model, first).backward()  # makes what stays: rotary tables, statistics
    for parameter in learned:
        parameter.grad = None
    trainer._micro_losses.clear()
    gc.collect()
    gc.disable()  # what only a collection frees counts as held
    try:
        with CpuMeter() as meter:
            meter.begin()
            trainer.compute_loss(model, second).backward()
            meter.mark()
    finally:
        gc.enable()
    gradients = sum(each.grad.untyped_storage().nbytes() for each in learned if each.grad is not None)
    return meter.peak, meter.state - gradients


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_holds_what_the_estimate_says_and_leaves_nothing(
    case: str, checkpointing: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _check(recipe_of(folder, CASES[case], checkpointing), folder, tmp_path)


@pytest.mark.parametrize("case", ["gate noisy_top_k", "loss switch"])
def test_routed_attention_holds_what_the_estimate_says(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dense = make_dense(tmp_path / "dense", num_hidden_layers=4, intermediate_size=256, num_attention_heads=16)
    llamamoe.split(dense, tmp_path / "moe", llamamoe.load_recipe(given=JETMOE), verify=False)
    recipe = recipe_of(folder, CASES[case], False)
    keys = {"model": str(tmp_path / "moe"), "parent": str(dense), "experts_implementation": None}
    _check(recipe.model_copy(update=keys), tmp_path, tmp_path / "run")


def _check(recipe: PretrainRecipe, folder: Path, out: Path) -> None:
    peak, left = measure(recipe, out)
    model, parent = SafetensorsCheckpoint(Path(recipe.model)), SafetensorsCheckpoint(folder / "dense")
    paper = estimate(
        recipe, model.config, model.tensors, Hardware(1), parent_tensors=parent.tensors, parent_config=parent.config,
    )  # fmt: skip
    standing = sum(paper.parts.get(name, 0) for name in ("weights", "moments", "parent"))
    assert left <= LEFT
    assert paper.peak - standing == pytest.approx(peak, rel=FACTOR), paper.moment


@pytest.mark.parametrize("gate", GATES.names())
def test_checkpointing_halves_the_peak_under_every_gate(gate: str, folder: Path, tmp_path: Path) -> None:
    kept, checkpointed = (measure(recipe_of(folder, {"gate": gate}, on), tmp_path)[0] for on in (False, True))
    assert checkpointed < 0.5 * kept
