"""The divergence of the output, against whole models in which one FFN is replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.calibration.walk import read_ffn
from llamamoe.conversion.layer import convert_layer
from llamamoe.errors import LlamaMoeError
from llamamoe.methods.moe_layer import dense_outputs
from llamamoe.studies.budget.sensitivities.base import Task
from llamamoe.studies.budget.sensitivities.kl import OutputKl, held_out
from tests.dense import make_dense
from tests.methods.splitters.calibrated import layer_inputs

from .tasks import make_task, make_text, open_model

LAYERS = 3


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("kl") / "dense", num_hidden_layers=LAYERS, intermediate_size=96)


def reference(folder: Path, task: Task) -> np.ndarray:
    """float64 [B, L]: one whole forward pass per layer and plan, softmax written out."""
    fit, held = held_out(task.text, task.held_out_tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(held)

    def log_probabilities() -> np.ndarray:
        with torch.no_grad():
            z = model(input_ids=ids, use_cache=False).logits.double().numpy()
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    parent = log_probabilities()
    found = np.zeros((len(task.plans), LAYERS))
    walk = task.walk(fit)
    for layer in range(LAYERS):
        inputs = walk.enter(layer)
        for i, plan in enumerate(task.plans):
            moe = convert_layer(plan, layer, inputs).moe
            assert moe is not None
            mlp = model.model.layers[layer].mlp
            mlp.forward = lambda x, moe=moe: torch.cat(list(moe.outputs(layer_inputs(x.flatten(0, 1))))).view_as(x)
            changed = log_probabilities()
            del mlp.forward
            found[i, layer] = (np.exp(parent) * (parent - changed)).sum(-1).mean()
        walk.leave(layer, dense_outputs(inputs, read_ffn(walk.model, layer)))
    return found


def test_the_divergence_is_that_of_whole_models(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(open_model(dense), tmp_path)
    want = reference(dense, task)
    found = OutputKl().measure(task)
    assert found.shares_B.tolist() == [0.4, 0.6]
    np.testing.assert_allclose(found.damage_BL, want, rtol=1e-3)
    assert (want[0] > want[1]).all(), "more left out, more lost"
    monkeypatch.setattr("llamamoe.studies.budget.sensitivities.kl.LOGITS_AT_ONCE", 128 * 5)
    monkeypatch.setattr("llamamoe.studies.budget.sensitivities.kl.MEMORY_BYTES", 0)
    again = OutputKl().measure(replace(task, batch_tokens=16))
    assert (tmp_path / "held-out").is_file(), "in a file"
    np.testing.assert_allclose(again.damage_BL, found.damage_BL, rtol=1e-3)


def test_nothing_is_lost_where_every_expert_is_selected(dense: Path, tmp_path: Path) -> None:
    task = make_task(open_model(dense), tmp_path, top_k=4, shared=0, repair="none", router="ridge")
    task = replace(task, plans=task.plans[:1], shares=task.shares[:1])
    assert OutputKl().measure(task).damage_BL.max() < 1e-6


def test_methods_that_need_gradients_or_clusters_get_them(dense: Path, tmp_path: Path) -> None:
    task = make_task(open_model(dense), tmp_path, method="gradient", repair="none", shared=0)
    damage = OutputKl().measure(replace(task, plans=task.plans[:1], shares=task.shares[:1])).damage_BL
    assert (damage > 0).all()


def test_the_last_fifth_is_held_out_from_the_start_of_each_sequence() -> None:
    text = make_text(11, 16)
    fit, held = held_out(text, 20)
    assert np.array_equal(fit.ids_ST, text.ids_ST[:9])
    assert np.array_equal(held, text.ids_ST[9:, :10])
    assert len(fit.domains_S) == 9
    assert held_out(text, 4096)[1].shape == (2, 16)
    assert held_out(text, 2)[1].shape == (1, 2)
    assert held_out(make_text(2), 4096)[1].shape == (1, 16)


def test_one_sequence_is_too_little() -> None:
    with pytest.raises(LlamaMoeError, match="one sequence"):
        held_out(make_text(1), 64)
