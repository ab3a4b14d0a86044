"""Attention as experts on calibration text: the file computes what the walk computed, and router and repair help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.calibration.walk import Walk
from llamamoe.checkpoint.tensors import torch_dtype
from llamamoe.conversion.attention import convert_attention, heads_as_stored
from llamamoe.conversion.layer import convert_layer, layer_context
from tests.dense import make_dense

from .test_calibrated import CPU, _ids_of, recipe, text_of, write_text

BLOCK = "model.layers.1.self_attention.experts."


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 query heads over 2 key/value heads."""
    folder = make_dense(tmp_path_factory.mktemp("attention") / "dense", num_attention_heads=8)
    write_text(folder.with_name("text.txt"))
    return folder


def convert(dense: Path, out: Path, **given: Any) -> llamamoe.SplitResult:
    sizes = {"target": "jetmoe", "shared": 0, "calibration_tokens": 1200}
    return llamamoe.split(dense, out, recipe(dense, **sizes, **given), verify=False)


@pytest.fixture(scope="module")
def fitted(dense: Path) -> llamamoe.SplitResult:
    return convert(dense, dense.with_name("fitted"))


def walk_logits(plan: Any, ids: Any) -> torch.Tensor:
    """The converted model as the walk sees it, with the parent's final norm and head after it."""
    walk = Walk(plan.model, text_of(ids), CPU, weights_dtype=torch_dtype(plan.dtype))
    walk.start()
    for layer in range(plan.model.spec.num_layers):
        found: list[Any] = []

        def attention(text: Any, layer: int = layer, found: list[Any] = found) -> Any:
            found.append(convert_attention(plan, layer, layer_context(plan, layer), text))
            return heads_as_stored(plan, found[0].heads)

        inputs = walk.enter(layer, attention)
        moe = convert_layer(plan, layer, inputs, attention=found[0]).moe
        assert moe is not None
        walk.leave(layer, moe.outputs(inputs))
    dtype = torch_dtype(plan.dtype)
    whole = AutoModelForCausalLM.from_pretrained(plan.model.checkpoint.path, dtype=dtype).float()
    with torch.no_grad():
        return whole.lm_head(whole.model.norm(walk.buffers[plan.model.spec.num_layers % 2]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_computes_what_the_walk_computed(dense: Path, tmp_path: Path, dtype: str) -> None:
    """With a soft router, whose experts do not tie; in bfloat16 for a parent whose norms have the target's epsilon."""
    source = dense
    if dtype == "bfloat16":
        source = make_dense(tmp_path / "dense", num_attention_heads=8, rms_norm_eps=1e-6)
        write_text(tmp_path / "text.txt")
    result = convert(source, tmp_path / "out", router_scale="soft", dtype=dtype)
    ids = _ids_of(result, source)
    with torch.no_grad():
        have = AutoModelForCausalLM.from_pretrained(result.out).float()(torch.from_numpy(ids)).logits
    want = walk_logits(result.plan, ids)
    error = (have - want).abs().amax(-1) / want.abs().max()
    assert float(error.quantile(0.95)) < 1e-4, "a router's logits may tie after rounding in a few tokens"


def test_router_and_repair_lower_the_error(dense: Path, tmp_path: Path, fitted: llamamoe.SplitResult) -> None:
    told = fitted.receipt["layers"]
    assert all(each["attention_error"] < each["attention_error_before_repair"] for each in told)
    quality = [each["attention_router_quality"] for each in told]
    assert all(each["recall_at_k"] > each["chance_recall"] + 0.1 for each in quality)
    random = convert(dense, tmp_path / "random", router="random").receipt["layers"]
    for key in ("attention_error", "attention_error_before_repair"):
        assert told[0][key] < 0.95 * random[0][key]


def test_a_repair_changes_the_output_only(dense: Path, fitted: llamamoe.SplitResult) -> None:
    exact = llamamoe.split(dense, dense.with_name("exact"), recipe(dense, target="jetmoe", shared=0, method="random",
        router="random", repair="none", calibration=()), verify=False)  # fmt: skip
    ours, theirs = (load_file(each.out / "model.safetensors") for each in (fitted, exact))
    assert torch.equal(ours[BLOCK + "input_linear.weight"], theirs[BLOCK + "input_linear.weight"])
    assert not torch.equal(ours[BLOCK + "output_linear.weight"], theirs[BLOCK + "output_linear.weight"])
    told = llamamoe.verify(fitted.out, dense)
    assert told.passed
    assert told.equal_weights is None


def test_a_stopped_run_continues_with_the_same_bytes(dense: Path, tmp_path: Path, fitted: llamamoe.SplitResult) -> None:
    def stop(step: Any) -> None:
        if step.stage == "convert" and step.done == 1:
            raise KeyboardInterrupt

    given = recipe(dense, target="jetmoe", shared=0, calibration_tokens=1200)
    with pytest.raises(KeyboardInterrupt):
        llamamoe.split(dense, tmp_path / "out", given, verify=False, progress=stop)
    out = llamamoe.split(dense, tmp_path / "out", given, verify=False, resume=True).out
    assert (out / "model.safetensors").read_bytes() == (fitted.out / "model.safetensors").read_bytes()
