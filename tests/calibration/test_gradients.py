"""The streamed gradient pass against autograd on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.calibration.gradients import DONE_FILE, ffn_gradients
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.errors import LlamaMoeError
from llamamoe.models import loading
from llamamoe.models.streaming import LayerRunner
from llamamoe.progress import Progress
from tests.dense import VARIANTS, make_dense

IDS = torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> DenseModel:
    return understand(open_checkpoint(locate(str(folder))))


def by_autograd(
    folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], float]:
    """Per layer [T, H], and the mean loss, of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(input_ids=ids, use_cache=False).logits
    predicted = (
        logits[:, :-1].to(torch.promote_types(dtype, torch.float32)).log_softmax(-1).gather(-1, ids[:, 1:, None])
    )
    gradients = torch.autograd.grad(-predicted.sum(), outputs)
    return [gradient.flatten(0, 1) for gradient in gradients], -float(predicted.detach().mean())


def difference(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have.double() - want).norm() / want.norm())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("gradients") / "dense", num_hidden_layers=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_autograd_on_the_whole_model(variant, tmp_path):
    folder = make_dense(tmp_path / "dense", variant)
    want, loss = by_autograd(folder, IDS)
    store = ffn_gradients(opened(folder), IDS, folder=tmp_path / "gradients", batch_sequences=2)
    assert store.loss == pytest.approx(loss, rel=1e-5)
    for layer, expected in enumerate(want):
        have = store.read(layer)
        assert have.shape == (IDS.numel(), 64)
        assert difference(have, expected) < 2e-5


def test_nothing_depends_on_batches(dense, tmp_path, monkeypatch):
    one = ffn_gradients(opened(dense), IDS, folder=tmp_path / "one", batch_sequences=1)
    asked = []
    logits = LayerRunner.logits
    monkeypatch.setattr(LayerRunner, "logits", lambda self, h: asked.append(len(h)) or logits(self, h))
    monkeypatch.setattr(loading, "LOGITS_AT_ONCE", 128 * 7)
    many = ffn_gradients(opened(dense), IDS, folder=tmp_path / "many", batch_sequences=4)
    assert max(asked) == 7
    assert sum(asked) == 5 * 11
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    for layer in range(3):
        assert difference(one.read(layer), many.read(layer).double()) < 1e-5


def test_tokens_keep_their_order(dense, tmp_path):
    """A sequence's gradients are its own, wherever it stands; the last token of each predicts nothing."""
    plain = ffn_gradients(opened(dense), IDS, folder=tmp_path / "plain")
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = ffn_gradients(opened(dense), IDS[order], folder=tmp_path / "moved")
    for layer in range(3):
        expected = plain.read(layer).view(5, 12, -1)[order].flatten(0, 1)
        assert difference(moved.read(layer), expected.double()) < 1e-5
    assert (plain.read(2).view(5, 12, -1)[:, -1] == 0).all()


def test_one_layer_in_memory(dense, tmp_path, monkeypatch):
    run = LayerRunner.run
    seen = []

    def counted(self, index, module, hidden):
        here = [i for i, layer in enumerate(self._model.model.layers) if not all(p.is_meta for p in layer.parameters())]
        seen.append((index, here))
        return run(self, index, module, hidden)

    monkeypatch.setattr(LayerRunner, "run", counted)
    ffn_gradients(opened(dense), IDS, folder=tmp_path / "gradients", batch_sequences=5)
    assert seen == [(i, [i]) for i in (0, 1, 2, 2, 1, 0)]


def test_bfloat16_is_that_of_the_whole_model_and_takes_half_the_room(dense, tmp_path):
    want = by_autograd(dense, IDS, torch.bfloat16)[0]
    store = ffn_gradients(opened(dense), IDS, folder=tmp_path / "gradients", compute_dtype=torch.bfloat16)
    assert store.read(0).dtype == torch.bfloat16
    assert store.path(0).stat().st_size == IDS.numel() * 64 * 2
    assert all(difference(store.read(layer), want[layer].double()) < 0.01 for layer in range(3))


def test_a_finished_result_is_used_again_and_no_other(dense, tmp_path):
    folder = tmp_path / "gradients"
    steps: list[Progress] = []

    def again(ids: torch.Tensor = IDS, **options: object) -> int:
        steps.clear()
        ffn_gradients(opened(dense), ids, folder=folder, progress=steps.append, **options)
        return len(steps)

    assert again() == 6
    assert sorted(path.name for path in folder.iterdir()) == [*(f"gradients.{i}.bin" for i in range(3)), DONE_FILE]
    assert again() == 0
    assert again(compute_dtype=torch.bfloat16) == 6
    assert again(IDS.flip(0)) == 6
    (folder / "gradients.1.bin").write_bytes(b"")
    assert again(IDS.flip(0)) == 6
    (folder / DONE_FILE).write_text("[]")
    assert again(IDS.flip(0)) == 6
    store = ffn_gradients(opened(dense), IDS.flip(0), folder=folder)
    (folder / "of the user").write_text("")
    store.remove()
    assert [path.name for path in folder.iterdir()] == ["of the user"]


@pytest.mark.parametrize("stop", ["gradients: forward", "gradients: backward"])
def test_layer_files_are_whole_or_absent_after_a_stop(stop, dense, tmp_path):
    want = by_autograd(dense, IDS)[0]
    folder = tmp_path / "gradients"

    def interrupt(step: Progress) -> None:
        if step.stage == stop and step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ffn_gradients(opened(dense), IDS, folder=folder, progress=interrupt)
    assert not (folder / DONE_FILE).exists()
    whole = sorted(path.name for path in folder.glob("gradients.*.bin"))
    assert whole == ([] if stop == "gradients: forward" else ["gradients.1.bin", "gradients.2.bin"])
    store = ffn_gradients(opened(dense), IDS, folder=folder)
    assert all(difference(store.read(layer), want[layer]) < 2e-5 for layer in range(3))


def test_values_that_are_not_finite_name_the_layer(dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((dense / "config.json").read_text())
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlamaMoeError, match=r"after layer 1 .* NaN"):
        ffn_gradients(opened(broken), IDS, folder=tmp_path / "gradients")
    assert not list((tmp_path / "gradients").glob("gradients.*"))


@pytest.mark.parametrize("ids", [IDS[0], IDS[:, :1], IDS[:0], IDS + 100, IDS - 100])
def test_refuses_ids_that_are_no_text(ids, dense, tmp_path):
    with pytest.raises(ValueError, match=r"sequences|token ids"):
        ffn_gradients(opened(dense), ids, folder=tmp_path / "gradients")


def test_a_resumed_conversion_uses_its_gradients_again(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(32 + i * i % 90) for i in range(700)))
    given = {
        "method": {"name": "gradient", "overlap": "inter"},
        "num_experts": 4,
        "top_k": 2,
        "shared": "1x",
        "target": "qwen2_moe",
        "calibration": [str(text)],
        "calibration_tokens": 640,
        "calibration_length": 32,
    }
    recipe = llamamoe.load_recipe(given=given)
    stages: list[str] = []

    def stop(step: Progress) -> None:
        stages.append(step.stage)
        if step.stage == "convert" and step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llamamoe.split(dense, tmp_path / "out", recipe, progress=stop)
    assert "gradients: backward" in stages
    stages.clear()
    out = llamamoe.split(dense, tmp_path / "out", recipe, resume=True, progress=lambda s: stages.append(s.stage)).out
    assert "gradients: forward" not in stages
    whole = llamamoe.split(dense, tmp_path / "whole", recipe)
    assert whole.plan.parity == "exact"
    assert whole.receipt["verification"]["equal_weights"] < 1e-5
    assert (out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
    assert not list(out.glob("**/gradients*"))
