"""Hard routers scaled up: same ranking, the size asked for, nothing else moved, and all of it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.errors import RefusedError
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.router_start import logit_std, measure_logit_std, renormalise, soften
from llamamoe.training.routing import RouterTap

from .tiny_moe import ARCHITECTURES, N, input_ids, tiny_moe

BATCHES = [{"input_ids": input_ids(seed=s)} for s in (1, 2)]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    *((name, {"norm_topk_prob": flag}) for name in ("qwen2_moe", "qwen3_moe", "glm4_moe") for flag in (True, False)),
]


def hard(name: str, **keys: Any) -> Any:
    """Logits of about 1e-4."""
    return tiny_moe(name, router_std=3e-5, **keys).eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCHES[0]).logits


def started(model: Any, std: float) -> Any:
    layers = renormalise(model, find_moe_layers(model))
    return soften(layers, measure_logit_std(model, layers, BATCHES), std)


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_a_hard_model_computes_the_same_after_renormalising_and_a_tiny_start(name: str, keys: dict[str, Any]) -> None:
    model = hard(name, **keys)
    model.config.llamamoe = {"method": "random", "factor": 8.0, "baked_factor": 8.0}
    before = outputs(model)
    layers = find_moe_layers(model)
    down = float(layers[-1].expert_weights().down_NHW.detach().norm())
    again = renormalise(model, layers)
    told = model.config.llamamoe
    assert told["baked_factor"] == pytest.approx(
        8.0 * float(layers[-1].expert_weights().down_NHW.detach().norm()) / down
    )
    assert told["factor"] == pytest.approx(told["baked_factor"] * again[0].factor / layers[0].factor)
    assert told["method"] == "random"
    assert [moe.weighting for moe in again] == [moe.weighting for moe in find_moe_layers(model)]
    assert all(moe.weighting.endswith("renormalised") for moe in again)
    assert [moe.factor for moe in again] == [moe.factor for moe in find_moe_layers(model)]
    torch.testing.assert_close(outputs(model), before, rtol=2e-3, atol=2e-3)
    started(model, 1e-4)
    torch.testing.assert_close(outputs(model), before, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ranking_stays_and_the_size_is_met(name: str) -> None:
    model = hard(name)
    layers = renormalise(model, find_moe_layers(model))
    inputs = torch.randn(200, layers[0].router_NH.shape[1], generator=torch.Generator().manual_seed(0))
    before = [(moe.router_NH.detach().double() @ inputs.double().T).argsort(0) for moe in layers]
    chosen = [moe.decisions(moe.router(inputs))[2].sort(-1)[0] for moe in layers]
    report = started(model, 0.7)
    for moe, ranking, indices in zip(layers, before, chosen, strict=True):
        assert torch.equal((moe.router_NH.detach().double() @ inputs.double().T).argsort(0), ranking)
        # The hard router's float32 scores tie now and then; what it chose by logits, it still chooses.
        assert float((moe.decisions(moe.router(inputs))[2].sort(-1)[0] == indices).all(-1).float().mean()) > 0.97
    # The second layer's inputs have moved with the first layer's weights; each was measured before.
    assert [each.std_after for each in report] == pytest.approx([0.7] * len(layers))
    assert measure_logit_std(model, layers[:1], BATCHES) == pytest.approx([0.7], rel=1e-4)


def test_narrow_rows_are_scaled_by_powers_of_two_so_that_no_choice_changes() -> None:
    model = hard("mixtral").bfloat16()
    layers = find_moe_layers(model)
    rows = [moe.router_NH.detach().clone() for moe in layers]
    for each, moe, old in zip(started(model, 0.7), layers, rows, strict=True):
        assert torch.equal(moe.router_NH, old * each.factor)
        assert (each.factor.hex().split("p")[0]) == "0x1.0000000000000"
        assert 0.7 / 2**0.5 <= each.std_after <= 0.7 * 2**0.5


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_what_is_saved_is_what_was_started(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    model = hard(name, **keys)
    started(model, 1.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))
    assert [m.weighting for m in find_moe_layers(again)] == [m.weighting for m in find_moe_layers(model)]


def test_the_softened_router_s_weights_differ() -> None:
    model = hard("qwen2_moe")
    started(model, 1.0)
    tap = RouterTap(find_moe_layers(model))
    with tap.armed() as routings:
        outputs(model)
    weights = routings[0].weights_Tk
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    assert float((weights[:, 0] - weights[:, 1]).mean()) > 0.2


def test_measuring_leaves_the_model_as_it_was_and_weighs_batches_by_tokens() -> None:
    model = tiny_moe("mixtral")
    layers = find_moe_layers(model)
    batches = [{"input_ids": input_ids(rows)} for rows in (1, 3)]
    found = measure_logit_std(model, layers, batches)
    tap, expected = RouterTap(layers), 0.0
    for batch, share in zip(batches, (0.25, 0.75), strict=True):
        with tap.armed() as routings, torch.no_grad():
            model(**batch)
        expected += share * float(routings[0].logits_TN.std(-1, unbiased=False).mean())
        assert logit_std(routings[0].logits_TN) == pytest.approx(
            float(routings[0].logits_TN.std(-1, unbiased=False).mean())
        )
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_softened_is_refused_before_anything_changes() -> None:
    model = hard("qwen2_moe")
    layers = find_moe_layers(model)
    rows = layers[0].router_NH.detach().clone()
    with pytest.raises(RefusedError, match="not renormalised"):
        soften(layers, [1e-4, 1e-4], 1.0)
    layers = renormalise(model, layers)
    with pytest.raises(RefusedError, match=r"layer 1.*spread of its logits is 0"):
        soften(layers, [1e-4, 0.0], 1.0)
    assert torch.equal(layers[0].router_NH, rows)
    biased = find_moe_layers(tiny_moe("ernie4_5_moe"))
    biased[0].correction_bias.add_(torch.linspace(0, 1, N))
    with pytest.raises(RefusedError, match="correction bias"):
        soften(biased[:1], [1e-4], 1.0)
    with pytest.raises(RefusedError, match="groups"):
        soften(find_moe_layers(tiny_moe("glm4_moe", n_group=3, topk_group=2)), [1e-4] * 2, 1.0)
