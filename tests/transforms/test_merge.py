"""The average of checkpoints, against the same written out plainly; what cannot be averaged is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe import LlamaMoeError, RefusedError, UsageError, load_recipe, merge, split
from llamamoe.checkpoint.out_folder import DERIVED_FILE
from llamamoe.methods.router_scale import HARD_LOGIT
from llamamoe.transforms.merge import _shares

from ..dense import make_dense

WEIGHTS = "model.safetensors"


def make(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    """A conversion of a random model."""
    dense = make_dense(folder / "dense", seed=seed, dtype=dtype, **keys)
    recipe = load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, "target": "mixtral"})
    split(dense, folder / "moe", recipe, verify=False)
    return folder / "moe"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return make(root / "a", 0, request.param), make(root / "b", 1, request.param)


@pytest.mark.parametrize("weights", [None, (3.0, 1.0), (0.0, 2.0), (1.0, 0.0)])
def test_it_is_the_average(pair: tuple[Path, Path], weights: tuple[float, ...] | None, tmp_path: Path) -> None:
    found = merge(pair, tmp_path / "out", weights=weights)
    w = torch.tensor(weights or (1.0, 1.0), dtype=torch.float64)
    w /= w.sum()
    assert found.weights == pytest.approx(w.tolist())
    a, b, out = (load_file(folder / WEIGHTS) for folder in (*pair, found.out))
    assert out.keys() == a.keys()
    for name, value in out.items():
        exact = w[0] * a[name].double() + w[1] * b[name].double()
        assert value.dtype == a[name].dtype
        step = torch.finfo(value.dtype).eps * exact.abs()  # the result is rounded once
        assert bool(((value.double() - exact).abs() <= step + 1e-12).all()), name
    model, info = AutoModelForCausalLM.from_pretrained(found.out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_experts_per_tok == 2


def test_equal_models_stay_what_they_are_to_the_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = merge([pair[0]] * 3, tmp_path / "out", weights=(0.1, 0.2, 0.7))
    assert (found.out / WEIGHTS).read_bytes() == (pair[0] / WEIGHTS).read_bytes()


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=6).filter(lambda each: sum(each) > 1e-6))
def test_weights_are_shares(weights: list[float]) -> None:
    shares = _shares(len(weights), weights)
    assert sum(shares) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares)
    assert [s * sum(weights) for s in shares] == pytest.approx(weights, abs=1e-6)


def test_a_trained_model_and_its_start_are_brought_to_one_form(tmp_path: Path) -> None:
    """Training makes the router's weights sum to one; the start, all of it, still computes what it did."""
    from ..training.runs import make_world, recipe_of

    world = make_world(tmp_path / "world", target="qwen2_moe", shared="1x", num_experts=3, rescale="unit")
    trained = llamamoe.pretrain(recipe_of(world, "steps=1", precision={"save": "float32"}), tmp_path / "run").model
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))

    def logits(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        return found

    found = merge([trained, world["model"]], tmp_path / "out", weights=(0, 1))
    assert any("in another way than the result" in each for each in found.warnings)
    config = json.loads((found.out / "config.json").read_text())
    assert config["norm_topk_prob"] is True
    assert (config["llamamoe"]["parity"], config["llamamoe"]["router_scale"]) == ("none", "soft")
    before = json.loads((Path(world["model"]) / "config.json").read_text())["llamamoe"]
    ratio = config["num_experts_per_tok"] / config["num_experts"]
    assert config["llamamoe"]["baked_factor"] == pytest.approx(before["baked_factor"] * ratio)
    merged, start = (load_file(folder / WEIGHTS) for folder in (found.out, Path(world["model"])))
    for name, rows in start.items():
        if name.endswith("mlp.gate.weight"):  # the same choices, at the trained router's temperature
            size = load_file(trained / WEIGHTS)[name].float().square().mean().sqrt()
            assert torch.allclose(merged[name], rows * size / rows.square().mean().sqrt(), rtol=1e-4)
            merged[name] = rows
    save_file(merged, found.out / WEIGHTS, {"format": "pt"})
    wanted = logits(Path(world["model"]))
    assert torch.allclose(logits(found.out), wanted, atol=2 * HARD_LOGIT * float(wanted.abs().max()))
    other = merge([trained, world["model"]], tmp_path / "other", weights=(1, 0))
    assert torch.equal(logits(other.out), logits(trained))


def test_what_is_left_beside_the_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = merge(pair, tmp_path / "out", weights=(3, 1))
    receipt = json.loads((found.out / DERIVED_FILE).read_text())
    assert receipt["made_by"] == "merge"
    assert receipt["weights"] == [0.75, 0.25]
    assert receipt["weights_sha256"] == found.receipt["weights_sha256"]
    block = json.loads((found.out / "config.json").read_text())["llamamoe"]
    assert block["merge"][0]["weights"] == [0.75, 0.25]
    assert "weights of `moe` (0.75), `" in (found.out / "README.md").read_text()


def stop_at(unit: int) -> Callable[[Any], None]:
    def stopping(progress: Any) -> None:
        if progress.done == unit:
            raise KeyboardInterrupt

    return stopping


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_a_stop_leaves_nothing_half_written_and_resume_ends_alike(
    unit: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    merge(pair, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        merge(pair, tmp_path / "out", progress=stop_at(unit))
    assert not (tmp_path / "out").exists()
    with pytest.raises(RefusedError, match="left from a run that was stopped"):
        merge(pair, tmp_path / "out")
    with pytest.raises(RefusedError, match="other"):
        merge(pair, tmp_path / "out", weights=(2, 1), resume=True)
    steps: list[Any] = []
    merge(pair, tmp_path / "out", resume=True, progress=steps.append)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[0].done == unit
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in names)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_models_that_differ_are_refused_with_every_reason(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = make(tmp_path / "other", 0, vocab_size=96, rms_norm_eps=1e-3)
    with pytest.raises(RefusedError) as found:
        merge([pair[0], other], tmp_path / "out")
    assert "is [128, 64] in" in str(found.value)
    assert "rms_norm_eps is 1e-05 in" in str(found.value)
    assert "vocab_size is 128 in" in str(found.value)
    assert not (tmp_path / "out").exists()


def test_ids_of_special_tokens_may_differ(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"pad_token_id": None}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    found = merge([pair[0], tmp_path / "other"], tmp_path / "out")
    assert any("special tokens differ" in each for each in found.warnings)


def test_another_k_is_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = llamamoe.retop(pair[0], tmp_path / "retop", 3).out
    with pytest.raises(RefusedError, match=r"num_experts_per_tok is 2 in .* but 3 in"):
        merge([pair[0], other], tmp_path / "out")


def test_a_tensor_that_is_missing_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "other" / WEIGHTS, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"lacks model\.norm\.weight"):
        merge([pair[0], tmp_path / "other"], tmp_path / "out")


def test_values_that_are_not_finite_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / WEIGHTS)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "other" / WEIGHTS, {"format": "pt"})
    with pytest.raises(LlamaMoeError, match=r"model\.norm\.weight would hold NaN"):
        merge([pair[0], tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (1, None, "takes two or more"),
        (2, (1.0,), "1 weights were given for 2"),
        (2, (1.0, -1.0), "must be a number >= 0"),
        (2, (0.0, 0.0), "one of them more than 0"),
        (2, (float("nan"), 1.0), "must be a number >= 0"),
    ],
)
def test_silly_weights(
    count: int, weights: tuple[float, ...] | None, message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        merge(pair[:count], tmp_path / "out", weights=weights)


def test_a_place_that_would_harm_a_source(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        with pytest.raises(RefusedError, match=r"and MODEL \(.*must not contain each other"):
            merge(pair, folder / "inside")
        with pytest.raises(RefusedError, match="must not contain each other"):
            merge(pair, folder, force=True)


def test_a_file_cut_short(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "other")
    path = tmp_path / "other" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LlamaMoeError, match=WEIGHTS):
        merge([pair[0], tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def losses_by_transformers(models: tuple[Path, ...], lines: list[str]) -> torch.Tensor:
    """Mean loss of a token of each model, document by document, float64."""
    found = []
    for folder in models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        total, count = 0.0, 0
        for line in lines:
            ids = tokenizer(line, return_tensors="pt").input_ids
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        found.append(total / count)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [None, 0.01])
def test_weights_by_examples_are_the_softmax_of_negative_losses(tmp_path: Path, temperature: float | None) -> None:
    models = make(tmp_path / "a", 0), make(tmp_path / "b", 1), make(tmp_path / "c", 2)
    lines = ["once upon a time", "there was a model that was the mean of others"]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    keys = {} if temperature is None else {"temperature": temperature}
    found = merge(models, tmp_path / "out", weights="auto", examples=[tmp_path / "examples.jsonl"], **keys)
    losses = losses_by_transformers(models, lines)
    assert found.losses == pytest.approx(losses.tolist(), abs=1e-5)
    wanted = torch.softmax(-losses / (temperature or 5.0), 0)
    assert found.weights == pytest.approx(wanted.tolist(), abs=1e-5 / (temperature or 5.0))
    assert found.receipt["weights"] == list(found.weights)
    by_hand = merge(models, tmp_path / "by-hand", weights=found.weights)
    assert (found.out / WEIGHTS).read_bytes() == (by_hand.out / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "auto"}, "auto needs examples"),
        ({"examples": ["text.txt"]}, "only it does"),
        ({"weights": "auto", "examples": ["text.txt"], "temperature": 0.0}, "temperature is 0"),
        ({"weights": "auto", "examples": ["missing.txt"]}, "missing.txt"),
    ],
)
def test_weights_by_examples_need_them(
    pair: tuple[Path, Path], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        merge(pair, tmp_path / "out", **keys)
    assert not any(tmp_path.iterdir())
