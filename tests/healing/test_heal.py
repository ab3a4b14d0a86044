"""Healing: what it writes is native, what it reports is true, what it does not touch is as it was, and bad input is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe.architectures.targets import TARGETS
from llamamoe.calibration.reading import document_hash
from llamamoe.calibration.text import calibration_text
from llamamoe.checkpoint.receipts import documents_fitted_to
from llamamoe.conversion.advice import UNTRAINED
from llamamoe.healing.block import load_ffn
from llamamoe.healing.heal import heal
from llamamoe.healing.output import check_place
from llamamoe.healing.plan import FROZEN, plan_heal
from llamamoe.healing.recipe import HealRecipe, load_heal_recipe
from llamamoe.healing.train_layer import _Joint
from tests.dense import FFN_TARGETS, make_dense, variant_for
from tests.healing.common import convert, heal_recipe, receipt

FFN = (".mlp.", ".block_sparse_moe.", ".shared_mlp.")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def healed(model: Path, dense: Path, text: Path) -> Path:
    return heal(model, dense.parent / "healed", heal_recipe(text), parent=dense).out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load(folder: Path) -> Any:
    found, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found.eval()


def plain_errors(moe: Path, dense: Path, text: Path, recipe: HealRecipe, modules: tuple[str, ...]) -> list[float]:
    """Weighted error of each layer on the held-out tokens: whole models in transformers, hooks, and sums written out."""
    parent, child = load(dense), load(moe)
    words = calibration_text(
        [text], AutoTokenizer.from_pretrained(dense), num_tokens=recipe.tokens, length=recipe.length or 32, weights=None,
        seed=recipe.seed, vocab_size=parent.config.vocab_size,
    )  # fmt: skip
    scale = (
        (child.config.rms_norm_eps / parent.config.rms_norm_eps) ** 0.5 if child.config.model_type == "jetmoe" else 1
    )
    ids = torch.from_numpy(words.ids_ST)
    first_held_out = len(ids) - round(len(ids) * recipe.held_out)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    left: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(parent.model.layers):
        layer.mlp.register_forward_hook(lambda _, args, out, i=i: seen.__setitem__(i, (args[0], out)))
        normed = layer.mlp if hasattr(layer, "post_feedforward_layernorm") else layer  # what the next norm reads
        normed.register_forward_hook(lambda _, args, out, i=i: left.__setitem__(i, out))
    with torch.no_grad():
        parent(input_ids=ids)
        errors = []
        for i, layer in enumerate(child.model.layers):
            x, y = seen[i]
            out = sum(getattr(layer, m)(x) for m in modules if getattr(layer, m, None) is not None) / scale
            if "cohere" in type(parent).__name__.lower():  # LayerNorms subtract the mean
                left[i] = left[i] - left[i].mean(-1, keepdim=True)
            weight = 1 / left[i].square().mean(-1, keepdim=True).sqrt()  # its common factor cancels
            missed = ((y - out) * weight)[first_held_out:].double().square().sum()
            whole = (y * weight)[first_held_out:].double().square().sum()
            errors.append(float((missed / whole).sqrt()))
    return errors


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FFN_TARGETS, "jetmoe"])
def test_every_architecture(tmp_path: Path, text: Path, name: str) -> None:
    variant = {
        "qwen3_moe": "qwen3",
        "granitemoeshared": "granite",
        "flex_olmo": "olmo2",
        "cohere2_moe": "cohere2",
        "qwen3_5_moe_text": "qwen3_5_text",
        "hunyuan_v1_moe": "hunyuan_v1_dense",
    }.get(name, "llama")
    heads = {"num_attention_heads": 8} if name == "jetmoe" else {}  # 4 experts for each of 2 key/value heads
    dense = make_dense(tmp_path / "dense", variant, **heads)
    shared = {} if TARGETS.get(name).shared == "none" else {"shared": "1x"}
    moe = convert(dense, tmp_path / "moe", target=name, **shared)
    recipe = heal_recipe(text, epochs=6)
    result = heal(moe, tmp_path / "out", recipe, parent=dense)
    assert not any("differ from the parent's" in warning for warning in result.warnings)
    told = result.receipt["layers"]
    modules = TARGETS.get(name).ffn_modules
    assert [layer["error_before"] for layer in told] == pytest.approx(
        plain_errors(moe, dense, text, recipe, modules), rel=1e-4
    )
    assert all(layer["kept"] and layer["error_after"] < layer["error_before"] for layer in told)
    assert [layer["error_after"] for layer in told] == pytest.approx(
        plain_errors(result.out, dense, text, recipe, modules), rel=1e-4
    )
    before, after = tensors(moe), tensors(result.out)
    assert before.keys() == after.keys()
    for key, value in after.items():
        same = value.equal(before[key])
        left_alone = not any(part in key for part in FFN) or any(part in key for part in FROZEN)
        assert same == left_alone, key
    config = json.loads((result.out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["llamamoe"]["healed"][0]["tokens"] == result.receipt["tokens"]["trained"]


@pytest.mark.parametrize("name", FFN_TARGETS)
def test_what_is_built_is_written_back_bit_for_bit(tmp_path: Path, text: Path, name: str) -> None:
    dense = make_dense(tmp_path / "dense", variant_for(name), dtype=torch.bfloat16)
    moe = convert(dense, tmp_path / "moe", target=name)
    plan = plan_heal(moe, dense, heal_recipe(text))
    names = {n: plan.checkpoint.read(n).dtype for n in plan.trained_names(1)}
    for key, value in load_ffn(plan, 1, plan.checkpoint.read).stored(names).items():
        assert value.dtype == names[key]
        assert value.equal(plan.checkpoint.read(key)), key


def test_zero_neurons_stay_zero(model: Path, healed: Path) -> None:
    before, after = tensors(model), tensors(healed)
    rows = [(n, v.abs().sum(1) == 0) for n, v in before.items() if n.endswith(".w1.weight")]
    assert any(bool(zero.any()) for _, zero in rows), "43 neurons in 48 places"
    for name, zero in rows:
        assert (after[name].abs().sum(1) == 0).equal(zero)


def test_hard_softmax_routers_are_renormalised_and_a_layer_that_is_left_computes_the_same(
    tmp_path: Path, dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = convert(dense, tmp_path / "moe", target="qwen2_moe", rescale="unit", num_experts=3)
    assert json.loads((moe / "config.json").read_text())["norm_topk_prob"] is False

    def ruin(ffn: Any, task: Any) -> None:
        ffn.moe.experts.down_proj.data.mul_(-3)

    monkeypatch.setattr("llamamoe.healing.layer.train_layer", ruin)
    result = heal(moe, tmp_path / "out", heal_recipe(text), parent=dense)
    assert result.receipt["renormalised"]
    assert any("sum to one" in warning for warning in result.warnings)
    assert all(not layer["kept"] and "left unchanged" in layer["note"] for layer in result.receipt["layers"])
    config = json.loads((result.out / "config.json").read_text())
    assert config["norm_topk_prob"] is True
    before, after = (json.loads((p / "config.json").read_text())["llamamoe"]["baked_factor"] for p in (moe, result.out))
    assert after == pytest.approx(before * 2 / 3)  # k of N
    with torch.no_grad():
        want, have = (load(folder)(input_ids=torch.arange(3, 35)[None]).logits for folder in (moe, result.out))
    assert float((want - have).abs().max()) < 1e-3 * float(want.abs().max())
    assert "| unchanged |" in (result.out / "README.md").read_text()


def test_soft_routers_that_do_not_renormalise_are_trained_as_they_are(dense: Path, text: Path, tmp_path: Path) -> None:
    """Scaling them would change the size of the routed sum, and their logits distinguish tokens already."""
    moe = convert(dense, tmp_path / "moe", target="qwen2_moe", rescale="unit", router_scale="soft")
    result = heal(moe, tmp_path / "out", heal_recipe(text), parent=dense)
    assert json.loads((result.out / "config.json").read_text())["norm_topk_prob"] is False
    assert not result.receipt["renormalised"]
    for layer in result.receipt["layers"]:
        assert "router_factor" not in layer
        assert layer["kept"]
        name = f"model.layers.{layer['layer']}.mlp.gate.weight"
        assert not tensors(result.out)[name].equal(tensors(moe)[name])


def test_the_card_names_files_that_are_there_and_nothing_that_healing_ended(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    moe = convert(dense, tmp_path / "moe", target="mixtral")
    assert UNTRAINED in (moe / "README.md").read_text()
    out = heal(moe, tmp_path / "out", heal_recipe(text), parent=dense).out
    card = (out / "README.md").read_text()
    named = set(re.findall(r"llamamoe_\w+\.\w+", card))
    assert named == {"llamamoe_heal.yaml"}
    assert all((out / name).is_file() for name in named)
    assert "num_experts: 4" in card, "the recipe of the conversion stands in it"
    assert "until the model is trained" not in card
    assert not re.search(r"## Good to know\s+(##|$)", card)


def test_a_layer_that_got_worse_keeps_its_bytes(
    tmp_path: Path, model: Path, dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llamamoe.healing.layer.train_layer", lambda ffn, task: ffn.moe.experts.down_proj.data.mul_(float("nan"))
    )
    result = heal(model, tmp_path / "out", heal_recipe(text), parent=dense)
    assert [layer["kept"] for layer in result.receipt["layers"]] == [False, False]
    assert result.receipt["layers"][0]["error_after"] is None
    assert result.receipt["error"]["before"] == result.receipt["error"]["after"]
    for name, value in tensors(result.out).items():
        assert value.equal(tensors(model)[name])
    blocks = [json.loads((path / "config.json").read_text())["llamamoe"] for path in (model, result.out)]
    assert blocks[0].get("router_scale") == blocks[1].get("router_scale")


def test_frozen_routers_keep_their_bytes_and_trained_ones_do_not(
    tmp_path: Path, model: Path, dense: Path, text: Path, healed: Path
) -> None:
    out = heal(model, tmp_path / "out", heal_recipe(text, router="frozen"), parent=dense).out
    routers = [name for name in tensors(model) if name.endswith("block_sparse_moe.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        assert tensors(out)[name].equal(tensors(model)[name])
        assert not tensors(healed)[name].equal(tensors(model)[name])
    for layer in receipt(healed)["layers"]:
        assert layer["router_std_before"] * layer["router_factor"] == pytest.approx(heal_recipe(text).router_std)


def test_auto_freezes_routers_that_were_fitted_on_text(model: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    auto = heal_recipe(text, router="auto")
    assert plan_heal(model, dense, auto).recipe.router == "trained", "random rows have all to learn"
    fitted = Path(shutil.copytree(model, tmp_path / "fitted"))
    config = json.loads((fitted / "config.json").read_text())
    config["llamamoe"]["router"] = "ridge"
    (fitted / "config.json").write_text(json.dumps(config))
    assert plan_heal(fitted, dense, auto).recipe.router == "frozen"
    assert plan_heal(fitted, dense, heal_recipe(text, router="auto", losses={"switch": 0.1})).recipe.router == "trained"
    config["llamamoe"]["router_scale"] = "soft"
    (fitted / "config.json").write_text(json.dumps(config))
    assert plan_heal(fitted, dense, auto).recipe.router == "trained"


def test_a_layer_that_is_dense_is_copied_and_one_sees_the_errors_of_another(
    tmp_path: Path, text: Path, dense: Path
) -> None:
    moe = convert(dense, tmp_path / "moe", target="qwen2_moe", keep_dense=(0,))
    (moe / "llamamoe_receipt.json").write_text('{"calibration": {"document_hashes": ["a"]}}')
    result = heal(moe, tmp_path / "out", heal_recipe(text), parent=dense)
    assert [layer["layer"] for layer in result.receipt["layers"]] == [1]
    assert receipt(result.out)["document_hashes"] == ["a"], "what the conversion was fitted to"
    assert documents_fitted_to(result.out) == sorted(["a", document_hash(text.read_text())]), "and what healing was"
    for name, value in tensors(result.out).items():
        assert value.equal(tensors(moe)[name]) or ".layers.1.mlp." in name

    moe = convert(dense, tmp_path / "all", target="qwen2_moe")
    alone = heal(moe, tmp_path / "alone", heal_recipe(text), parent=dense).receipt["layers"]
    after = heal(moe, tmp_path / "after", heal_recipe(text, inputs="model"), parent=dense).receipt["layers"]
    assert alone[0] == after[0]
    assert alone[1]["error_before"] != after[1]["error_before"]


def test_a_healed_checkpoint_can_be_healed_again_and_replaced(
    tmp_path: Path, healed: Path, dense: Path, text: Path
) -> None:
    again = heal(healed, tmp_path / "again", heal_recipe(text, seed=1), parent=dense)
    config = json.loads((again.out / "config.json").read_text())
    assert [each["tokens"] for each in config["llamamoe"]["healed"]] == [768, 768]
    with pytest.raises(llamamoe.RefusedError, match="not empty"):
        heal(healed, again.out, heal_recipe(text), parent=dense)
    heal(healed, again.out, heal_recipe(text, seed=2), parent=dense, force=True)
    assert receipt(again.out)["plan"]["recipe"]["seed"] == 2
    (again.out / "notes.txt").write_text("mine")
    with pytest.raises(llamamoe.RefusedError):
        heal(healed, again.out, heal_recipe(text), parent=dense, force=True)
    assert (again.out / "notes.txt").read_text() == "mine"


def test_where_hidden_states_lie_and_what_products_compute_in(
    tmp_path: Path, model: Path, dense: Path, text: Path, healed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = heal(model, tmp_path / "half", heal_recipe(text, compute_dtype="bfloat16"), parent=dense).receipt
    assert half["computed"]["compute_dtype"] == "bfloat16"
    assert half["error"]["after"] == pytest.approx(receipt(healed)["error"]["after"], rel=0.02)
    monkeypatch.setattr("llamamoe.healing.plan.MEMORY_BYTES", 0)
    result = heal(model, tmp_path / "mapped", heal_recipe(text), parent=dense)
    assert result.plan.states_in_files
    assert result.receipt["weights_sha256"] == receipt(healed)["weights_sha256"]
    assert sorted(p.name for p in result.out.iterdir()) == sorted(p.name for p in healed.iterdir())


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_every_process_needs_room_for_its_states(
    tmp_path: Path, model: Path, dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamamoe.healing.plan.MEMORY_BYTES", 0)
    plan = plan_heal(model, dense, heal_recipe(text))
    room = plan.nbytes + 64 * 2**20 + 2 * plan.state_bytes
    monkeypatch.setattr("llamamoe.checkpoint.out_folder.free_bytes", lambda *args, **keys: room)
    check_place(tmp_path / "out", plan, resume=False, force=False)
    with pytest.raises(llamamoe.RefusedError, match=r"GB free(?s:.*)fewer --tokens(?s:.*)fewer processes"):
        check_place(tmp_path / "out", plan, resume=False, force=False, processes=2)
    room += 2 * plan.state_bytes + plan.nbytes // 2
    check_place(tmp_path / "out", plan, resume=False, force=False, processes=2)


def test_every_error_of_a_recipe_at_once() -> None:
    with pytest.raises(llamamoe.UsageError) as error:
        load_heal_recipe(given={"text": ["t"], "epoch": 3, "lr": 2, "losses": {"swich": 1}})
    for part in ("epoch: unknown key. Did you mean 'epochs'", "lr:", "unknown loss 'swich'", "'switch'"):
        assert part in str(error.value)
    with pytest.raises(llamamoe.UsageError, match="router is frozen"):
        load_heal_recipe(given={"text": ["t"], "router": "frozen", "losses": {"z": 0.1}})
    recipe = load_heal_recipe(given={"text": "t"}, overrides=["losses={switch: 0.5}"])
    assert recipe.losses == {"switch": 0.5}
    assert HealRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_checkpoints_that_do_not_belong_together(tmp_path: Path, model: Path, dense: Path, text: Path) -> None:
    other = make_dense(tmp_path / "other", hidden_size=32, vocab_size=120, head_dim=16)
    with pytest.raises(llamamoe.RefusedError, match=r"hidden_size is 64 and 32.*vocab_size is 128 and 120"):
        plan_heal(model, other, heal_recipe(text))
    with pytest.raises(llamamoe.CheckpointError, match="not a mixture of experts"):
        plan_heal(dense, dense, heal_recipe(text))
    with pytest.raises(llamamoe.CheckpointError, match="mixture"):
        plan_heal(model, model, heal_recipe(text))
    with pytest.raises(llamamoe.UsageError, match="nowhere"):
        plan_heal(model, dense, heal_recipe(text.parent / "nowhere.txt"))
    with pytest.raises(llamamoe.UsageError, match="64 positions"):
        plan_heal(model, dense, heal_recipe(text, length=128))
    with pytest.raises(llamamoe.RefusedError, match=r"and MODEL \(.*must not contain each other"):
        heal(model, model / "out", heal_recipe(text), parent=dense)


def test_what_a_run_left_at_its_very_end_is_recognised_by_a_plan_that_writes_nothing(
    tmp_path: Path, model: Path, healed: Path, dense: Path, text: Path
) -> None:
    left = Path(shutil.copytree(healed, tmp_path / "out.partial"))
    plan, before = plan_heal(model, dense, heal_recipe(text)), sorted(left.iterdir())
    with pytest.raises(llamamoe.RefusedError, match="left from a run that was stopped"):
        check_place(tmp_path / "out", plan, resume=False, force=False)
    check_place(tmp_path / "out", plan, resume=True, force=False)
    assert sorted(left.iterdir()) == before
    heal(model, tmp_path / "out", heal_recipe(text), parent=dense, resume=True)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]


def test_another_parent_of_the_same_sizes_is_warned_of(tmp_path: Path, model: Path, text: Path) -> None:
    other = make_dense(tmp_path / "other", seed=1)
    result = heal(model, tmp_path / "out", heal_recipe(text, epochs=1), parent=other)
    assert any("differ from the parent's" in warning for warning in result.warnings)


def test_a_step_that_is_too_large_is_an_error_that_names_the_layer(
    tmp_path: Path, model: Path, dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _Joint.__call__
    monkeypatch.setattr(_Joint, "__call__", lambda self, rows: real(self, rows) * float("nan"))
    with pytest.raises(llamamoe.LlamaMoeError, match=r"layer 0: the error is no longer finite at step 0"):
        heal(model, tmp_path / "out", heal_recipe(text), parent=dense)
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_all_experts_of_competitive_epochs(dense: Path, text: Path, tmp_path: Path) -> None:
    moe = convert(dense, tmp_path / "moe", target="mixtral", num_experts=4, top_k=1)
    planned, counted = [], []
    for epochs in (1, 2):
        recipe = heal_recipe(text, competitive_epochs=epochs, epochs=1, tokens=1024)
        planned.append(plan_heal(moe, dense, recipe).flops)
        with FlopCounterMode(display=False) as flops:
            heal(moe, tmp_path / f"out-{epochs}", recipe, parent=dense)
        counted.append(flops.get_total_flops())
    assert 0.6 < (counted[1] - counted[0]) / (planned[1] - planned[0]) < 1.2  # held-out text is planned, not trained on
