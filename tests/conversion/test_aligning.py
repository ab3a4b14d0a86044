"""`split` with alignment: the files hold what was learned, a stopped run goes on, and what cannot be learned is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.alignment.recipe import AlignmentOptions
from llamamoe.checkpoint.files import save_tensors
from llamamoe.conversion.split import plan_conversion
from llamamoe.conversion.texts import make_text
from llamamoe.errors import LlamaMoeError, RefusedError
from llamamoe.progress import Progress, ignore_progress
from tests.dense import make_dense

from .test_calibrated import CPU, write_text

LENGTH, TOKENS = 30, 3000


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dense(tmp_path_factory.mktemp("aligning") / "dense", num_hidden_layers=3)
    write_text(folder.with_name("text.txt"), words=1000)
    return folder


def recipe(dense: Path, align: dict[str, Any] | None = None, **given: Any) -> llamamoe.SplitRecipe:
    base = {
        "num_experts": 4, "top_k": 2, "method": "cluster_shared", "shared": 40, "shared_by": "power", "router": "ridge",
        "repair": "none", "calibration": [str(dense.with_name("text.txt"))], "calibration_tokens": 600,
        "calibration_length": LENGTH, "device": "cpu",
        "align": {"tokens": TOKENS, "length": LENGTH, "batch": 60, "refresh": 2, "lr_router": 0.02, "lr_weights": 0.003, "lr_assignment": 1.0} | (align or {}),
    }  # fmt: skip
    return llamamoe.load_recipe(given=base | given)


def divergence(out: Path, dense: Path, ids: np.ndarray) -> float:
    """Mean KL of the files to the parent, both as plain transformers loads them."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (dense, out)]
    with torch.no_grad():
        p, q = (m(torch.from_numpy(ids)).logits.log_softmax(-1).double() for m in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("weights", "keys"),
    [
        ("frozen", {}),
        ("frozen", {"target": "mixtral", "shared": 0}),
        ("scales", {"target": "granitemoeshared"}),
        ("ffn", {"repair": "least_squares"}),
        ("ffn", {"target": "glm4_moe", "shared": "1x", "keep_dense": [0]}),
        ("scales", {"method": "static", "shared": 0.5}),
    ],
)
def test_the_files_compute_what_was_measured(weights: str, keys: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    """The receipt's KL on held-out text is that of the checkpoint in plain transformers."""
    chosen = recipe(dense, {"weights": weights}, **keys)
    result = llamamoe.split(dense, tmp_path / "out", chosen)
    facts = result.receipt["alignment"]
    plan = plan_conversion(dense, chosen)
    ids = make_text(plan, CPU, ignore_progress, num_tokens=TOKENS, length=LENGTH).ids_ST
    kept = min(each["kl"] for each in facts["held_out_kl"])
    if keys.get("target") != "mixtral":  # there it may be the start
        assert kept < facts["held_out_kl"][0]["kl"]
    held_out = ids[: facts["held_out_tokens"] // LENGTH]
    assert divergence(result.out, dense, held_out) == pytest.approx(kept, rel=2e-3)
    assert set(map(int, facts["moved_neurons"])) == set(range(3)) - set(result.plan.layout.dense_layers)


def test_frozen_weights_keep_every_promise_of_split(dense: Path, tmp_path: Path) -> None:
    result = llamamoe.split(dense, tmp_path / "out", recipe(dense, {"weights": "frozen"}))
    assert result.receipt["plan"]["parity"] == "exact"
    assert result.receipt["verification"]["kept"] == "neurons"
    written = load_file(result.out / "model.safetensors")
    rows = {tuple(row.tolist()) for name, t in written.items() if "experts.0.gate" in name for row in t}
    parent = load_file(dense / "model.safetensors")
    assert rows - {tuple([0.0] * 64)} <= {
        tuple(row.tolist()) for i in range(3) for row in parent[f"model.layers.{i}.mlp.gate_proj.weight"]
    }


def test_repair_comes_after_frozen_weights_and_before_learned_ones(dense: Path, tmp_path: Path) -> None:
    after = llamamoe.split(dense, tmp_path / "a", recipe(dense, {"weights": "frozen"}, repair="least_squares"))
    assert all("repair_passes" in layer for layer in after.receipt["layers"])
    assert all(layer["parity_before_repair"] < 1e-5 for layer in after.receipt["layers"])
    before = llamamoe.split(dense, tmp_path / "b", recipe(dense, {"weights": "ffn"}, repair="least_squares"))
    assert not any("repair_passes" in layer for layer in before.receipt["layers"])
    plain = llamamoe.split(dense, tmp_path / "c", recipe(dense, {"weights": "ffn"}))
    first = [each.receipt["alignment"]["held_out_kl"][0]["kl"] for each in (before, plain)]
    assert first[0] != first[1]


class _StopError(Exception):
    pass


def stop_in(stage: str, done: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.stage == stage and progress.done == done:
            raise _StopError

    return report


def digest(folder: Path) -> dict[str, str]:
    kept = (path for path in sorted(folder.iterdir()) if path.name != "llamamoe_receipt.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.mark.parametrize(("stage", "done"), [("first layers", 2), ("align", 1), ("align", 9), ("convert", 3)])
def test_a_stopped_run_goes_on_with_the_same_bytes(
    stage: str, done: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamamoe.alignment.align.SECONDS_BETWEEN_STATES", -1.0)
    chosen = recipe(dense, {"weights": "ffn"}, repair="least_squares")
    whole = llamamoe.split(dense, tmp_path / "whole", chosen)
    with pytest.raises(_StopError):
        llamamoe.split(dense, tmp_path / "out", chosen, progress=stop_in(stage, done))
    seen: list[Progress] = []
    again = llamamoe.split(dense, tmp_path / "out", chosen, resume=True, progress=seen.append)
    assert digest(whole.out) == digest(again.out)
    assert whole.receipt["alignment"] == again.receipt["alignment"]
    steps = [each.done for each in seen if each.stage == "align"]
    assert steps[:1] == ([done] if stage == "align" else [] if stage == "convert" else [1])
    assert not (tmp_path / "out.partial").exists()


def test_the_partition_is_other_than_the_start(dense: Path, tmp_path: Path) -> None:
    """Alignment changes the bytes of the experts, not only the receipt."""
    outs = [
        llamamoe.split(dense, tmp_path / name, chosen).out / "model.safetensors"
        for name, chosen in (
            ("start", recipe(dense).model_copy(update={"align": None})),
            ("aligned", recipe(dense, {"weights": "frozen"})),
        )
    ]
    before, after = map(load_file, outs)
    experts = [name for name in before if ".experts." in name and "gate_proj" in name]
    assert experts
    assert any(not torch.equal(before[name], after[name]) for name in experts)
    routers = [name for name in before if name.endswith("mlp.gate.weight")]
    assert all(not torch.equal(before[name], after[name]) for name in routers)


SHORT = {"tokens": 1024, "batch": 120, "checks": 2}
FILES = ["starts.safetensors", "starts.sha256", "state.safetensors", "state.sha256", "ids.npy", "text.json"]


@pytest.mark.parametrize(("file", "damage"), [*((file, "bytes") for file in FILES), ("state.sha256", "gone")])
def test_lost_states_are_computed_again(
    file: str, damage: str, dense: Path, whole: llamamoe.SplitResult, stopped: Path
) -> None:
    path = stopped.with_name("out.partial") / ".calibration" / "alignment" / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    again = llamamoe.split(dense, stopped, recipe(dense, SHORT), resume=True)
    assert digest(again.out) == digest(whole.out)
    assert again.receipt["alignment"] == whole.receipt["alignment"]


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> llamamoe.SplitResult:
    return llamamoe.split(dense, tmp_path_factory.mktemp("whole") / "whole", recipe(dense, SHORT))


@pytest.fixture
def stopped(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT of a run that was stopped in the middle of the alignment."""
    monkeypatch.setattr("llamamoe.alignment.align.SECONDS_BETWEEN_STATES", -1.0)
    with pytest.raises(_StopError):
        llamamoe.split(dense, tmp_path / "out", recipe(dense, SHORT), progress=stop_in("align", 5))
    names = {path.name for path in (tmp_path / "out.partial" / ".calibration" / "alignment").iterdir()}
    assert set(FILES) <= names
    return tmp_path / "out"


def test_the_text_of_the_stopped_run_is_gone_on_with(
    dense: Path, whole: llamamoe.SplitResult, stopped: Path, tmp_path: Path
) -> None:
    """Also where its files are others now; without what was kept of it, that is refused."""
    kept = Path(shutil.copytree(stopped.with_name("out.partial"), tmp_path / "kept"))
    text = dense.with_name("text.txt")
    was = text.read_text()
    try:
        text.write_text(was[: len(was) // 2] + was)
        assert digest(llamamoe.split(dense, stopped, recipe(dense, SHORT), resume=True).out) == digest(whole.out)
        shutil.rmtree(stopped)
        kept.rename(stopped.with_name("out.partial"))
        (stopped.with_name("out.partial") / ".calibration" / "alignment" / "ids.npy").unlink()
        with pytest.raises(RefusedError, match="text differs from the one that the stopped run began with"):
            llamamoe.split(dense, stopped, recipe(dense, SHORT), resume=True)
    finally:
        text.write_text(was)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent that takes long sequences, and text for one of them."""
    folder = make_dense(tmp_path_factory.mktemp("long") / "dense", max_position_embeddings=1024)
    write_text(folder.with_name("text.txt"), words=80)
    return folder


def test_too_little_text_is_refused_before_anything_is_written(long: Path, tmp_path: Path) -> None:
    chosen = recipe(long, {"length": 260})
    assert (
        make_text(plan_conversion(long, chosen), CPU, ignore_progress, num_tokens=TOKENS, length=260).num_tokens == 260
    )
    with pytest.raises(LlamaMoeError, match=r"(?s)1 sequence of 260 tokens, which is held out.*align\.length"):
        llamamoe.split(long, tmp_path / "out", chosen)
    assert not list(tmp_path.iterdir())


def test_strict_refuses_what_alignment_would_warn_of(long: Path, dense: Path, tmp_path: Path) -> None:
    """The text is enough to calibrate on, and not to align on."""
    chosen = recipe(dense, {"tokens": 2**20}, strict=True)
    with pytest.raises(RefusedError, match=r"--strict refuses: .* of the 1048576 tokens asked for"):
        llamamoe.split(dense, tmp_path / "out", chosen)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "upcycle"}, "a neuron is in several experts"),
        ({"router_scale": "soft"}, "--router-scale soft weights them by their logits"),
        (
            {"align": {"weights": "scales", "lr_scale": 0, "lr_assignment": 0, "lr_router": 0}},
            "would learn nothing: .*scales trains",
        ),
        (
            {"method": "static", "shared": 0.5, "align": {"weights": "frozen", "lr_assignment": 0}},
            "would learn nothing: .*frozen trains, are all 0",
        ),
        ({"align": {"length": 65}}, r"align\.length 65 is more than the model's 64 positions"),
        ({"calibration": []}, "calibration text is needed by .*--align-tokens"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_the_plan(keys: dict[str, Any], message: str, dense: Path) -> None:
    align = keys.pop("align", None)
    with pytest.raises(RefusedError, match=message):
        plan_conversion(dense, recipe(dense, align, **keys))


def test_fewer_tokens_than_two_sequences_are_refused_in_the_plan(long: Path) -> None:
    with pytest.raises(RefusedError, match=r"--align-tokens 1024 makes one sequence of 600 tokens, but two are needed"):
        plan_conversion(long, recipe(long, {"tokens": 1024, "length": 600}))


def test_the_plan_counts_its_cost(dense: Path) -> None:
    plans = [plan_conversion(dense, recipe(dense, {"weights": w})).alignment for w in ("frozen", "scales", "ffn")]
    frozen, scales, ffn = (plan for plan in plans if plan is not None)
    assert scales.learned - frozen.learned == 3 * 172
    assert ffn.learned - frozen.learned == 3 * 3 * 172 * 64
    assert frozen.flops == scales.flops < ffn.flops
    assert json.loads(json.dumps(ffn.to_json()))["tokens"] == TOKENS


@pytest.mark.parametrize("weights", ["frozen", "ffn"])
def test_the_plan_counts_its_files(weights: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is written beside the last one, and the start is there as long."""
    largest = 0

    def measure(path: Path, *args: Any) -> None:
        nonlocal largest
        before = sum(each.stat().st_size for each in path.parent.iterdir() if each.suffix == ".safetensors")
        save_tensors(path, *args)
        largest = max(largest, before + path.stat().st_size)

    monkeypatch.setattr("llamamoe.alignment.states.save_tensors", measure)
    monkeypatch.setattr("llamamoe.alignment.align.SECONDS_BETWEEN_STATES", -1.0)
    chosen = recipe(dense, {"weights": weights, "tokens": 1024, "checks": 1}, repair="least_squares")
    plan = llamamoe.split(dense, tmp_path / "out", chosen, verify=False).plan
    assert plan.alignment is not None
    assert largest <= plan.alignment.state_bytes < 1.3 * largest


def test_options_are_refused_with_their_names() -> None:
    with pytest.raises(ValueError, match="reach"):
        AlignmentOptions(reach=-1)
    with pytest.raises(LlamaMoeError, match=r"align\.wieghts: unknown key. Did you mean"):
        llamamoe.load_recipe(given={"align": {"wieghts": "ffn"}})


def test_memory_is_planned_for_float32_unless_bfloat16_is_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor bfloat16 may turn out to be the slower dtype; then nothing must need more than was planned."""
    monkeypatch.setattr("llamamoe.conversion.preflight.check_device", lambda name: None)  # as if there were a GPU
    source = make_dense(tmp_path / "dense", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text("some text " * 30)

    def planned(**given: Any) -> int:
        plan = plan_conversion(source, recipe(source, None, **given))
        assert plan.alignment is not None
        return plan.alignment.peak_bytes

    assert planned(device="auto") == planned(device="cpu") == planned(compute_dtype="float32")
    assert planned(device="cuda") == planned(device="auto", compute_dtype="bfloat16") < planned(device="auto")
