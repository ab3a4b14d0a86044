"""Verification of conversions that claim less than exactness, or that hold copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.conversion.verify import Verification
from llamamoe.conversion.verify_runs import receipt_tokens
from tests.dense import make_dense

GIVEN: dict[str, dict[str, Any]] = {
    "pruned": {"method": "static", "shared": 0.5, "shared_by": "weight_norm"},
    "copied": {"method": "upcycle", "num_experts": 2, "top_k": 1, "shared": 0.25},
    "repaired": {
        "method": "random", "num_experts": 4, "top_k": 2, "shared": 0.25, "repair": "least_squares",
        "calibration_tokens": 300, "calibration_length": 30, "device": "cpu",
    },
    "repaired and pruned": {
        "method": "static", "shared": 0.5, "shared_by": "weight_norm", "repair": "least_squares",
        "calibration_tokens": 300, "calibration_length": 30, "device": "cpu",
    },
}  # fmt: skip
FFN = {"pruned": "mlp.", "repaired and pruned": "mlp.", "copied": "mlp.experts.1.", "repaired": "mlp.experts.1."}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    (folder / "text.txt").write_text("".join(chr(32 + i * i % 90) for i in range(600)))
    return make_dense(folder / "dense", num_hidden_layers=1)


@pytest.fixture(scope="module")
def converted(dense: Path) -> Callable[[str], Path]:
    """One conversion of each kind, made once."""

    def get(kind: str) -> Path:
        out = dense.with_name(kind)
        if not out.exists():
            given = GIVEN[kind]
            if "repair" in given:
                given = given | {"calibration": [str(dense.with_name("text.txt"))]}
            llamamoe.split(dense, out, llamamoe.load_recipe(given=given), verify=False)
        return out

    return get


@pytest.fixture
def verify(converted: Callable[[str], Path], dense: Path, tmp_path: Path) -> Callable[..., Verification]:
    """Verify a copy of a conversion, one tensor of whose FFN was changed."""

    def run(kind: str, part: str = "", how: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Verification:
        folder = Path(shutil.copytree(converted(kind), tmp_path / "copy"))
        tensors = load_file(folder / "model.safetensors")
        if part:
            name = f"model.layers.0.{FFN[kind]}{part}_proj.weight"
            tensors[name] = how(tensors[name].clone()).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return llamamoe.verify(folder, dense)

    return run


def set_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 1] = value
        return tensor

    return change


def twice(tensor: torch.Tensor) -> torch.Tensor:
    """The first neuron (a row of gate and up) a second time, in the place of the second."""
    tensor[1] = tensor[0]
    return tensor


def relative(converted: Path, dense: Path) -> float:
    """Largest difference of the logits on the receipt's text, each model run whole by plain transformers."""
    ids, _ = receipt_tokens(converted, 128)
    with torch.no_grad():
        parent, found = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (dense, converted))
    return float((parent - found).abs().max() / parent.abs().max())


@pytest.mark.parametrize(("kind", "kept"), [("pruned", "neurons"), ("repaired", "gate_up")])
def test_what_claims_nothing_passes_and_says_how_far_it_is(
    verify: Callable[..., Verification], converted: Callable[[str], Path], dense: Path, kind: str, kept: str
) -> None:
    found = verify(kind)
    assert (found.passed, found.kept, found.neurons_checked) == (True, kept, 1)
    assert (found.equal_weights, found.as_stored) == (None, None)
    assert found.as_configured == pytest.approx(relative(converted(kind), dense), rel=1e-3)
    assert [layer for layer, _ in found.layer_error] == [0]
    assert found.layer_error[0][1] > 0.01


def test_a_repaired_model_is_far_from_its_parent_with_all_experts_too(verify: Callable[..., Verification]) -> None:
    """Information, not a claim: the repair was fitted to the top-k output."""
    found = verify("repaired")
    assert found.all_experts is not None
    assert found.all_experts > 1e-3


def test_copies_pass_at_their_own_top_k(verify: Callable[..., Verification]) -> None:
    found = verify("copied")
    assert (found.kept, found.as_configured) == ("neurons", None)
    assert found.as_stored is not None
    assert found.as_stored < 1e-5


@pytest.mark.parametrize("kind", list(GIVEN))
@pytest.mark.parametrize("part", ["gate", "up"])
def test_changed_input_rows_are_seen_whatever_is_claimed(
    verify: Callable[..., Verification], kind: str, part: str
) -> None:
    with pytest.raises(llamamoe.VerificationError, match=r"layer 0: .*bit for bit"):
        verify(kind, part, set_value(0.25))


@pytest.mark.parametrize("kind", ["pruned", "copied"])
def test_changed_down_columns_are_seen_where_nothing_was_repaired(
    verify: Callable[..., Verification], kind: str
) -> None:
    with pytest.raises(llamamoe.VerificationError, match=r"layer 0: .*bit for bit"):
        verify(kind, "down", set_value(0.25))


def test_changed_down_columns_of_a_repair_show_in_the_distance_only_without_a_receipt(
    verify: Callable[..., Verification], converted: Callable[[str], Path], dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(llamamoe.VerificationError, match=r"SHA-256"):
        verify("repaired", "down", lambda t: t * 2)
    (tmp_path / "copy" / "llamamoe_receipt.json").unlink()
    found = llamamoe.verify(tmp_path / "copy", dense)
    assert found.passed
    assert found.unproven
    assert found.as_configured is not None
    assert abs(found.as_configured - relative(converted("repaired"), dense)) > 1e-4


@pytest.mark.parametrize("kind", ["repaired", "repaired and pruned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_down_columns_that_are_not_finite_are_seen(
    verify: Callable[..., Verification], kind: str, value: float
) -> None:
    with pytest.raises(llamamoe.VerificationError, match=r"down_proj.* NaN or infinite"):
        verify(kind, "down", set_value(value))


@pytest.mark.parametrize("kind", ["pruned", "copied"])
def test_a_neuron_twice_is_seen(converted: Callable[[str], Path], dense: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(converted(kind), tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    for part in ("gate", "up", "down"):
        name = f"model.layers.0.{FFN[kind]}{part}_proj.weight"
        value = tensors[name].T if part == "down" else tensors[name]
        value = twice(value.clone())
        tensors[name] = (value.T if part == "down" else value).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(llamamoe.VerificationError, match=r"each at most once|2 copies"):
        llamamoe.verify(folder, dense)


def test_logits_that_overflow_are_seen_without_a_receipt(
    verify: Callable[..., Verification], dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(llamamoe.VerificationError, match="SHA-256"):
        verify("repaired", "down", lambda t: torch.full_like(t, 3e38))
    (tmp_path / "copy" / "llamamoe_receipt.json").unlink()
    with pytest.raises(llamamoe.VerificationError, match="not finite with the configured top-k"):
        llamamoe.verify(tmp_path / "copy", dense)


NOISE = {
    "query": "model.layers.0.self_attn.q_proj.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.layers.0.input_layernorm.weight",
    "last norm": "model.norm.weight",
    "router": "model.layers.0.mlp.gate.weight",
    "down": "model.layers.0.mlp.experts.1.down_proj.weight",
}


def replace_by_noise(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.randn_like(tensors[name].float()).to(tensors[name].dtype) * 0.02
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("part", NOISE)
def test_noise_anywhere_in_a_repaired_conversion_is_found(
    part: str, converted: Callable[[str], Path], dense: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted("repaired"), tmp_path / "copy"))
    replace_by_noise(folder, NOISE[part])
    where = "experts or router of layer 0" if part in ("router", "down") else NOISE[part]
    with pytest.raises(llamamoe.VerificationError, match=where.replace(".", r"\.")):
        llamamoe.verify(folder, dense)


def test_what_is_proven_of_a_repaired_conversion(converted: Callable[[str], Path], dense: Path) -> None:
    found = llamamoe.verify(converted("repaired"), dense)
    assert found.copied_checked > 0
    assert found.hashed_checked > found.copied_checked
    assert not found.unproven


@pytest.mark.parametrize("kind", ["missing", "old"])
def test_a_receipt_without_hashes_is_told(
    kind: str, converted: Callable[[str], Path], dense: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted("repaired"), tmp_path / "copy"))
    receipt = folder / "llamamoe_receipt.json"
    if kind == "missing":
        receipt.unlink()
    else:
        receipt.write_text("{}")
    found = llamamoe.verify(folder, dense)
    assert "llamamoe_receipt.json" in found.unproven
    assert found.hashed_checked == 0
    replace_by_noise(folder, NOISE["query"])
    with pytest.raises(llamamoe.VerificationError, match="q_proj"):
        llamamoe.verify(folder, dense)
