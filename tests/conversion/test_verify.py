"""Verification finds what is wrong, and only that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.conversion.verify_files import neuron_keys
from llamamoe.conversion.verify_runs import RECEIPT_TEXT, receipt_tokens
from llamamoe.models.streaming import StreamedModel
from tests.dense import VARIANTS, make_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("verification") / "dense", "llama-tied")


@pytest.fixture(scope="module")
def converted(dense: Path) -> Path:
    recipe = llamamoe.load_recipe(
        given={"method": "random", "num_experts": 4, "top_k": 2, "shared": "1x", "target": "qwen2_moe"}
    )
    return llamamoe.split(dense, dense.with_name("converted"), recipe, verify=False).out


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def change(folder: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a written checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = how(tensors[name]).contiguous()
    save_file(tensors, file, {"format": "pt"})


def test_an_untouched_conversion_passes(converted: Path, dense: Path) -> None:
    steps = []
    found = llamamoe.verify(converted, dense, progress=steps.append)
    assert found.passed
    assert found.equal_weights is not None
    assert found.equal_weights <= 1e-5
    assert found.neurons_checked == 2
    assert [layer for layer, _ in found.layer_error] == [0, 1]
    assert {step.stage for step in steps} >= {"check neurons", "run parent", "run as stored"}
    json.dumps(found.to_json(), allow_nan=False)


EXPERT = "model.layers.1.mlp.experts.2.{}_proj.weight"


def _nudge(tensor: torch.Tensor) -> torch.Tensor:
    """The smallest change there is: one value by one unit in the last place."""
    tensor = tensor.clone()
    tensor[0, 0] = torch.nextafter(tensor[0, 0], torch.tensor(float("inf")))
    return tensor


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_one_bit_of_one_neuron_is_seen(copy: Path, dense: Path, part: str) -> None:
    change(copy, EXPERT.format(part), _nudge)
    with pytest.raises(llamamoe.VerificationError, match=r"layer 1: .*bit for bit") as error:
        llamamoe.verify(copy, dense)
    assert error.value.exit_code == 4


def test_a_neuron_twice_is_seen(copy: Path, dense: Path) -> None:
    for part in ("gate", "up"):
        change(copy, EXPERT.format(part), lambda t: torch.cat([t[:1], t[:1], t[2:]]))
    with pytest.raises(llamamoe.VerificationError, match="layer 1"):
        llamamoe.verify(copy, dense)


def test_down_columns_that_belong_to_other_neurons_are_seen(copy: Path, dense: Path) -> None:
    change(copy, EXPERT.format("down"), lambda t: torch.cat([t[:, 1:2], t[:, :1], t[:, 2:]], dim=1))
    with pytest.raises(llamamoe.VerificationError, match="layer 1"):
        llamamoe.verify(copy, dense)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
@pytest.mark.parametrize("receipt", [True, False])
def test_a_changed_weight_outside_the_experts_is_named(copy: Path, dense: Path, name: str, receipt: bool) -> None:
    change(copy, name, lambda t: t * 1.01)
    if not receipt:
        (copy / "llamamoe_receipt.json").unlink()
    with pytest.raises(llamamoe.VerificationError, match=f"{name} is not the parent's, bit for bit"):
        llamamoe.verify(copy, dense)


def test_a_router_that_is_not_hard_is_seen(copy: Path, dense: Path) -> None:
    change(copy, "model.layers.0.mlp.gate.weight", lambda t: t * 1e4)
    with pytest.raises(llamamoe.VerificationError, match="router of layer 0"):
        llamamoe.verify(copy, dense)
    (copy / "llamamoe_receipt.json").unlink()
    with pytest.raises(llamamoe.VerificationError, match="as stored"):
        llamamoe.verify(copy, dense)


def test_an_open_shared_gate_is_seen(copy: Path, dense: Path) -> None:
    change(copy, "model.layers.0.mlp.shared_expert_gate.weight", lambda t: t + 1)
    with pytest.raises(llamamoe.VerificationError):
        llamamoe.verify(copy, dense)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 1.0), ("num_experts_per_tok", 3), ("norm_topk_prob", False), ("tie_word_embeddings", True)],
)
def test_a_changed_configuration_is_seen(copy: Path, dense: Path, key: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(llamamoe.VerificationError, match=key):
        llamamoe.verify(copy, dense)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_conversion_that_would_be_quantised_on_loading_is_refused_by_all_that_read_it(
    copy: Path, dense: Path, key: str
) -> None:
    from llamamoe.training.model import check_folder

    config = json.loads((copy / "config.json").read_text())
    config[key] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(llamamoe.CheckpointError, match="quantised"):
        llamamoe.verify(copy, dense)
    with pytest.raises(llamamoe.CheckpointError, match="quantised"):
        check_folder(copy)
    with pytest.raises(llamamoe.CheckpointError, match="quantised"):
        llamamoe.plan_heal(copy, dense, llamamoe.HealRecipe(text=(str(Path(__file__)),)))


def test_a_missing_tensor_is_named(copy: Path, dense: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(llamamoe.VerificationError, match=r"model\.layers\.1\.mlp\.gate\.weight"):
        llamamoe.verify(copy, dense)


def test_a_tensor_of_another_shape_is_described_in_words(copy: Path, dense: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    rows, hidden = tensors[name].shape
    tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(llamamoe.VerificationError) as error:
        llamamoe.verify(copy, dense)
    assert (
        f"implies F32 of shape [{rows}, {hidden}], the file holds F32 of shape [{2 * rows}, {hidden}]."
        in error.value.message
    )


def test_another_parent_is_seen(copy: Path, dense: Path, tmp_path: Path) -> None:
    other = make_dense(tmp_path / "other", "llama-tied", seed=1)
    with pytest.raises(llamamoe.VerificationError):
        llamamoe.verify(copy, other)


def test_a_folder_of_somebody_else_is_refused(dense: Path) -> None:
    with pytest.raises(llamamoe.RefusedError, match=r"no llamamoe_recipe\.yaml"):
        llamamoe.verify(dense, dense)


def test_a_conversion_that_fails_verification_does_not_appear(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamamoe.conversion.verify.EQUAL_TOLERANCE", 0.0)
    with pytest.raises(llamamoe.VerificationError):
        llamamoe.split(dense, tmp_path / "out", llamamoe.load_recipe(given={"method": "random", "num_experts": 4}))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_equals_the_whole_model(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    """One layer at a time gives the logits of the model in one piece run in float32, bit for bit."""
    folder = make_dense(tmp_path / "dense", variant, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    streamed = StreamedModel(config, tensors, tensors.__getitem__).logits(ids)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert torch.equal(streamed, whole)


def test_layers_are_dropped_after_use(tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    seen: list[tuple[int, int]] = []
    modules: list[torch.nn.Module] = []

    def watch(index: int, module: torch.nn.Module) -> None:
        modules.append(module)
        loaded = sum(not next(m.parameters()).is_meta for m in modules)
        seen.append((index, loaded))

    StreamedModel(config, tensors, tensors.__getitem__).logits(torch.tensor([[1, 2, 3]]), after_layer=watch)
    assert seen == [(0, 1), (1, 1), (2, 1)]


def test_receipt_text_is_read_with_the_folders_tokenizer(converted: Path, tmp_path: Path) -> None:
    ids, origin = receipt_tokens(converted, 128)
    assert origin == "text"
    assert ids.shape == (1, 128)
    assert ids[0, :3].tolist() == [3 + ord(c) - 32 for c in RECEIPT_TEXT[:3]]
    again, origin = receipt_tokens(tmp_path, 128)
    assert origin == "random ids"
    assert torch.equal(again, receipt_tokens(tmp_path, 128)[0])


def test_neuron_keys_do_not_depend_on_order_and_see_every_matrix() -> None:
    gate, up, down = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0)).unbind()
    order = torch.randperm(50)
    keys = neuron_keys(gate, up, down)
    assert len(keys.unique()) == 50
    assert torch.equal(keys, neuron_keys(gate[order], up[order], down[order]))
    assert not torch.equal(keys, neuron_keys(up, gate, down))
    assert not torch.equal(keys, neuron_keys(gate, up, down[order]))
    zeros = torch.zeros(7, 16)
    padded = [torch.cat([m, zeros]) for m in (gate, up, down)]
    assert torch.equal(keys, neuron_keys(*padded))


@pytest.mark.parametrize(
    ("receipt", "words"),
    [
        ({"made_by": "mix"}, (r"by `llamamoe mix`, which .* no single parent", "`mix` compares each expert")),
        ({"made_by": "retop"}, ("by `llamamoe retop`", "Verify the conversion that it was made from")),
        ({"made_by": "resplit"}, ("by `llamamoe resplit`", "the mixture that it was made from")),
        ({}, (r"holds a llamamoe_derived\.json", "Verify the conversion")),
    ],
)
def test_a_model_that_split_did_not_write_names_its_command(
    receipt: dict[str, str], words: tuple[str, str], copy: Path, dense: Path
) -> None:
    (copy / "llamamoe_derived.json").write_text(json.dumps(receipt))
    with pytest.raises(llamamoe.RefusedError, match=words[0]) as refused:
        llamamoe.verify(copy, dense)
    assert words[1] in str(refused.value.hint)
