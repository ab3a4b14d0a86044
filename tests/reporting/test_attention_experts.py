"""The report of a model whose attention is routed, too: both routers, and which query heads are an expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe import load_recipe, split
from llamamoe.reporting.page import render
from llamamoe.reporting.report import report

from ..dense import make_dense
from ..training.runs import make_text

N, K, KV, LAYER = 4, 2, 2, 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """8 query heads over 2 key/value heads."""
    root = tmp_path_factory.mktemp("world")
    dense = make_dense(root / "dense", num_attention_heads=N * KV, num_key_value_heads=KV)
    given = {"method": "random", "target": "jetmoe", "router_scale": "soft"}
    split(dense, root / "moe", load_recipe(given=given), verify=False)
    make_text(root / "text", 0, documents=4)
    return {"dense": dense, "moe": root / "moe", "text": root / "text"}


@pytest.fixture(scope="module")
def found(world: dict[str, Path]) -> dict[str, Any]:
    return report([world["moe"]], [world["text"]], against=world["dense"], dtype="float32")


def plainly(world: dict[str, Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of the text: the contribution of each expert of attention in one layer, and whether it was selected.

    The contribution is the attention's output if its router selects that expert alone.
    """
    tokenizer = AutoTokenizer.from_pretrained(world["moe"])
    model = AutoModelForCausalLM.from_pretrained(world["moe"], dtype=torch.float32)
    attention: Any = model.model.layers[LAYER].self_attention
    calls: list[Any] = []
    attention.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    scores, chosen = [], []
    for path in sorted(world["text"].glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with torch.no_grad():
                model(torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]]), use_cache=False)
                scores.append(torch.stack([alone(attention, calls[-1], expert) for expert in range(N)], 1))
                x_TH = calls[-1][1]["hidden_states"][0]
                chosen.append(torch.zeros(len(x_TH), N).scatter(1, logits(attention, x_TH).topk(K).indices, 1.0))
    return torch.cat(scores), torch.cat(chosen)


def logits(attention: Any, x_TH: torch.Tensor) -> torch.Tensor:
    return x_TH @ attention.experts.router.layer.weight.T


def alone(attention: Any, call: tuple[Any, Any], expert: int) -> torch.Tensor:
    """The squared norm of the output of one expert, with weight 1."""
    router = attention.experts.router
    modules, kept = (attention, attention.experts, router), router.layer.forward
    router.layer.forward = lambda x: torch.nn.functional.one_hot(torch.tensor(expert), N).float().expand(len(x), N)
    for module in modules:
        module.top_k = 1
    output = attention.forward(*call[0], **call[1])[0][0]
    for module in modules:
        module.top_k = K
    router.layer.forward = kept
    return output.square().sum(-1)


def test_attention_is_measured_beside_the_ffns(found: dict[str, Any], world: dict[str, Path]) -> None:
    routing = found["models"][0]["routing"]
    attention = routing["attention"]
    score_TN, chosen_TN = plainly(world)
    layer = attention["layers"][LAYER]
    assert layer["load"] == pytest.approx((chosen_TN.sum(0) / chosen_TN.sum()).tolist())
    assert layer["load"] != routing["layers"][LAYER]["load"]
    best = score_TN.topk(K)
    assert layer["recall_at_k"] == pytest.approx(float(chosen_TN.gather(1, best.indices).mean()), abs=1e-6)
    assert layer["captured"] == pytest.approx(float((score_TN * chosen_TN).sum() / best.values.sum()), rel=1e-4)
    assert attention["query_heads"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [len(each["first_expert"]) for each in attention["passages"]] == [2, 2]
    assert 0 < routing["layers"][LAYER]["captured"] <= 1


def test_the_page_has_a_view_of_either_router(found: dict[str, Any]) -> None:
    page = render(found)
    for text in (
        "moe, FFNs",
        "moe, attention: the load’s entropy",
        "expert 0 is heads 0, 4; 1 is heads 1, 5",
        "of attention, 2 of 4 query heads of each key/value head",
        "Serve it with transformers: no other program that we know runs jetmoe",
    ):
        assert text in page
    assert "llamamoe_auto" not in page
