"""Every kind of tensor of every kind of conversion: one changed bit, or noise, and `verify` names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llamamoe
from llamamoe.architectures.moe_layout import Constant, Copy, OutTensor
from llamamoe.conversion.reference import same_bits
from tests.dense import make_dense

RANDOM: dict[str, Any] = {"method": "random", "num_experts": 4, "top_k": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {**RANDOM, "target": "mixtral"}),
    "qwen2_moe": ("llama-tied", {**RANDOM, "target": "qwen2_moe", "shared": "1x"}),
    "qwen2_moe-stub": ("llama", {**RANDOM, "target": "qwen2_moe", "keep_dense": [0]}),
    "qwen3_moe": ("qwen3", {**RANDOM, "target": "qwen3_moe", "keep_dense": [0]}),
    "glm4_moe": ("qwen3", {**RANDOM, "target": "glm4_moe", "shared": "1x", "keep_dense": [0]}),
    "granitemoeshared": ("granite", {**RANDOM, "target": "granitemoeshared", "shared": "1x"}),
    "hunyuan_v1_moe": ("hunyuan_v1_dense", {**RANDOM, "target": "hunyuan_v1_moe", "shared": "1x"}),
    "flex_olmo": ("olmo2", {**RANDOM, "target": "flex_olmo"}),
    "qwen3_5_moe_text": ("qwen3_5_text", {**RANDOM, "target": "qwen3_5_moe_text", "shared": "1x"}),
    "cohere2_moe": ("cohere2", {**RANDOM, "target": "cohere2_moe", "shared": "1x", "keep_dense": [1]}),
    "granitemoe_swa": ("smollm3", {**RANDOM, "target": "granitemoe_swa", "shared": "1x"}),
    "ernie4_5_moe": ("llama", {**RANDOM, "target": "ernie4_5_moe", "shared": "1x", "keep_dense": [0]}),
    "three experts": ("llama", {**RANDOM, "num_experts": 3, "target": "mixtral", "dtype": "bfloat16"}),
    "calibrated": (
        "llama",
        {
            **RANDOM, "method": "token_clusters", "target": "qwen2_moe", "shared": 0.25, "repair": "least_squares",
            "router": "ridge", "calibration_tokens": 300, "calibration_length": 30, "device": "cpu",
        },
    ),
}  # fmt: skip
RECEIPT = "llamamoe_receipt.json"


class Converted:
    """One conversion, whose files can be changed and are restored."""

    def __init__(self, folder: Path, kind: str) -> None:
        variant, given = KINDS[kind]
        self.dense = make_dense(folder / "dense", variant)
        self.out = folder / "out"
        if "repair" in given:
            (folder / "text.txt").write_text("".join(chr(32 + i * i % 90) for i in range(600)))
            given = {**given, "calibration": [str(folder / "text.txt")]}
        result = llamamoe.split(self.dense, self.out, llamamoe.load_recipe(given=given))
        self.plan, self.receipt = result.plan, result.receipt
        self._kept = folder / "kept"
        shutil.copytree(self.out, self._kept)

    def change(self, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        file = self.out / "model.safetensors"
        tensors = load_file(file)
        tensors[name] = how(tensors[name].clone()).contiguous()
        save_file(tensors, file, {"format": "pt"})

    def change_receipt(self, **values: Any) -> None:
        receipt = json.loads((self.out / RECEIPT).read_text()) | values
        kept = {key: value for key, value in receipt.items() if value is not None}
        (self.out / RECEIPT).write_text(json.dumps(kept))

    def restore(self) -> None:
        shutil.rmtree(self.out)
        shutil.copytree(self._kept, self.out)

    def representatives(self) -> list[OutTensor]:
        """One tensor of each role and origin, from the last layer that has one."""
        found = {(t.role, type(t.origin), getattr(t.origin, "part", ""), t.name[-12:]): t for t in self.plan.tensors}
        return list(found.values())


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    return {}


@pytest.fixture
def converted(
    conversions: dict[str, Converted], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Converted]]:
    used: list[Converted] = []

    def get(kind: str) -> Converted:
        if kind not in conversions:
            conversions[kind] = Converted(tmp_path_factory.mktemp("integrity"), kind)
        used.append(conversions[kind])
        return conversions[kind]

    yield get
    for each in used:
        each.restore()


def flip(tensor: torch.Tensor) -> torch.Tensor:
    """Flip the lowest bit of the last value."""
    tensor.view(torch.uint8).view(-1)[-tensor.dtype.itemsize] ^= 1
    return tensor


def noise(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.dtype) * 0.02


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_untouched_conversion_is_proved_whole(converted: Callable[[str], Converted], kind: str) -> None:
    case = converted(kind)
    found = llamamoe.verify(case.out, case.dense)
    copies = sum(isinstance(t.origin, Copy | Constant) for t in case.plan.tensors)
    assert (found.passed, found.unproven) == (True, "")
    assert (found.copied_checked, found.hashed_checked) == (copies, len(case.plan.tensors))
    assert case.receipt["verification"]["copied_checked"] == copies
    assert case.receipt["verification"]["hashed_checked"] == len(case.plan.tensors)
    assert "from_pretrained" in found.reference


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_flipped_bit_of_any_tensor_is_named(converted: Callable[[str], Converted], kind: str) -> None:
    case = converted(kind)
    for tensor in case.representatives():
        case.change(tensor.name, flip)
        with pytest.raises(llamamoe.VerificationError) as caught:
            llamamoe.verify(case.out, case.dense)
        copied = isinstance(tensor.origin, Copy | Constant)
        assert (tensor.name if copied else f"layer {tensor.layer}") in caught.value.message, tensor.name
        assert caught.value.exit_code == 4
        case.restore()
    assert llamamoe.verify(case.out, case.dense).passed


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "model.layers.1.mlp.shared_expert.down_proj.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
    ],
)
def test_noise_in_a_calibrated_conversion_is_seen(converted: Callable[[str], Converted], name: str) -> None:
    case = converted("calibrated")
    case.change(name, noise)
    with pytest.raises(llamamoe.VerificationError, match=rf"{name}|layer 1"):
        llamamoe.verify(case.out, case.dense)


def test_neurons_that_change_places_between_experts_are_seen(converted: Callable[[str], Converted]) -> None:
    """Every neuron is still there once and the logits of all experts are the same: only the hash tells."""
    case = converted("mixtral")
    prefix = "model.layers.1.block_sparse_moe.experts."
    file = case.out / "model.safetensors"
    tensors = load_file(file)
    for part in ("w1", "w2", "w3"):
        one, two = f"{prefix}0.{part}.weight", f"{prefix}1.{part}.weight"
        tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(llamamoe.VerificationError, match=r"layer 1.*SHA-256"):
        llamamoe.verify(case.out, case.dense)
    (case.out / RECEIPT).unlink()
    assert f"{RECEIPT} is missing" in llamamoe.verify(case.out, case.dense).unproven


# ---- receipts ---------------------------------------------------------------------------------------------------


def test_an_old_receipt_still_proves_the_weights_as_a_whole(converted: Callable[[str], Converted]) -> None:
    case = converted("calibrated")
    case.change_receipt(unit_sha256=None)
    found = llamamoe.verify(case.out, case.dense)
    assert (found.unproven, found.hashed_checked) == ("", len(case.plan.tensors))
    case.change("model.layers.1.mlp.experts.0.down_proj.weight", noise)
    with pytest.raises(llamamoe.VerificationError, match=r"not those that were written.*SHA-256"):
        llamamoe.verify(case.out, case.dense)


def test_a_broken_receipt_is_one_error(converted: Callable[[str], Converted]) -> None:
    case = converted("mixtral")
    (case.out / RECEIPT).write_text("{")
    with pytest.raises(llamamoe.VerificationError, match=f"{RECEIPT} is not valid JSON"):
        llamamoe.verify(case.out, case.dense)


def test_bits_are_compared_not_values() -> None:
    nan = torch.tensor([[float("nan"), 1.0]])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(1, 2), -torch.zeros(1, 2))
    assert same_bits(torch.tensor([[1.5]]), torch.tensor([[1.5]], dtype=torch.bfloat16))
    assert not same_bits(torch.zeros(2, 1), torch.zeros(1, 2))


# ---- files and configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_another_file_that_transformers_may_load_is_seen(converted: Callable[[str], Converted], name: str) -> None:
    case = converted("mixtral")
    (case.out / name).write_bytes(b"{}")
    with pytest.raises(llamamoe.VerificationError, match=f"also holds {name}"):
        llamamoe.verify(case.out, case.dense)


def test_an_adapter_beside_an_output_is_refused(converted: Callable[[str], Converted]) -> None:
    case = converted("mixtral")
    (case.out / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(llamamoe.CheckpointError, match="PEFT adapter"):
        llamamoe.verify(case.out, case.dense)


@pytest.mark.parametrize(("key", "value"), [("sliding_window", 4), ("hidden_act", "gelu")])
def test_a_configuration_key_that_changes_the_function_is_seen(
    converted: Callable[[str], Converted], key: str, value: object
) -> None:
    case = converted("mixtral")
    path = case.out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(llamamoe.VerificationError, match=key):
        llamamoe.verify(case.out, case.dense)
    case.restore()
    path.write_text(json.dumps({**json.loads(path.read_text()), "my_note": 1}))
    assert llamamoe.verify(case.out, case.dense).passed, "a key without effect is allowed"


@pytest.mark.parametrize(("mark", "verb"), [("llamamoe_heal.yaml", "heal"), ("llamamoe_derived.json", "merge")])
def test_what_another_command_wrote_is_refused_by_its_name(
    converted: Callable[[str], Converted], mark: str, verb: str
) -> None:
    case = converted("mixtral")
    (case.out / mark).write_text(json.dumps({"made_by": verb}))
    with pytest.raises(llamamoe.RefusedError, match=f"written by `llamamoe {verb}"):
        llamamoe.verify(case.out, case.dense)
