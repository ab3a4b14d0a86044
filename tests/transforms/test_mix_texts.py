"""Routers that are fitted to a text of each expert: the formula written out, what they select, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe import CheckpointError, RefusedError, UsageError, load_mix_recipe, mix
from llamamoe.architectures.dense_checkpoint import understand
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.progress import ignore_progress
from llamamoe.transforms.mixing import texts as module
from llamamoe.transforms.mixing.states import layer_states
from llamamoe.transforms.mixing.texts import fit_layer
from tests.dense import make_dense
from tests.transforms.outputs import logits
from tests.transforms.test_merge import stop_at

WORDS = {"code": ["bead", "cafe", "deaf", "fade"], "maths": ["most", "port", "torn", "spun"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same with slightly other FFNs, and two texts without a common letter, which is a token."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(make_dense(folder / "code"), folder / "maths")
    weights = load_file(folder / "maths" / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name in (each for each in weights if ".mlp." in each):
        weights[name] += 0.05 * torch.randn(weights[name].shape, generator=noise) * weights[name].std()
    save_file(weights, folder / "maths" / "model.safetensors", {"format": "pt"})
    for seed, name in enumerate(WORDS):
        for part, count in (("", 400), ("-other", 60)):
            words = np.random.default_rng(seed + count).choice(WORDS[name], count)
            (folder / f"{name}{part}.txt").write_text(" ".join(words))
    return folder


def asked(world: Path, **keys: Any) -> llamamoe.MixRecipe:
    given: dict[str, Any] = {"experts": [str(world / name) for name in WORDS], "target": "mixtral", "top_k": 1}
    given |= {"router": "text", "texts": [str(world / f"{name}.txt") for name in WORDS], "text_tokens": 1024}
    return load_mix_recipe(given=given | keys)


def test_rows_are_the_formula_written_out() -> None:
    rng = np.random.default_rng(0)
    counts, hidden = (200, 50, 120), 3
    labels = np.repeat(np.arange(3), counts)
    x = rng.normal(size=(len(labels), hidden)) + rng.normal(size=(3, hidden))[labels] + 0.5
    rows, told = fit_layer(torch.from_numpy(x).float(), torch.from_numpy(labels), 3, layer=0)
    held = np.concatenate([np.arange(n) >= n - n // 5 for n in counts])
    weights = np.array([1 / np.sum((labels == each) & ~held) / 3 for each in range(3)])[labels]
    root = np.sqrt(weights[~held])[:, None]
    strength = 1e-3 * np.sum(weights[~held, None] * x[~held] ** 2) / hidden
    left = np.concatenate([root * x[~held], math.sqrt(strength) * np.eye(hidden)])
    right = np.concatenate([root * (np.eye(3)[labels[~held]] - 1 / 3), np.zeros((hidden, 3))])
    plain = np.linalg.lstsq(left, right, rcond=None)[0].T

    def loss(scale: float) -> float:
        logits = scale * x[held] @ plain.T
        each = np.log(np.exp(logits).sum(1)) - logits[np.arange(held.sum()), labels[held]]
        return float(np.average(each, weights=weights[held]))

    best = minimize_scalar(loss, bounds=(1 / 16, 16), method="bounded", options={"xatol": 1e-9})
    assert 0.1 < best.x < 15, "inside the range"
    assert np.allclose(rows.numpy(), best.x * plain, rtol=1e-4, atol=1e-5)
    assert told["held_out_loss"] == pytest.approx(best.fun, abs=1e-8)
    right_ones = (x[held] @ plain.T).argmax(1) == labels[held]
    assert told["held_out_accuracy"] == pytest.approx(np.mean([right_ones[labels[held] == n].mean() for n in range(3)]))


def test_the_scale_is_bounded_where_the_texts_differ_in_every_token() -> None:
    labels = torch.arange(200) // 100
    rows, told = fit_layer(torch.nn.functional.one_hot(labels, 4).float(), labels, 2, layer=0)
    assert told["held_out_accuracy"] == 1
    assert (rows[0] - rows[1]).abs().max() == pytest.approx(16, rel=0.01)


def test_what_cannot_be_told_apart_gets_equal_weights() -> None:
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    rows, told = fit_layer(x, torch.arange(4000) % 2, 2, layer=0)
    assert rows.abs().max() < 0.2
    assert told["held_out_loss"] == pytest.approx(math.log(2), abs=0.01)
    assert told["held_out_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_states_are_in_memory_twice_and_not_in_float64(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states and one layer's inputs: the number that the plan counts."""
    monkeypatch.setattr(module, "_ROWS", 64)
    labels = torch.arange(2000) // 1000
    with _Largest() as made:
        fit_layer(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), labels, 2, layer=0)
    assert made.numbers <= 64 * 16 < 2000 * 16
    base = understand(SafetensorsCheckpoint(world / "code"))
    ids = torch.arange(3, 40)[None].expand(9, -1)
    for states in ("ffn_input", "layer_input"):
        kept = list(layer_states(base, ids, states, "F32", "texts", ignore_progress))
        assert len(kept) == 2
        assert len({each.data_ptr() for each in kept}) == 1


class _Largest(TorchDispatchMode):
    """The size of the largest new tensor of floats with a row for each token."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64 and made.ndim == 2 and made.shape[1] == 16:
            self.numbers = max(self.numbers, made.numel())
        return made


def test_unseen_text_selects_its_expert(world: Path, tmp_path: Path) -> None:
    result = mix(world / "code", tmp_path / "out", asked(world))
    fits = result.receipt["router_fit"]
    assert len(fits) == 2
    assert all(fit["held_out_accuracy"] > 0.9 for fit in fits)
    assert [text["tokens"] > 500 for text in result.receipt["texts"]] == [True, True]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    for expert, name in enumerate(WORDS):
        ids = tokenizer((world / f"{name}-other.txt").read_text(), return_tensors="pt").input_ids[:, :60]
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        for layer in logits:
            assert (layer.argmax(1) == expert).float().mean() > 0.9


def test_every_model_gets_several_experts_by_a_resplit(world: Path, tmp_path: Path) -> None:
    mix(world / "code", tmp_path / "out", asked(world, top_k=2))
    llamamoe.resplit(tmp_path / "out", tmp_path / "finer", 2)
    whole, finer = logits(tmp_path / "out"), logits(tmp_path / "finer")
    assert (finer - whole).abs().max() < 1e-5 * whole.abs().max()
    assert json.loads((tmp_path / "finer" / "config.json").read_text())["num_local_experts"] == 4


def test_the_seed_and_the_texts_decide_and_resume_compares_them(world: Path, tmp_path: Path) -> None:
    stop = stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        mix(world / "code", tmp_path / "out", asked(world), progress=lambda p: stop(p) if p.stage == "mix" else None)
    other = asked(world, texts=[str(world / "maths.txt"), str(world / "code.txt")])
    with pytest.raises(RefusedError, match="other"):
        mix(world / "code", tmp_path / "out", other, resume=True)
    mix(world / "code", tmp_path / "out", asked(world), resume=True)
    mix(world / "code", tmp_path / "whole", asked(world))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"texts": None}, "needs a text of each expert"),
        ({"router": "random"}, "texts: only the router text reads them, but the router is random"),
        ({"texts": ["a.txt"]}, r"texts: give one for each of the 2 experts, in their order \(got 1\)"),
        ({"prompts": "p.yaml"}, "--prompts and --text exclude each other"),
        ({"text_tokens": 10}, "must be greater than or equal to 256"),
    ],
)
def test_texts_and_experts_belong_together(keys: dict[str, Any], words: str, world: Path) -> None:
    with pytest.raises(UsageError, match=words):
        asked(world, **keys)


def test_a_text_that_is_missing_or_short_is_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt"):
        llamamoe.plan_mix(world / "code", asked(world, texts=[str(world / "code.txt"), str(tmp_path / "none.txt")]))
    given = asked(world, texts=[str(world / "code.txt"), str(tmp_path / "short.txt")])
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(UsageError, match=r"the text of expert 1 \(.*maths\): .* only 11 bytes .*256") as caught:
        llamamoe.plan_mix(world / "code", given)
    assert caught.value.exit_code == 2
    (tmp_path / "short.txt").write_text("more bytes than half the tokens " * 6)
    with pytest.raises(UsageError, match=r"the text of expert 1 \(.*maths\): .* only \d+ tokens; at least 256"):
        mix(world / "code", tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_one_text_for_two_experts_is_a_warning_of_plan_and_result(world: Path, tmp_path: Path) -> None:
    given = asked(world, texts=[str(world / "code.txt"), str(world / ".." / world.name / "code.txt")])
    told = "experts 0 and 1 have the same texts: the router cannot tell them apart"
    assert told in llamamoe.plan_mix(world / "code", given).warnings
    assert told in mix(world / "code", tmp_path / "out", given, verify=False).warnings
    assert not llamamoe.plan_mix(world / "code", asked(world)).warnings


def test_a_base_without_a_tokenizer_is_refused(world: Path, tmp_path: Path) -> None:
    for name in WORDS:
        shutil.copytree(world / name, tmp_path / name, ignore=shutil.ignore_patterns("tokenizer*"))
    given = asked(world, experts=[str(tmp_path / name) for name in WORDS])
    with pytest.raises(CheckpointError, match="has no tokenizer, so text cannot be read") as refused:
        mix(tmp_path / "code", tmp_path / "out", given)
    assert "--router random" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()
