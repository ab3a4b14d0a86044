"""Active parameters and operations of a training step, against what torch counts; numbers that a run tells a tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from llamamoe import inspect, pretrain
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.training.build import _flops_per_token
from llamamoe.training.dynamics import CollapsedError
from llamamoe.training.estimate.estimate import estimate
from llamamoe.training.estimate.hardware import Hardware
from llamamoe.training.estimate.shapes import read_shape
from llamamoe.training.lora import add_adapters
from llamamoe.training.metrics import active_parameters, peak_flops, training_flops
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.recipe import load_pretrain_recipe
from llamamoe.training.recipe_parts import LoraRecipe

from .runs import lines_of, make_world, recipe_of
from .tiny_moe import ARCHITECTURES, input_ids, tiny_moe

ROWS, LENGTH = 2, 12


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_active_parameters_are_those_of_the_headers(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_moe(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    cost = inspect(tmp_path / "model").cost
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("e_score_correction_bias"))
    found = active_parameters(model, find_moe_layers(model))
    assert found - biases == cost.active_parameters - cost_of_biases(tmp_path / "model")
    checkpoint = SafetensorsCheckpoint(tmp_path / "model")
    assert read_shape(checkpoint.config, checkpoint.tensors).active == cost.active_parameters


def cost_of_biases(folder: Path) -> int:
    """Selection biases, which headers list for every architecture that has them, and torch only where it is a parameter."""
    tensors = load_file(folder / "model.safetensors")
    return sum(value.numel() for name, value in tensors.items() if name.endswith("e_score_correction_bias"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """But for attention, of which torch counts the whole square and PaLM's causal count one half."""
    model = tiny_moe(name)
    model.set_experts_implementation("eager")
    model.config._attn_implementation = "eager"
    ids_BT = input_ids(ROWS, LENGTH)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    config = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    multiplied = active_parameters(model, find_moe_layers(model))
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)  # no products
    half = training_flops(multiplied, config.num_hidden_layers, width, LENGTH)
    whole = half + 6.0 * config.num_hidden_layers * width * LENGTH - 6.0 * norms
    assert counter.get_total_flops() / (ROWS * LENGTH) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_dry_run_counts_what_a_run_does(name: str, tmp_path: Path) -> None:
    """Also where heads are wider than the hidden size divided by them."""
    model = tiny_moe(name)
    model.save_pretrained(tmp_path / "model")
    checkpoint = SafetensorsCheckpoint(tmp_path / "model")
    data = {"train": "t", "block_length": LENGTH}
    given = {"model": "m", "data": data, "steps": 1, "batch_size": 1, "device": "cpu"}
    recipe = load_pretrain_recipe(given=given)
    paper = estimate(recipe, checkpoint.config, checkpoint.tensors, Hardware(1)).operations["student"]
    active = active_parameters(model, find_moe_layers(model))
    assert paper == pytest.approx(_flops_per_token(recipe, model, active), rel=1e-6)


def test_adapters_count_as_what_they_adapt() -> None:
    pytest.importorskip("peft")
    model = tiny_moe("mixtral")
    plain = active_parameters(model, find_moe_layers(model))
    wrapped = add_adapters(model, LoraRecipe(rank=2))
    layers = find_moe_layers(wrapped)
    added = sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n)
    inside = sum(p.numel() for moe in layers for n, p in moe.experts.named_parameters() if "lora_" in n)
    share = layers[0].top_k / layers[0].num_experts
    assert active_parameters(wrapped, layers) == pytest.approx(plain + added - inside * (1 - share), abs=len(layers))


def test_peaks_are_found_by_a_part_of_the_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Some other device") is None


def test_utilisation_is_operations_over_what_the_devices_can(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamamoe.training import trainer

    original = trainer.MoeTrainer.__init__

    def known(self: Any, model: Any, args: Any, parts: Any, **keys: Any) -> None:
        parts.peak_flops = 1e9
        original(self, model, args, parts, **keys)

    monkeypatch.setattr(trainer.MoeTrainer, "__init__", known)
    pretrain(recipe_of(world, "steps=2"), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if line["kind"] == "train"]
    checkpoint = SafetensorsCheckpoint(tmp_path / "run" / "model")
    shape = read_shape(checkpoint.config, checkpoint.tensors)
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["active_parameters"] == shape.active
    for each in times:
        operations = each["tokens_per_second"] * training_flops(shape.active, 2, 64, 16)
        assert each["mfu_active"] == pytest.approx(operations / 1e9, rel=0.01)


def test_a_collapsed_router_warns_once_a_layer_or_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(tmp_path / "world", top_k=1, num_experts=8)
    folder = Path(world["model"])
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("0.block_sparse_moe.gate.weight"):
            value[0], value[1], value[2:] = value[0] * 1e4, -value[0] * 1e4, 0  # one of two always wins
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("llamamoe.training.dynamics._ENOUGH", 1)
    keys: dict[str, Any] = {"router": {"start_std": None}}
    pretrain(recipe_of(world, "steps=3", **keys), tmp_path / "run")
    warned = [line for line in caplog.messages if "layer 0" in line]
    assert len(warned) == 1, caplog.messages
    assert not [line for line in caplog.messages if "layer 1" in line]
    with pytest.raises(CollapsedError, match="step 1: layer 0"):
        pretrain(recipe_of(world, "steps=3", "stop_on_collapse=true", **keys), tmp_path / "other")


def test_a_tracker_gets_every_number(world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any tracker of transformers hears what its callbacks are told."""
    from transformers import TrainerCallback

    heard: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keys: Any) -> None:
            heard.append(dict(logs))

    from llamamoe.training import trainer

    original = trainer.MoeTrainer.train

    def tracked(self: Any, **keys: Any) -> Any:
        self.add_callback(Tracker())
        return original(self, **keys)

    monkeypatch.setattr(trainer.MoeTrainer, "train", tracked)
    losses = [{"name": "switch"}]
    pretrain(recipe_of(world, "steps=2", losses=losses, distill={"kl": {}}), tmp_path / "run")
    train = next(each for each in heard if "terms/lm" in each)
    line = next(each for each in lines_of(tmp_path / "run") if each["kind"] == "train")
    for key in (
        "terms/kl",
        "terms/switch",
        "domain_loss/large",
        "lr/router",
        "mixture/small",
        "routing/max_violation/mean",
    ):
        part, _, name = key.partition("/")
        assert train[key] == line[part][name]
    assert train["tokens_per_second"] > 0
    assert any("eval_loss" in each and "eval_domain_loss/small" in each for each in heard)
