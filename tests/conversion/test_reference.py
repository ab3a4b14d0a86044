"""The parent as plain transformers loads it: the same logits, one matrix at a time, and no trust in our own reading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llamamoe
from llamamoe.architectures.dense_checkpoint import understand
from llamamoe.architectures.sources.llama import Llama
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.conversion.reference import Reference, check_config
from tests.dense import VARIANTS, make_dense

IDS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
CALIBRATED: dict[str, Any] = {
    "method": "random", "num_experts": 4, "top_k": 2, "shared": 0.25, "repair": "least_squares",
    "calibration_tokens": 300, "calibration_length": 30, "device": "cpu",
}  # fmt: skip


def ignore(layer: int, module: torch.nn.Module) -> None:
    pass


def logits(folder: Path, dtype: str = "F32") -> torch.Tensor:
    model = understand(SafetensorsCheckpoint(folder))
    return Reference(model, dtype).logits(IDS, before_layer=ignore, after_layer=ignore)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_transformers_computes(tmp_path: Path, variant: str) -> None:
    folder = make_dense(tmp_path / "dense", variant, dtype=torch.bfloat16, max_shard_size="50KB")
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    assert torch.equal(logits(folder), whole)


def test_weights_are_rounded_to_the_dtype_of_the_conversion(tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense", "llama-tied")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        exact = model(IDS).logits
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay exact
            parameter.copy_(parameter.to(torch.bfloat16))
        rounded = model(IDS).logits
    assert torch.equal(logits(folder, "BF16"), rounded)
    assert not torch.equal(exact, rounded)


def test_layers_stay_on_disk(tmp_path: Path) -> None:
    model = understand(SafetensorsCheckpoint(make_dense(tmp_path / "dense", num_hidden_layers=3)))
    reference = Reference(model, "F32")
    layers = reference.model.model.layers
    seen: list[bool] = []

    def look(layer: int, module: torch.nn.Module) -> None:
        seen.append(all(parameter.is_meta for parameter in layers.parameters()))

    reference.logits(IDS, before_layer=look, after_layer=look)
    assert seen == [True] * 6


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_reader_that_takes_other_weights_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calibrated: bool
) -> None:
    """Also where the conversion claims no exactness, so that logits could not tell."""
    dense = make_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("".join(chr(32 + i * i % 90) for i in range(600)))
    given = CALIBRATED | {"calibration": [str(tmp_path / "text.txt")]} if calibrated else {"method": "random"}
    given |= {"num_experts": 4}
    real = SafetensorsCheckpoint.read

    def wrong(self: SafetensorsCheckpoint, tensor: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        value = real(self, tensor, rows)
        return value * 1.001 if self.path == dense and tensor == name else value

    monkeypatch.setattr(SafetensorsCheckpoint, "read", wrong)
    with pytest.raises(llamamoe.VerificationError, match=f"{name}: transformers loads different values") as caught:
        llamamoe.split(dense, tmp_path / "out", llamamoe.load_recipe(given=given))
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_single_file_beside_shards_is_what_transformers_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reader that takes the shards; one that refuses the folder, or takes the file, is as good."""
    dense = make_dense(tmp_path / "dense", max_shard_size="50KB")
    other = make_dense(tmp_path / "other", seed=1)
    model = understand(SafetensorsCheckpoint(dense))
    save_file(load_file(other / "model.safetensors"), dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(llamamoe.VerificationError, match="transformers loads different values"):
        Reference(model, "F32").logits(IDS, before_layer=ignore, after_layer=ignore)


def test_a_wrong_default_for_a_missing_key_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_dense(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    del config["rms_norm_eps"]
    (dense / "config.json").write_text(json.dumps(config))
    wrong = {"rms_norm_eps": Llama.fields["rms_norm_eps"]._replace(default=1.5e-6)}
    monkeypatch.setattr(Llama, "fields", {**Llama.fields, **wrong})
    with pytest.raises(llamamoe.VerificationError, match=r"transformers takes rms_norm_eps = 1e-06, .* 1\.5e-06"):
        llamamoe.split(dense, tmp_path / "out", llamamoe.load_recipe(given={"method": "random", "num_experts": 4}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_understood_as_transformers_understands_it(tmp_path: Path, variant: str) -> None:
    folder = make_dense(tmp_path / "dense", variant)
    model = understand(SafetensorsCheckpoint(folder))
    effective = AutoConfig.from_pretrained(folder).to_dict()
    check_config(model, effective)
    wrong = replace(model, spec=replace(model.spec, rope=model.spec.rope | {"rope_theta": 5.0}))
    with pytest.raises(llamamoe.VerificationError, match="rope"):
        check_config(wrong, effective)


def test_an_adapter_is_not_followed(tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense")
    model = understand(SafetensorsCheckpoint(folder))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))
    with pytest.raises(llamamoe.VerificationError, match=r"adapter_config\.json"):
        Reference(model, "F32")


def test_a_parent_that_transformers_cannot_load_is_one_error(tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense")
    model = understand(SafetensorsCheckpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(llamamoe.VerificationError, match="transformers cannot load the parent"):
        Reference(model, "F32")
