"""Conversions that look at text: the files hold what the walk computed, and receipts tell what repair changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.calibration.compute import Compute, choose_compute
from llamamoe.calibration.text import CalibrationText
from llamamoe.calibration.walk import Walk, cast_ffn, read_ffn
from llamamoe.checkpoint.tensors import torch_dtype
from llamamoe.conversion.layer import convert_layer, output_errors
from llamamoe.errors import LlamaMoeError, RefusedError
from llamamoe.methods.layer import ExpertWeights, FfnWeights, LayerContext
from llamamoe.methods.moe_layer import ConvertedFfn, dense_outputs
from llamamoe.methods.repairs import REPAIRS
from llamamoe.methods.repairs.base import Repair
from llamamoe.methods.router_scale import HARD_LOGIT
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.routers.centroid import Centroid
from llamamoe.progress import Progress
from tests.dense import make_dense

CPU = Compute(torch.device("cpu"), torch.float32)
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "said", "nothing", "while", "it", "rained", "in", "May")


def write_text(path: Path, seed: int = 0, words: int = 400) -> Path:
    path.write_text(" ".join(np.random.default_rng(seed).choice(WORDS, words)))
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dense(tmp_path_factory.mktemp("calibrated") / "dense", num_hidden_layers=3)
    write_text(folder.with_name("text.txt"))
    return folder


def recipe(dense: Path, **given: Any) -> llamamoe.SplitRecipe:
    base = {
        "num_experts": 4, "top_k": 2, "method": "cluster_shared", "shared": 40, "shared_by": "power", "router": "ridge",
        "repair": "least_squares", "calibration": [str(dense.with_name("text.txt"))], "calibration_tokens": 600,
        "calibration_length": 30, "device": "cpu",
    }  # fmt: skip
    return llamamoe.load_recipe(given=base | given)


def text_of(ids: np.ndarray) -> CalibrationText:
    return CalibrationText(ids, ("a",) * len(ids), None, {}, ())


def walk_logits(plan: Any, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The converted model as the walk sees it, with final norm and head of the whole dense model after it.

    Returns:
        Logits ``[T, V]``, and bool ``[T]``: no router was undecided about this token or one before it in its sequence.
        A hard router's logits are so small that softmax in float32 rounds ranks k and k + 1 together where they are
        nearer than 1 % of the largest.
    """
    dtype = torch_dtype(plan.dtype)
    walk = Walk(plan.model, text_of(ids), CPU, weights_dtype=dtype)
    walk.start()
    decided = torch.ones(ids.shape, dtype=torch.bool)
    for layer in range(plan.model.spec.num_layers):
        inputs = walk.enter(layer)
        if layer in plan.layout.dense_layers:
            walk.leave(layer, dense_outputs(inputs, cast_ffn(read_ffn(plan.model, layer), dtype)))
        else:
            moe = convert_layer(plan, layer, inputs).moe
            assert moe is not None
            walk.leave(layer, moe.outputs(inputs))
            logits = inputs.x_TH @ moe.router_NH.T
            ranked = logits.sort(dim=1, descending=True).values
            gap = ranked[:, moe.top_k - 1] - ranked[:, moe.top_k]
            decided &= (gap > 0.01 * logits.abs().max()).view(ids.shape)
    whole = AutoModelForCausalLM.from_pretrained(plan.model.checkpoint.path, dtype=dtype).float()
    with torch.no_grad():
        logits = whole.lm_head(whole.model.norm(walk.buffers[plan.model.spec.num_layers % 2].flatten(0, 1)))
    return logits, decided.long().cumprod(1).bool().flatten()


def assert_same(plan: Any, folder: Path, ids: np.ndarray, tolerance: float) -> None:
    want, decided = walk_logits(plan, ids)
    have = file_logits(folder, ids)
    assert int(decided.sum()) > 0.1 * len(decided)
    error = (have - want).abs().amax(1) / want.abs().max()
    assert float(error[decided].max()) < tolerance


def file_logits(folder: Path, ids: np.ndarray) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.flatten(0, 1)


TARGETS = [("qwen2_moe", 40), ("mixtral", 0), ("glm4_moe", "1x"), ("granitemoeshared", 40)]


@pytest.mark.parametrize(("variant", "target"), [("olmo2", "flex_olmo"), ("smollm3", "granitemoe_swa")])
def test_the_walk_of_families_with_other_layers(tmp_path: Path, variant: str, target: str) -> None:
    """Norms after the FFN, and layers without rotary positions."""
    source = make_dense(tmp_path / "dense", variant, num_hidden_layers=3)
    write_text(tmp_path / "text.txt")
    given = recipe(source, target=target, shared=0, method="token_clusters")
    result = llamamoe.split(source, tmp_path / "out", given)
    assert result.receipt["verification"]["passed"]
    assert_same(result.plan, result.out, _ids_of(result, source), 2 * HARD_LOGIT)


def test_the_card_names_texts_without_the_folders_of_this_machine(dense: Path, tmp_path: Path) -> None:
    out = llamamoe.split(dense, tmp_path / "out", recipe(dense), verify=False).out
    card, written = (out / "README.md").read_text(), (out / "llamamoe_recipe.yaml").read_text()
    assert "- text.txt\n" in card
    assert str(dense.parent) not in card
    assert str(dense.parent) in written


@pytest.mark.parametrize("scale", ["hard", "soft"])
@pytest.mark.parametrize(
    ("target", "shared", "rescale"), [*((*each, None) for each in TARGETS), ("glm4_moe", "1x", "dropout")]
)
def test_the_file_computes_what_the_walk_computed(
    dense: Path,
    tmp_path: Path,
    target: str,
    shared: Any,
    rescale: str | None,
    scale: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``dropout`` lets glm4_moe renormalise its sigmoids, ``unit`` does not."""
    if scale == "soft":  # rows of order 1, for logits that differ visibly
        monkeypatch.setattr(ROUTERS.get("ridge"), "_fit", lambda self, scores, context: _soft_rows(context))
    given = recipe(dense, target=target, shared=shared, router_scale=scale, rescale=rescale)
    result = llamamoe.split(dense, tmp_path / "out", given, verify=False)
    assert_same(result.plan, result.out, _ids_of(result, dense), 2 * HARD_LOGIT if scale == "hard" else 1e-4)


def _soft_rows(context: LayerContext) -> torch.Tensor:
    rng = context.rng("soft")
    return torch.from_numpy(rng.normal(size=(context.num_experts, context.inputs.x_TH.shape[1]))).float()


def _ids_of(result: llamamoe.SplitResult, dense: Path) -> np.ndarray:
    """The calibration tokens again, checked against the receipt's hash."""
    from transformers import AutoTokenizer

    from llamamoe.calibration.text import calibration_text

    given = result.plan.recipe
    text = calibration_text(
        given.calibration, AutoTokenizer.from_pretrained(dense), num_tokens=given.calibration_tokens,
        length=given.calibration_length or 0, weights=None, seed=given.seed, vocab_size=128,
    )  # fmt: skip
    assert text.facts["sha256_of_ids"] == result.receipt["calibration"]["sha256_of_ids"]
    return text.ids_ST


@pytest.mark.parametrize(("target", "shared"), TARGETS[:2])
def test_what_feeds_the_next_layer_is_rounded_as_stored(dense: Path, tmp_path: Path, target: str, shared: Any) -> None:
    given = recipe(dense, target=target, shared=shared, dtype="bfloat16", num_experts=3, keep_dense=[])
    result = llamamoe.split(dense, tmp_path / "out", given, verify=False)
    assert_same(result.plan, result.out, _ids_of(result, dense), 2 * HARD_LOGIT)


def test_layers_kept_dense_are_walked_through(dense: Path, tmp_path: Path) -> None:
    result = llamamoe.split(dense, tmp_path / "out", recipe(dense, keep_dense=[1], target="qwen2_moe"))
    assert [layer["layer"] for layer in result.receipt["layers"]] == [0, 2]
    assert_same(result.plan, result.out, _ids_of(result, dense), 2 * HARD_LOGIT)


def test_the_receipt_says_what_was_read_and_what_repair_changed(dense: Path, tmp_path: Path) -> None:
    result = llamamoe.split(dense, tmp_path / "out", recipe(dense, repair_passes=2))
    receipt = result.receipt
    assert result.plan.parity == "none"
    assert "not exact, on purpose: the repair" in result.plan.exactness
    assert receipt["calibration"]["tokens"] == 600
    assert receipt["calibration"]["computed"] == {"device": "cpu", "compute_dtype": "float32"}
    assert len(receipt["calibration"]["sha256_of_ids"]) == 64
    assert receipt["plan"]["calibration"]["tokens"] == 600
    assert receipt["run"]["calibration"]["flops_per_second"] > 0
    for layer in receipt["layers"]:
        assert layer["parity_before_repair"] < 1e-5
        assert len(layer["repair_passes"]) == 2
        assert 0 < layer["output_error"] <= layer["output_error_before_repair"] < 1
        assert layer["output_error"] == min([layer["output_error_before_repair"], *layer["repair_passes"]])
        assert 0.5 < layer["router_quality"]["captured"] <= 1
        assert HARD_LOGIT / 4 < layer["router_largest_logit"] <= HARD_LOGIT
    assert not list(result.out.glob("*calibration*"))
    assert not list(result.out.glob(".*"))
    json.dumps(receipt, allow_nan=False)


def test_without_repair_the_conversion_stays_exact(dense: Path, tmp_path: Path) -> None:
    result = llamamoe.split(dense, tmp_path / "out", recipe(dense, repair="none"))
    assert result.plan.parity == "exact"
    assert result.receipt["verification"]["equal_weights"] < 1e-5
    assert result.receipt["verification"]["neurons_checked"] == 3
    assert all("output_error_before_repair" not in layer for layer in result.receipt["layers"])


class Harmful(Repair):
    """Makes everything worse."""

    name = "harmful"
    summary = "for a test"

    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """See `Repair.repair`."""
        return ExpertWeights(moe.weights.gate_PH, moe.weights.up_PH, moe.weights.down_HP * self.factor)

    factor = -3.0


@pytest.mark.parametrize("factor", [-3.0, float("nan")])
def test_a_repair_that_is_worse_than_none_is_not_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setitem(REPAIRS._found, "harmful", Harmful)
    monkeypatch.setattr(Harmful, "factor", factor)
    plain = llamamoe.split(dense, tmp_path / "plain", recipe(dense, repair="none"), verify=False)
    result = llamamoe.split(dense, tmp_path / "out", recipe(dense, repair="harmful"), verify=False)
    for layer in result.receipt["layers"]:
        assert layer["repair_pass_kept"] == 0
        assert layer["output_error"] == layer["output_error_before_repair"]
        assert "harmful did not reduce the error" in layer["repair_note"]
    assert result.receipt["weights_sha256"] == plain.receipt["weights_sha256"], "and the parent's bits are written"


class Turning(Centroid):
    """Remembers the layers that it was fitted to again."""

    name = "turning"
    refitted: list[float] = []  # noqa: RUF012

    def refit(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> torch.Tensor:
        """See `Router.refit`."""
        self.refitted.append(float((moe.weights.down_HP[:, : len(moe.partition.shared)]
                                    - ffn.down_HF[:, moe.partition.shared]).abs().max()))  # fmt: skip
        return moe.router_NH * 4.0


def test_between_passes_the_router_is_fitted_to_the_repaired_layer(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUTERS._found, "turning", Turning)
    Turning.refitted.clear()
    given = recipe(dense, router="turning", repair_passes=3)
    result = llamamoe.split(dense, tmp_path / "out", given, verify=False)
    assert len(Turning.refitted) == 2 * 3
    assert min(Turning.refitted) > 0, "the weights that it saw were repaired"
    assert all(HARD_LOGIT / 4 < layer["router_largest_logit"] <= HARD_LOGIT for layer in result.receipt["layers"])


def test_output_errors_are_what_they_say(dense: Path) -> None:
    plan = llamamoe.plan_conversion(dense, recipe(dense))
    ids = np.random.default_rng(1).integers(3, 128, (4, 20))
    walk = Walk(plan.model, text_of(ids), CPU, weights_dtype=torch.float32)
    walk.start()
    inputs = walk.enter(0)
    moe = convert_layer(plan, 0, inputs).moe
    assert moe is not None
    ffn = read_ffn(plan.model, 0)
    y = torch.cat(list(dense_outputs(inputs, ffn))).double()
    z = torch.cat(list(moe.outputs(inputs))).double()
    assert output_errors([moe, moe], ffn, inputs) == pytest.approx([float((y - z).norm() / y.norm())] * 2)
    size = inputs.residual_scale_T.double()[:, None]
    want = float(((y - z) / size).norm() / (y / size).norm())
    assert output_errors([moe], ffn, inputs, "residual") == pytest.approx([want])


def test_progress_tells_of_calibration_and_counts_to_its_end(dense: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    llamamoe.split(dense, tmp_path / "out", recipe(dense, calibration="auto"), progress=steps.append, verify=False)
    last = {step.stage: (step.done, step.total) for step in steps}
    assert set(last) == {"sample text", "convert"}
    assert all(done == total for done, total in last.values())


def test_text_sampled_from_the_source_needs_no_file(dense: Path, tmp_path: Path) -> None:
    one = llamamoe.split(dense, tmp_path / "one", recipe(dense, calibration="auto"), verify=False)
    two = llamamoe.split(dense, tmp_path / "two", recipe(dense, calibration="auto"), verify=False)
    assert one.receipt["calibration"]["source"] == "sampled from the parent"
    assert one.receipt["weights_sha256"] == two.receipt["weights_sha256"]
    other = llamamoe.split(dense, tmp_path / "three", recipe(dense, calibration="auto", seed=1), verify=False)
    assert other.receipt["weights_sha256"] != one.receipt["weights_sha256"]


@pytest.mark.parametrize(("name", "part"), [("self_attn.v_proj", "attention"), ("mlp.up_proj", None)])
def test_a_source_that_is_not_finite_is_refused_by_layer(tmp_path: Path, name: str, part: str | None) -> None:
    folder = make_dense(tmp_path / "dense")
    write_text(folder.with_name("text.txt"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.{name}.weight"][3] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlamaMoeError, match="layer 1"):
        llamamoe.split(folder, tmp_path / "out", recipe(folder))
    assert not (tmp_path / "out").exists()


def test_text_that_cannot_be_had_is_said_before_much_is_done(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(LlamaMoeError, match=r"nothing\.txt"):
        llamamoe.split(dense, tmp_path / "out", recipe(dense, calibration=str(tmp_path / "nothing.txt")))
    (tmp_path / "tiny.txt").write_text("a cat")
    with pytest.raises(LlamaMoeError, match=r"only .* tokens"):
        llamamoe.split(dense, tmp_path / "out2", recipe(dense, calibration=str(tmp_path / "tiny.txt")))


def test_a_source_without_tokenizer_cannot_be_calibrated(dense: Path, tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LlamaMoeError, match="source has no tokenizer"):
        llamamoe.split(folder, tmp_path / "out", recipe(dense))


@pytest.mark.parametrize(
    ("named", "source", "dtype"),
    [
        (None, "F32", torch.float32),
        ("bfloat16", "F32", torch.bfloat16),
        ("float32", "BF16", torch.float32),
    ],
)
def test_compute_dtype(named: str | None, source: str, dtype: torch.dtype) -> None:
    found = choose_compute("cpu", named, source)
    assert (found.device.type, found.dtype) == ("cpu", dtype)


@pytest.mark.parametrize(
    ("processor", "fast"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({"amx_bf16": False}, False),
    ],
)
def test_sixteen_bit_sources_are_multiplied_in_bfloat16_where_that_is_fast(
    processor: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert (choose_compute("cpu", None, "BF16").dtype == torch.bfloat16) == fast


def test_a_device_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(llamamoe.UsageError, match="the device 'cuda:77' is not available") as caught:
        choose_compute("cuda:77", None, "F32")
    assert "Use --device cpu" in str(caught.value)


def test_a_plan_refuses_cuda_where_it_cannot_be(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = llamamoe.load_recipe(given={"router": "ridge", "calibration": "auto", "device": "cuda"})
    monkeypatch.setattr("llamamoe.models.devices._has_driver", lambda: False)
    with pytest.raises(llamamoe.UsageError, match="the device 'cuda' is not available"):
        llamamoe.plan_conversion(dense, recipe)
    monkeypatch.setattr("llamamoe.models.devices._built_for", lambda kind: kind == "cuda")
    monkeypatch.setattr("llamamoe.models.devices._has_driver", lambda: True)
    assert llamamoe.plan_conversion(dense, recipe).calibration is not None


def test_a_plan_refuses_text_that_cannot_be_enough(dense: Path, tmp_path: Path) -> None:
    recipe = llamamoe.load_recipe(given={"router": "ridge", "calibration": [str(tmp_path)]})
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(llamamoe.UsageError, match="has only 0 bytes in 1 file; at least 256 tokens are needed"):
        llamamoe.plan_conversion(dense, recipe)
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b")  # whose size does not tell how much it holds
    assert llamamoe.plan_conversion(dense, recipe).calibration is not None


def test_conversion_in_bfloat16_products_is_near_that_in_float32(dense: Path, tmp_path: Path) -> None:
    exact = llamamoe.split(dense, tmp_path / "a", recipe(dense), verify=False).receipt["layers"]
    half = llamamoe.split(dense, tmp_path / "b", recipe(dense, compute_dtype="bfloat16"), verify=False).receipt
    assert half["calibration"]["computed"]["compute_dtype"] == "bfloat16"
    for one, two in zip(exact, half["layers"], strict=True):
        assert two["output_error"] == pytest.approx(one["output_error"], rel=0.2)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"", {}),
        (b"seven words that are far too few", {}),
        (b"\xff\xfe not a letter of UTF-8 " * 100, {}),
        (b"some words to look at. " * 100, {"calibration_weights": {"nowhere": 1.0}}),
    ],
)
def test_text_that_cannot_be_used_leaves_nothing(dense: Path, tmp_path: Path, content: bytes, keys: Any) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(LlamaMoeError):
        llamamoe.split(dense, tmp_path / "out", recipe(dense, calibration=str(tmp_path / "text.txt"), **keys))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_strict_refuses_what_the_text_is_warned_of_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words to look at. " * 20)  # less than is asked for
    given = recipe(dense, calibration=str(tmp_path / "text.txt"), calibration_tokens=4096, strict=True)
    with pytest.raises(RefusedError, match="--strict refuses"):
        llamamoe.split(dense, tmp_path / "out", given)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
