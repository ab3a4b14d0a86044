"""Least squares through the written file: what is stored is what numpy.linalg.lstsq finds, times the target's bake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe.calibration.text import calibration_text
from tests.converted import plain_hidden
from tests.dense import make_dense

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "said",
    "nothing",
    "at",
    "all",
    "while",
    "it",
    "rained",
    "in",
    "May",
]
RIDGE, EXPERTS, TOP_K = 0.01, 4, 2


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dense(tmp_path_factory.mktemp("repaired") / "dense", num_hidden_layers=1)
    folder.with_name("text.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 500)))
    return folder


def ffn_inputs(dense: Path, recipe: llamamoe.SplitRecipe) -> torch.Tensor:
    """float32 ``[T, H]``: what transformers' own dense model feeds its first FFN with."""
    tokens = calibration_text(
        recipe.calibration, AutoTokenizer.from_pretrained(dense), num_tokens=recipe.calibration_tokens,
        length=recipe.calibration_length or 0, weights=None, seed=recipe.seed, vocab_size=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(dense)
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens.ids_ST))
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize(("target", "shared", "bake"), [("qwen2_moe", 40, 4.0), ("mixtral", 0, 2.0)])
def test_stored_down_projections(dense: Path, tmp_path: Path, target: str, shared: int, bake: float) -> None:
    given = {
        "num_experts": EXPERTS, "top_k": TOP_K, "method": "cluster_shared", "shared": shared, "target": target,
        "router": "ridge", "rescale": "unit", "calibration": [str(dense.with_name("text.txt"))],
        "calibration_tokens": 600, "calibration_length": 30, "device": "cpu",
        "repair": {"name": "least_squares", "options": {"ridge": RIDGE, "penalty": "mean"}},
    }  # fmt: skip
    recipe = llamamoe.load_recipe(given=given)
    out = llamamoe.split(dense, tmp_path / "out", recipe, verify=False).out
    old, new = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    parent = {part: old[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")}
    names = {"gate": "w1", "up": "w3", "down": "w2"}

    def stored(part: str, expert: int) -> torch.Tensor:
        name = (
            f"block_sparse_moe.experts.{expert}.{names[part]}"
            if target == "mixtral"
            else f"mlp.experts.{expert}.{part}_proj"
        )
        return new[f"model.layers.0.{name}.weight"]

    router = new[f"model.layers.0.{'block_sparse_moe' if target == 'mixtral' else 'mlp'}.gate.weight"]
    x = ffn_inputs(dense, recipe)
    logits = x.double().numpy() @ router.double().numpy().T
    chosen = np.argsort(-logits, axis=1)[:, :TOP_K]

    # Every place: its activation where it is used, its stored down column without the bake, the parent's column.
    gates, hidden, found, start = [], [], [], []
    for i in range(EXPERTS):
        used = (chosen == i).any(1)
        gates.append(stored("gate", i))
        hidden.append(plain_hidden(stored("gate", i), stored("up", i), x) * used[:, None])
        found.append(stored("down", i).double().numpy() / bake)
    if shared:
        prefix = "model.layers.0.mlp.shared_expert."
        gates.append(new[prefix + "gate_proj.weight"])
        hidden.append(plain_hidden(gates[-1], new[prefix + "up_proj.weight"], x))
        found.append(new[prefix + "down_proj.weight"].double().numpy() / 2)
    for row in torch.cat(gates):
        same = (parent["gate"] == row).all(1).nonzero().flatten()
        start.append(parent["down"][:, same[0]] if len(same) else torch.zeros(len(x[0])))
    h, d, d0 = np.hstack(hidden), np.hstack(found), torch.stack(start, 1).double().numpy()
    real = (h != 0).any(0)
    assert real.sum() == 172
    h, d, d0 = h[:, real], d[:, real], d0[:, real]
    pull = np.sqrt(RIDGE * (h**2).sum() / h.shape[1])
    y = plain_hidden(parent["gate"], parent["up"], x) @ parent["down"].double().numpy().T
    best = np.linalg.lstsq(np.vstack([h, pull * np.eye(172)]), np.vstack([y, pull * d0.T]), rcond=None)[0].T
    scale = np.abs(best).max()
    assert np.abs(d - best).max() < 2e-3 * scale
    assert np.abs(d0 - best).max() > 0.05 * scale
