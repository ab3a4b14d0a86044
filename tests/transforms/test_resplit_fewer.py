"""Pieces of experts that are selected one by one: what the files compute, whose sizes they have, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe import RefusedError, UsageError, load_recipe, resplit, retop, split
from llamamoe.architectures.targets import TARGETS
from llamamoe.checkpoint.out_folder import DERIVED_FILE
from llamamoe.transforms.resplitting import run
from llamamoe.transforms.resplitting.layer import STRENGTHS
from llamamoe.transforms.resplitting.recipe import usable_methods

from ..dense import make_dense, make_tokenizer
from .test_merge import stop_at
from .test_resplit import FOREIGN, foreign

NAMES = [name for name in FOREIGN if TARGETS.get(name).shared != "one"]
KEYS: dict[str, Any] = {"top_k": 3, "calibration_tokens": 1024, "calibration_length": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1200 letters, which are tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["assert", "the", "class", "of", "a", "statement", "None", "is", "in"]
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 300))[:1200])
    return path


def mixture(folder: Path, name: str) -> Path:
    """A random mixture with a tokenizer."""
    make_tokenizer(foreign(folder, name))
    return folder


def routed_outputs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The outputs of the routed experts in the first layer that has any, as transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    found: list[torch.Tensor] = []
    ends = (".experts", ".block_sparse_moe")
    block = next(module for path, module in model.named_modules() if path.endswith(ends) and "shared" not in path)
    block.register_forward_hook(lambda *args: found.append(args[2][0] if isinstance(args[2], tuple) else args[2]))
    with torch.no_grad():
        model(ids)
    return found[0].flatten(0, -2)


def calibration_ids(folder: Path, text: Path) -> torch.Tensor:
    """The same tokens in another order."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"]
    return torch.tensor(ids[: min(1024, len(ids) // 64 * 64)]).view(-1, 64)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_have_the_error_that_the_receipt_states(name: str, text: Path, tmp_path: Path) -> None:
    source = mixture(tmp_path / "moe", name)
    found = resplit(source, tmp_path / "out", 4, calibration=[str(text)], **KEYS)
    assert (found.num_experts, found.top_k, found.expert_width) == ((5, 20), (2, 3), (24, 8))
    assert found.active_neurons == (48, 24)
    ids = calibration_ids(source, text)
    wanted, have = (routed_outputs(folder, ids) for folder in (source, tmp_path / "out"))
    error = float((wanted - have).norm() / wanted.norm())
    layers = found.receipt["layers"]
    assert error == pytest.approx(layers[0]["output_error"], rel=1e-3)
    assert all(layer["output_error"] < min(0.9, layer["output_error_before_repair"]) for layer in layers)
    assert {layer["router"] for layer in layers} == {"soft"}
    assert all(layer["router_strength"] in STRENGTHS for layer in layers)
    # all that is not routed keeps its bits
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    same = [key for key in before if key in after and before[key].shape == after[key].shape and ".experts." not in key]
    assert len(same) > 10
    assert all(torch.equal(before[key], after[key]) for key in same if "correction_bias" not in key)


def test_a_hard_router_stays_hard_and_a_token_that_costs_less_is_not_claimed_to_be_exact(
    text: Path, tmp_path: Path
) -> None:
    given = {"method": "random", "num_experts": 4, "top_k": 2, "target": "mixtral", "rescale": "unit"}
    moe = split(make_dense(tmp_path / "dense"), tmp_path / "moe", load_recipe(given=given), verify=False).out
    found = resplit(moe, tmp_path / "out", 2, calibration=[str(text)], **KEYS | {"repair": "per_expert"})
    assert {layer["router"] for layer in found.receipt["layers"]} == {"hard"}
    ids = calibration_ids(moe, text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        probabilities = torch.cat([each.softmax(-1) for each in model(ids, output_router_logits=True).router_logits])
    assert torch.allclose(probabilities, torch.full_like(probabilities, 1 / 8), rtol=1e-2)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["llamamoe"]
    assert (block["parity"], block["repair"], block["top_k"]) == ("none", "per_expert", 3)
    assert "not exact: 3 of 8" in block["exactness"]
    assert "approximated" in (tmp_path / "out" / "README.md").read_text()
    # the rows of pieces differ, so that any number of them can be selected
    assert not any("equal router rows" in line for line in retop(tmp_path / "out", tmp_path / "one", 1).warnings)


@pytest.mark.parametrize("target", ["glm4_moe", "ernie4_5_moe"])
def test_biases_of_a_hard_router_are_scaled_with_its_logits(target: str, text: Path, tmp_path: Path) -> None:
    given = {"method": "random", "num_experts": 5, "top_k": 2, "target": target, "shared": "1x", "rescale": "unit"}
    moe = split(make_dense(tmp_path / "dense"), tmp_path / "moe", load_recipe(given=given), verify=False).out
    unbiased = routed_outputs(moe, calibration_ids(moe, text))
    weights = load_file(moe / "model.safetensors")
    for key in (each for each in weights if "correction_bias" in each):
        weights[key].copy_(torch.tensor([2e-4, 0.0, -2e-4, 4e-4, -4e-4]))  # scores differ by about 1e-4
    save_file(weights, moe / "model.safetensors", {"format": "pt"})
    found = resplit(moe, tmp_path / "out", 2, calibration=[str(text)], **KEYS | {"repair": "none"})
    assert {layer["router"] for layer in found.receipt["layers"]} == {"hard"}
    wanted, have = (routed_outputs(folder, calibration_ids(moe, text)) for folder in (moe, tmp_path / "out"))
    assert not torch.allclose(wanted, unbiased, rtol=0.1), "the biases change what is selected"
    error = float((wanted - have).norm() / wanted.norm())
    assert error == pytest.approx(found.receipt["layers"][0]["output_error"], rel=1e-2)
    assert error < 0.9


def test_a_stopped_run_goes_on_from_the_layer_and_ends_alike(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = mixture(tmp_path / "moe", "mixtral")
    whole = resplit(source, tmp_path / "whole", 2, calibration=[str(text)], **KEYS)
    with pytest.raises(KeyboardInterrupt):
        resplit(source, tmp_path / "out", 2, calibration=[str(text)], **KEYS, progress=stop_at(1))
    assert not (tmp_path / "out").exists()
    converted: list[int] = []
    finer_layer = run.finer_layer
    monkeypatch.setattr(run, "finer_layer", lambda *args: converted.append(args[1]) or finer_layer(*args))
    copied = tmp_path / "damaged.partial"
    shutil.copytree(tmp_path / "out.partial", copied)
    (copied / ".calibration" / "residual.1").write_bytes(b"")
    for name, layers in (("out", [1]), ("damaged", [0, 1])):
        converted.clear()
        found = resplit(source, tmp_path / name, 2, calibration=[str(text)], **KEYS, resume=True)
        assert converted == layers
        assert found.receipt["layers"] == whole.receipt["layers"]
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "model.safetensors"
        ).read_bytes()
        assert not (tmp_path / name / ".calibration").exists()


def test_another_number_of_threads_does_not_resume(text: Path, tmp_path: Path) -> None:
    """Factorisations of wide layers differ by it in their last bits: the layers would be those of two runs."""
    source = mixture(tmp_path / "moe", "mixtral")
    with pytest.raises(KeyboardInterrupt):
        resplit(source, tmp_path / "out", 2, calibration=[str(text)], **KEYS, progress=stop_at(1))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(RefusedError, match="number of threads"):
            resplit(source, tmp_path / "out", 2, calibration=[str(text)], **KEYS, resume=True)
    finally:
        torch.set_num_threads(before)


def test_a_plan_tells_the_cost_and_writes_nothing(text: Path, tmp_path: Path) -> None:
    source = mixture(tmp_path / "moe", "qwen3_moe")
    plan = resplit(source, None, 4, calibration=[str(text)], **KEYS, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    assert plan.calibration is not None
    assert (plan.calibration.tokens, plan.calibration.length) == (1024, 64)
    assert plan.to_json()["calibration_cost"]["flops"] > 0
    assert plan.to_json()["peak_memory_bytes"] > 8 * 120**2  # the sums of the repair
    assert not plan.exact
    found = resplit(source, tmp_path / "out", 4, calibration=[str(text)], **KEYS)
    assert found.facts == plan.facts
    receipt = json.loads((tmp_path / "out" / DERIVED_FILE).read_text())
    assert receipt["calibration"]["tokens"] == 1024
    assert (receipt["repair"], receipt["method"]) == ("least_squares", "token_clusters")


def test_what_has_no_meaning_is_refused(text: Path, tmp_path: Path) -> None:
    source = foreign(tmp_path / "moe", "glm4_moe")

    def refused(kind: type[Exception], match: str, **keys: Any) -> None:
        with pytest.raises(kind, match=match):
            resplit(source, tmp_path / "out", 4, **keys, dry_run=True)

    refused(UsageError, "less than the 8 pieces", top_k=4)
    refused(UsageError, "at most 8", top_k=9, calibration=[str(text)])
    refused(UsageError, "text has no use", calibration=[str(text)])
    refused(UsageError, "text has no use", top_k=8, calibration=[str(text)])
    refused(UsageError, "for dense models only", top_k=4, calibration=["auto"])
    refused(UsageError, "token_clusters", top_k=4, calibration=[str(text)], method="token_cluster")
    refused(UsageError, "'gradient' cannot split experts", top_k=4, calibration=[str(text)], method="gradient")
    refused(UsageError, "no_such", top_k=4, calibration=[str(tmp_path / "no_such.txt")])
    refused(RefusedError, "64 positions", top_k=4, calibration=[str(text)], calibration_length=65)
    assert set(usable_methods(text=True)) >= {"kmeans", "random", "token_clusters", "coactivation"}
    assert not set(usable_methods(text=True)) & {"static", "upcycle", "gradient"}
