"""The proxy against its formula, on what transformers' own model shows to hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.studies.budget.sensitivities.proxy import STEPS, Proxy
from tests.dense import make_dense

from .tasks import make_task, make_text, open_model


def reference(folder: Path, ids: np.ndarray, eps: float, multiplier: float) -> np.ndarray:
    """float64 [B, L]: the docstring's formula, token by token and neuron by neuron."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[dict[str, np.ndarray]] = []
    for layer in model.model.layers:
        found: dict[str, np.ndarray] = {}
        seen.append(found)

        def keep(key: str, found: dict[str, np.ndarray] = found):  # type: ignore[no-untyped-def]
            return lambda _, args: found.__setitem__(key, args[0].flatten(0, 1).double().numpy())

        layer.post_attention_layernorm.register_forward_pre_hook(keep("residual"))
        layer.mlp.down_proj.register_forward_pre_hook(keep("h"))
        found["down"] = layer.mlp.down_proj.weight.detach().double().numpy()
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids), use_cache=False)
    damage = []
    for each in seen:
        h, down, residual = each["h"], each["down"], each["residual"]
        size, hidden = h.shape[1], residual.shape[1]
        y = multiplier * h @ down.T
        weights = [1 / (sum((residual[t] + y[t]) ** 2) + hidden * eps) for t in range(len(h))]
        first = np.mean([sum(y[t] ** 2) * weights[t] for t in range(len(h))])
        power = [sum(weights[t] * h[t, j] ** 2 for t in range(len(h))) * sum(down[:, j] ** 2) for j in range(size)]
        weakest = sorted(power)
        damage.append([first * sum(weakest[: size - round(b / STEPS * size)]) / sum(power) for b in range(1, STEPS)])
    return np.array(damage).T


@pytest.mark.parametrize("variant", ["llama", "granite"])
def test_the_proxy_is_its_formula(variant: str, tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense", variant, num_hidden_layers=3, intermediate_size=48)
    model, text = open_model(folder), make_text(3)
    task = make_task(model, tmp_path, text=text, target="auto", shared=0, num_experts=3, top_k=1)
    found = Proxy().measure(task)
    want = reference(folder, text.ids_ST, model.spec.rms_norm_eps, model.spec.residual_multiplier)
    np.testing.assert_allclose(found.damage_BL, want, rtol=1e-4)
    assert found.shares_B.tolist() == [b / STEPS for b in range(1, STEPS)]


def test_an_ffn_that_overwhelms_the_residual_stream_is_the_most_sensitive(tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense", num_hidden_layers=3, intermediate_size=96)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 0.05
        model.model.layers[1].mlp.down_proj.weight *= 400
    model.save_pretrained(folder)
    damage = Proxy().measure(make_task(open_model(folder), tmp_path)).at(0.5)
    assert damage[1] > 5 * max(damage[0], damage[2])


def test_batches_change_nothing(tmp_path: Path) -> None:
    task = make_task(open_model(make_dense(tmp_path / "dense", intermediate_size=96)), tmp_path)
    small = Proxy().measure(replace(task, batch_tokens=16))
    np.testing.assert_allclose(small.damage_BL, Proxy().measure(task).damage_BL, rtol=1e-4)
