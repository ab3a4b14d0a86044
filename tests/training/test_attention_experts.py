"""Training a model whose attention is routed, too: both routers are seen, balanced and trained, and the result is native."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.training.losses import LOSSES, LossContext
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.parameters import freeze
from llamamoe.training.routing import RouterTap

from .runs import lines_of, make_world, recipe_of
from .tiny_moe import H, N, input_ids, tiny_moe

PARTS = ["attention", "ffn", "attention", "ffn"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """4 query heads for each of 2 key/value heads."""
    folder = tmp_path_factory.mktemp("jetmoe")
    return make_world(folder, target="jetmoe", dense={"num_attention_heads": 8, "num_key_value_heads": 2})


def test_decisions_are_read_from_the_order_of_the_experts_and_put_back() -> None:
    for moe in find_moe_layers(tiny_moe("jetmoe")):
        x_TH = torch.randn(30, H, generator=torch.Generator().manual_seed(0))
        output = moe.router(x_TH)
        logits_TN, weights_Tk, indices_Tk = moe.decisions(output)
        assert torch.equal(logits_TN.topk(2).indices, indices_Tk)
        assert torch.equal(logits_TN.topk(2).values.softmax(-1), weights_Tk)
        again = moe.decisions(moe.native_output((logits_TN, weights_Tk, indices_Tk)))
        assert all(torch.equal(*pair) for pair in zip(again, (logits_TN, weights_Tk, indices_Tk), strict=True))
        if moe.part == "ffn":
            gate_up, down, act = moe.expert_weights()
            width = down.shape[2]
            both_TNW = torch.einsum("th,nwh->tnw", x_TH, gate_up)
            h_TNW = act(both_TNW[..., :width]) * both_TNW[..., width:]
            weights_TN = torch.zeros(30, N).scatter(1, indices_Tk, weights_Tk)
            expected = torch.einsum("tnw,nhw,tn->th", h_TNW, down, weights_TN)
            torch.testing.assert_close(moe.routed_outputs(x_TH), expected, rtol=1e-4, atol=1e-4)


def test_a_balance_loss_sees_both_routers_of_every_layer() -> None:
    model = tiny_moe("jetmoe")
    layers = find_moe_layers(model)
    assert [moe.place for moe in layers] == [(0, "attention"), (0, "ffn"), (1, "attention"), (1, "ffn")]
    seen: list[torch.Tensor] = []
    for moe in layers:
        moe.router.layer.register_forward_hook(lambda _, __, out: seen.append(out))
    with RouterTap(layers).armed() as routings:
        model(input_ids=input_ids(), use_cache=False)
    value = LOSSES.get("switch")().loss(routings, LossContext())
    by_hand = []
    for logits_TN in seen:
        load_N = logits_TN.topk(2).indices.flatten().bincount(minlength=N) / logits_TN[:, 0].numel() / 2
        by_hand.append(N * (load_N * logits_TN.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(value, torch.stack(by_hand).mean())
    value.backward()
    assert all(float(moe.router_NH.grad.norm()) > 0 for moe in layers)


def test_a_run_trains_both_routers_and_a_stopped_one_ends_with_the_same_bytes(
    world: dict[str, str], tmp_path: Path
) -> None:
    losses = [{"name": "switch", "coefficient": 0.1}, {"name": "z"}]
    recipe = recipe_of(world, losses=losses, gate="jitter", distill={"kl": {}})
    told = llamamoe.pretrain(recipe, tmp_path / "run").receipt
    assert len(told["start"]["router_start"]["layers"]) == len(PARTS)
    lines = lines_of(tmp_path / "run")
    assert [line["layers"]["part"] for line in lines if "layers" in line] == [PARTS] * recipe.max_steps
    measured = [line["loss"] for line in lines if "domain_loss" in line]
    assert measured[-1] < measured[0] - 0.1
    before, after = (
        load_file(Path(folder, "model.safetensors")) for folder in (world["model"], tmp_path / "run/model")
    )
    assert before.keys() == after.keys()
    unchanged = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert unchanged == set()

    def stop(step: Any) -> None:
        if step.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llamamoe.pretrain(recipe, tmp_path / "stopped", progress=stop)
    llamamoe.pretrain(recipe, tmp_path / "stopped", resume=True)
    files = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", tmp_path / "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_query_heads_are_experts_when_groups_are_frozen() -> None:
    model = tiny_moe("jetmoe")
    freeze(model, ["experts"])
    frozen = {name.partition("layers.1.")[2] for name, value in model.named_parameters() if not value.requires_grad}
    parts = [f"{part}_linear.weight" for part in ("input", "output")]
    assert frozen - {""} == {f"{block}.{part}" for block in ("self_attention.experts", "mlp") for part in parts}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing: the class of jetmoe"),
        ({"distributed": {"fsdp_size": 2}}, "no plan for sharding"),
        ({"experts_implementation": "eager"}, "has one of its own only"),
        ({"lora": {"rank": 2}}, "lora adapts q_proj and its like"),
        ({"distill": {"ffn": {}}}, r"distill\.ffn compares layers with the parent's"),
        ({"losses": [{"name": "competitive"}]}, "the loss competitive compares layers"),
    ],
)
def test_what_its_class_or_its_scale_rules_out_is_refused(
    world: dict[str, str], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(llamamoe.UsageError, match=message):
        llamamoe.plan_pretraining(recipe_of(world, **keys))
