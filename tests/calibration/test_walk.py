"""The walk: the hidden states of transformers' own dense model, layer by layer, and after it those of the written file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.calibration.compute import Compute
from llamamoe.calibration.text import CalibrationText
from llamamoe.calibration.walk import Walk, read_ffn
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.errors import LlamaMoeError
from llamamoe.methods.moe_layer import dense_outputs
from tests.dense import VARIANTS, make_dense

CPU = Compute(torch.device("cpu"), torch.float32)
SEQUENCES, LENGTH = 5, 24


def open_model(folder: Path) -> DenseModel:
    return understand(open_checkpoint(locate(folder)))


def make_text(sequences: int = SEQUENCES, length: int = LENGTH) -> CalibrationText:
    ids = np.random.default_rng(0).integers(3, 128, (sequences, length))
    return CalibrationText(ids, ("a",) * sequences, np.arange(sequences) % 2, {}, ())


def walk(model: DenseModel, text: CalibrationText, **keys: Any) -> Walk:
    found = Walk(model, text, keys.pop("compute", CPU), weights_dtype=torch.float32, **keys)
    found.start()
    return found


def dense_walk(walking: Walk) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(FFN input, residual scale) of every layer, with no layer converted."""
    for layer in range(walking.model.spec.num_layers):
        inputs = walking.enter(layer)
        yield inputs.x_TH.clone(), inputs.residual_scale_T.clone()
        walking.leave(layer, dense_outputs(inputs, read_ffn(walking.model, layer)))


def reference(
    folder: Path, ids: np.ndarray, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """FFN inputs, what the next norm reads, and the last hidden state, as forward hooks see them in the whole model.

    The next norm reads the output of the layer, or that of the FFN where norms follow it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    seen: list[torch.Tensor] = []
    residuals: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        normed = layer.mlp if hasattr(layer, "post_feedforward_layernorm") else layer
        normed.register_forward_hook(
            lambda _, args, out: residuals.append((out[0] if isinstance(out, tuple) else out).flatten(0, 1))
        )
    model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids), use_cache=False)
    return seen, residuals, last[0]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_without_conversion_the_walk_is_the_dense_model(variant: str, tmp_path: Path) -> None:
    text = make_text(3, 40 if "window" in variant or "longrope" in variant else LENGTH)
    folder = make_dense(
        tmp_path / "dense", variant, **({} if "layer_types" in VARIANTS[variant] else {"num_hidden_layers": 3})
    )
    seen, residuals, last = reference(folder, text.ids_ST)
    walking = walk(open_model(folder), text, batch_tokens=50)
    for (x, scale), want, residual in zip(dense_walk(walking), seen, residuals, strict=True):
        torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)
        if variant.startswith("cohere"):  # LayerNorms subtract the mean
            residual = residual - residual.mean(-1, keepdim=True)
        torch.testing.assert_close(scale, residual.square().mean(-1).sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(walking.buffers[len(seen) % 2].flatten(0, 1), last, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("walk") / "dense", num_hidden_layers=3)


@pytest.mark.parametrize("batch_tokens", [1, LENGTH, 3 * LENGTH, 10_000])
def test_the_batch_size_changes_nothing_but_rounding(dense: Path, batch_tokens: int) -> None:
    model, text = open_model(dense), make_text()
    exact = reference(dense, text.ids_ST, torch.float64)[0]

    def distance(**keys: Any) -> float:
        """Largest distance from float64 in any layer: how much rounding there is depends on the processor's kernels."""
        pairs = zip(dense_walk(walk(model, text, **keys)), exact, strict=True)
        return max(float((x.double() - want).abs().max()) for (x, _), want in pairs)

    assert distance(batch_tokens=batch_tokens) <= 2 * distance() < 1e-4


def test_states_in_files_are_the_same_as_in_memory(dense: Path, tmp_path: Path) -> None:
    model, text = open_model(dense), make_text()
    mapped = walk(model, text, folder=tmp_path, map_inputs=True)
    pairs = zip(dense_walk(mapped), dense_walk(walk(model, text)), strict=True)
    assert all(torch.equal(x, y) for (x, _), (y, _) in pairs)
    size = text.num_tokens * 64 * 4
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == dict.fromkeys(
        ("residual.0", "residual.1", "inputs"), size
    )


def test_a_file_of_another_size_is_not_taken(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "residual.0").write_bytes(b"x" * 10)
    model, text = open_model(dense), make_text()
    pairs = zip(dense_walk(walk(model, text, folder=tmp_path)), dense_walk(walk(model, text)), strict=True)
    assert all(torch.equal(x, y) for (x, _), (y, _) in pairs)


def test_weights_are_rounded_as_they_will_be_stored(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    text = make_text()
    want = [x for x, _ in dense_walk(walk(open_model(tmp_path / "half"), text))]
    rounded = Walk(open_model(dense), text, CPU, weights_dtype=torch.bfloat16)
    rounded.start()
    torch.testing.assert_close(rounded.enter(0).x_TH, want[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_products_keep_a_float32_residual_stream(dense: Path) -> None:
    model, text = open_model(dense), make_text()
    half = walk(model, text, compute=Compute(torch.device("cpu"), torch.bfloat16))
    exact = walk(model, text)
    assert torch.equal(half.buffers[0], exact.buffers[0])
    inputs, want = half.enter(0), exact.enter(0)
    assert inputs.x_TH.dtype == torch.bfloat16
    error = (half.buffers[1] - exact.buffers[1]).norm() / exact.buffers[1].norm()
    assert 0 < error < 0.02, "attention is rounded"
    torch.testing.assert_close(inputs.x_TH.float(), want.x_TH, rtol=0.1, atol=0.1)
    before = half.buffers[1].clone()
    half.leave(0, dense_outputs(inputs, read_ffn(model, 0)))
    change = half.buffers[1] - before
    assert half.buffers[1].dtype == torch.float32
    assert not torch.equal(change, change.to(torch.bfloat16).float()), "not added up in 16 bits"


def test_tokens_know_the_cluster_of_their_sequence(dense: Path) -> None:
    clusters = walk(open_model(dense), make_text()).enter(0).clusters_T
    assert clusters is not None
    assert clusters.tolist() == [i % 2 for i in range(SEQUENCES) for _ in range(LENGTH)]


@pytest.mark.parametrize(("name", "part"), [("self_attn.q_proj", "attention"), ("mlp.down_proj", "FFN")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(tmp_path: Path, name: str, part: str, value: float) -> None:
    folder = make_dense(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{name}.weight")[0] = value
    model.save_pretrained(folder)
    with pytest.raises(LlamaMoeError, match=f"layer 1: the {part}'s output on the calibration text"):
        list(dense_walk(walk(open_model(folder), make_text())))


def test_only_one_decoder_layer_has_weights_at_a_time(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walking = walk(open_model(dense), make_text())
    layers = walking._runner._model.model.layers
    real, held = walking._runner.run, []

    def run(*args: Any) -> Any:
        held.append([i for i, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())])
        assert all(p.is_meta for p in layers[args[0]].mlp.parameters()), "the FFN is not needed here"
        return real(*args)

    monkeypatch.setattr(walking._runner, "run", run)
    list(dense_walk(walking))
    assert held == [[0], [1], [2]]
    assert all(p.is_meta for layer in layers for p in layer.parameters())
