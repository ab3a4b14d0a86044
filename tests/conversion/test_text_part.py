"""The text model in a model of images and text: converted in its place, with all else byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

import llamamoe
from llamamoe.architectures.inspect import inspect
from llamamoe.checkpoint.text_part import CONVERTED, OF_SOUND, TextPart
from llamamoe.checkpoint.whole_pairs import PAIRS
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.transforms.llama_cpp import runs_planned
from tests import multimodal
from tests.dense import make_dense
from tests.training.runs import make_tokens

EVERYONE = {"num_experts": 4, "top_k": 4, "method": "random"}
CASES = {
    "idefics3": ("llama", "granitemoeshared"),
    "internvl": ("qwen2", "qwen2_moe"),
    "llava": ("llama-tied", "mixtral"),
    "llava_next": ("granite", "granitemoeshared"),
    "llava_onevision": ("qwen2-tied", "qwen2_moe"),
    "mistral3": ("mistral", "mixtral"),
    "qwen2_audio": ("qwen2", "qwen2_moe"),
    "voxtral": ("llama-head-dim", "mixtral"),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_moe_text"),
    "qwen3_vl": ("qwen3-tied", "qwen3_moe"),
    "smolvlm": ("smollm3", "granitemoe_swa"),
    "vipllava": ("qwen3-tied", "qwen3_moe"),
}
"""The text model in each, and what it becomes."""


def convert(source: Path, out: Path, **keys: Any) -> llamamoe.SplitResult:
    return llamamoe.split(source, out, llamamoe.load_recipe(given=EVERYONE | keys))


def load(folder: Path) -> Any:
    model, info = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multimodal.make_multimodal(tmp_path_factory.mktemp("llava") / "parent")


def test_every_class_has_a_case() -> None:
    assert CASES.keys() == set(CONVERTED) == multimodal.WRAPPERS.keys()


@pytest.mark.parametrize("wrapper", CASES)
@torch.no_grad()
def test_image_and_text_give_the_parents_logits_and_tokens(wrapper: str, tmp_path: Path) -> None:
    variant, target = CASES[wrapper]
    source = multimodal.make_multimodal(tmp_path / "parent", wrapper, variant)
    convert(source, tmp_path / "out", target=target)
    parent, child, given = load(source), load(tmp_path / "out"), multimodal.inputs(wrapper)
    for name, parameter in child.named_parameters():
        if name.endswith((".mlp.gate.weight", ".router.weight", ".router.layer.weight")):
            parameter.zero_()  # equal weights, for which the conversion is exact
    want = parent(**given).logits
    other = multimodal.other_input(wrapper)
    seen = parent(**given | {other: 30 * given[other] + 1}).logits
    assert (seen - want).abs().max() > 1e-3  # the image (or sound) matters
    torch.testing.assert_close(child(**given).logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert ("audio-text-to-text" in (tmp_path / "out" / "README.md").read_text()) == (wrapper in OF_SOUND)
    if wrapper != "llava":
        return
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(child.generate(**given, **greedy), parent.generate(**given, **greedy))
    text = [module for name, module in child.named_modules() if name in ("model.language_model", "model.text_model")]
    assert [module.config.model_type for module in text] == [target]


def test_all_other_tensors_and_files_are_copied(llava: Path, tmp_path: Path) -> None:
    result = convert(llava, tmp_path / "out", dtype="bfloat16", shard_size="40KB")
    parent, child = weights(llava), weights(tmp_path / "out")
    rest = {name for name in parent if not name.startswith("language_model.")}
    assert rest == {name for name in child if not name.startswith("language_model.")}
    for name in rest:
        assert child[name].dtype == torch.float32
        assert torch.equal(child[name], parent[name])
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llava / name).read_bytes()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert f"all else, {len(rest)} tensors (" in result.plan.advice[0]
    assert f"all else, {len(rest)} tensors (" in (tmp_path / "out" / "README.md").read_text()


def test_verify_and_inspect_read_the_result_and_find_a_change(llava: Path, tmp_path: Path) -> None:
    convert(llava, tmp_path / "out")
    assert llamamoe.verify(tmp_path / "out", llava).passed
    found = inspect(tmp_path / "out")
    assert (found.kind, found.model_type, found.target) == ("moe", "llava", "mixtral")
    assert found.experts is not None
    assert found.experts.num_experts == 4
    file = tmp_path / "out" / "model.safetensors"
    changed = load_file(file)
    changed["multi_modal_projector.linear_1.bias"] += 1
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(llamamoe.VerificationError, match=r"multi_modal_projector.linear_1.bias is not the parent's"):
        llamamoe.verify(tmp_path / "out", llava)


def test_names_in_memory_are_kept_and_calibration_reads_the_text_model(tmp_path: Path) -> None:
    source = multimodal.make_multimodal(tmp_path / "parent", save_original_format=False)
    (tmp_path / "text.txt").write_text("A mixture of experts keeps many small networks. " * 40)
    keys = {"method": "token_clusters", "calibration": [str(tmp_path / "text.txt")], "calibration_tokens": 1024}
    convert(source, tmp_path / "out", **keys, top_k=2, repair="least_squares", calibration_length=32)
    assert "model.language_model.embed_tokens.weight" in weights(tmp_path / "out")
    load(tmp_path / "out")
    assert llamamoe.evaluate(tmp_path / "out", [tmp_path / "text.txt"], max_tokens=200).model.overall.loss > 0


@pytest.mark.parametrize("wrapper", PAIRS)
def test_the_class_around_the_text_model_changes_with_it(wrapper: str, tmp_path: Path) -> None:
    source = multimodal.make_multimodal(tmp_path / "parent", wrapper, CASES[wrapper][0])
    save_file(weights(source) | {"mtp.norm.weight": torch.ones(64)}, source / "model.safetensors", {"format": "pt"})
    result = convert(source, tmp_path / "out", top_k=2)
    parent, config = (json.loads((path / "config.json").read_text()) for path in (source, result.out))
    assert (config["model_type"], config["text_config"]["model_type"]) == (f"{wrapper}_moe", f"{wrapper}_moe_text")
    assert config["architectures"] == [type(load(result.out)).__name__]
    assert config["vision_config"] == parent["vision_config"] | {"model_type": f"{wrapper}_moe_vision"}
    before, after = weights(source), weights(result.out)
    visual = [name for name in before if name.startswith("model.visual.")]
    assert visual == [name for name in after if name.startswith("model.visual.")]
    assert all(torch.equal(before[name], after[name]) for name in visual)
    assert "mtp.norm.weight" not in after
    assert "left out: 1 tensor for the prediction of further tokens (mtp.*)" in result.plan.advice[0]
    assert llamamoe.verify(result.out, source).passed
    found = inspect(result.out)
    assert (found.kind, found.model_type, found.refusal) == ("moe", f"{wrapper}_moe", None)
    with pytest.raises(llamamoe.LlamaMoeError) as refused:
        llamamoe.export_gguf(result.out, tmp_path / "out.gguf")
    assert "split, verify, inspect, evaluate, report and bench" in str(refused.value.hint)


def test_experts_of_qwen3_vl_are_stored_as_in_its_own_files(tmp_path: Path) -> None:
    source = multimodal.make_multimodal(tmp_path / "parent", "qwen3_vl", "qwen3-tied")
    out = convert(source, tmp_path / "out", top_k=2, rescale="unit", keep_dense=[1]).out
    name = "layers.0.mlp.experts.gate_up_proj"
    stored = weights(out)[f"model.language_model.{name}"]
    assert stored.shape == (4, 64, 96)  # experts, hidden size, gates and ups
    assert torch.equal(TextPart(out).read(f"model.{name}"), stored.transpose(1, 2))
    config, parent = (json.loads((path / "config.json").read_text())["text_config"] for path in (out, source))
    assert config["rope_parameters"] == parent["rope_parameters"]
    layers = find_moe_layers(load(out))
    assert [(each.layer, each.weighting) for each in layers] == [(0, "renormalised")]  # always, so k is baked
    found = inspect(out).experts
    assert found is not None
    assert (found.num_experts, found.expert_width, found.dense_layers) == (4, 48, (1,))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target": "glm4_moe"}, r"glm4_moe is not the text model that the class of qwen3_vl_moe builds \(qwen3_moe\)"),
        ({"num_experts": 6, "top_k": 2}, "experts of 32 neurons have square matrices beside a hidden size of 64"),
    ],
)
def test_what_the_class_around_cannot_hold_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = multimodal.make_multimodal(tmp_path / "parent", "qwen3_vl", "qwen3-tied")
    with pytest.raises(llamamoe.RefusedError, match=said):
        llamamoe.plan_conversion(source, llamamoe.load_recipe(given=EVERYONE | {"shared": 0} | keys))


def test_static_pruning_keeps_the_class_around_the_text_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A mixture of experts keeps many small networks. " * 40)
    source = multimodal.make_multimodal(tmp_path / "parent", "qwen3_5", "qwen3_5_text")
    given = {"method": "static", "shared": 0.5, "calibration": [str(tmp_path / "text.txt")]}
    config = llamamoe.plan_conversion(source, llamamoe.load_recipe(given=given)).config
    assert (config["model_type"], config["architectures"]) == ("qwen3_5", ["Qwen3_5ForConditionalGeneration"])
    assert config["text_config"]["model_type"] == "qwen3_5_text"


def test_another_way_of_saving_the_head_twice_is_refused(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "copy")
    tensors = weights(llava)
    save_file(
        tensors | {"lm_head.weight": tensors["language_model.lm_head.weight"].clone()},
        tmp_path / "copy/model.safetensors",
    )
    with pytest.raises(llamamoe.CheckpointError, match="stored twice"):
        llamamoe.plan_conversion(tmp_path / "copy")


@pytest.mark.parametrize(
    ("variant", "target", "said"),
    [
        ("gemma", "mixtral", "not those of images"),
        ("granite", "mixtral", "would not reach images"),
        ("olmo2", "mixtral", "norms after"),
    ],
)
def test_text_models_that_no_target_holds_are_refused(variant: str, target: str, said: str, tmp_path: Path) -> None:
    source = multimodal.make_multimodal(tmp_path / "parent", "llava", variant)
    with pytest.raises(llamamoe.LlamaMoeError, match=said):
        llamamoe.plan_conversion(source, llamamoe.load_recipe(given=EVERYONE | {"target": target}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"auto_map": {"AutoConfig": "x.X"}}, "its own code"),
        ({"model_type": "qwen2_5_vl"}, "builds this one text model"),
        ({"model_type": "aria"}, "split converts the text model inside idefics3"),
        ({"text_config": {}}, "model_type None is not a dense family"),
    ],
)
def test_what_concerns_the_whole_is_refused(keys: dict[str, Any], said: str, llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "copy")
    config = json.loads((llava / "config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | keys))
    with pytest.raises(llamamoe.CheckpointError, match=said):
        llamamoe.plan_conversion(tmp_path / "copy", llamamoe.load_recipe(given=EVERYONE))


def test_other_commands_refuse_and_name_those_that_do_not(llava: Path, tmp_path: Path) -> None:
    plan = convert(llava, tmp_path / "out").plan
    assert not runs_planned(plan)
    assert not any("llama.cpp keeps" in note for note in plan.advice)
    dense, out, back = make_dense(tmp_path / "dense"), tmp_path / "out", tmp_path / "back"
    tokens = make_tokens(tmp_path / "tokens", dense, 0)
    healing = llamamoe.load_heal_recipe(given={"text": [str(tmp_path / "tokens" / "text")]})

    def pretrain(model: Path) -> None:
        given = {"model": str(model), "data": {"train": str(tokens), "block_length": 32}, "steps": 1}
        llamamoe.pretrain(llamamoe.load_pretrain_recipe(given=given), back)

    for call in (
        lambda: llamamoe.densify(out, back),
        lambda: llamamoe.retop(out, back, 1),
        lambda: llamamoe.resplit(out, back, 2),
        lambda: llamamoe.merge([out, out], back),
        lambda: llamamoe.mix(llava, back, llamamoe.load_mix_recipe(given={"experts": [str(llava), str(dense)]})),
        lambda: llamamoe.heal(out, back, healing, parent=llava),
        lambda: pretrain(llava),
        lambda: pretrain(out),
        lambda: llamamoe.export_gguf(llava, tmp_path / "back.gguf"),
        lambda: llamamoe.export_gguf(out, tmp_path / "back.gguf"),
    ):
        with pytest.raises(llamamoe.LlamaMoeError) as refused:
            call()
        assert "split, verify, inspect, evaluate, report and bench" in str(refused.value.hint)
    assert not list(tmp_path.glob("back*"))
