"""Measuring speeds: turns and ratios, shapes, models that are thrown away, and results that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe.errors import LlamaMoeError, MissingExtraError, RefusedError, UsageError
from llamamoe.studies.speed import bench_llama_cpp as module
from llamamoe.studies.speed import runtimes
from llamamoe.studies.speed.bench_llama_cpp import bench_llama_cpp
from llamamoe.studies.speed.material import Material, material, write_random
from llamamoe.studies.speed.measure import alternate, rates_of
from llamamoe.studies.speed.runtimes import LlamaCpp, Load, Transformers, runtime
from llamamoe.studies.speed.shapes import MODEL_SHAPES, FfnShape, ModelShape
from llamamoe.studies.speed.store import SpeedStore
from llamamoe.studies.speed.wanted import Wanted

from .fake import TINY, Fake

LOAD = Load(prompt_tokens=12, new_tokens=3, batch_sizes=(1, 2))
STATIC, MOE, NARROW = FfnShape(0, 0, 0.5), FfnShape(8, 3, 0.125), FfnShape(16, 4, 0.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setitem(runtimes.RUNTIMES, "fake", lambda: found)  # type: ignore[arg-type]
    return found


def test_ratios_are_taken_within_a_turn() -> None:
    readings = {"dense": [{"a": 10.0}, {"a": 2.0}, {"a": 4.0}], "shape": [{"a": 15.0}, {"a": 4.0}, {"a": 5.0}]}
    found = rates_of(readings)
    assert found["dense"]["a"].ratio == 1.0
    rate = found["shape"]["a"]
    assert (rate.tokens_per_second, rate.ratio, rate.lowest, rate.highest) == (5.0, 1.5, 1.25, 2.0)


def test_turns_alternate_in_order(fake: Fake, tmp_path: Path) -> None:
    models = {}
    for name in "abc":
        models[name] = tmp_path / name
        models[name].mkdir()
        (models[name] / "config.json").write_text('{"intermediate_size": 1}')
    alternate(fake, models, LOAD, 2)
    assert "".join(fake.runs) == "abccba"


@pytest.mark.parametrize("shape", [STATIC, MOE, NARROW, FfnShape(4, 2, 0.25, 0.5)])
def test_a_shape_is_that_of_its_own_conversion(shape: FfnShape, tmp_path: Path) -> None:
    write_random(tmp_path / "dense", TINY)
    made = Material(tmp_path / "dense", tmp_path)
    plan = made.plan(made.recipe(shape))
    assert FfnShape.of(plan) == shape


def test_shared_neurons_are_rounded_on_another_model_only(tmp_path: Path) -> None:
    write_random(tmp_path / "dense", TINY)
    odd = FfnShape(4, 2, round(72 / 512, 4))
    for block, shared in ((1, 72), (32, 64)):
        made = Material(tmp_path / "dense", tmp_path, block)
        assert made.plan(made.recipe(odd)).layout.num_shared == shared


def test_shapes_have_short_names() -> None:
    assert [each.name for each in (STATIC, MOE, NARROW)] == ["static 1/2", "3 of 8 + 1/8", "4 of 16"]
    assert FfnShape(8, 3, 0.1803, 0.25).name == "3 of 8 + 0.18, 25% of the layers dense"


def test_the_1b_shape_divides_into_blocks() -> None:
    shape = MODEL_SHAPES["1B"]
    assert shape.hidden_size % 256 == shape.intermediate_size % 256 == 0
    assert shape.hidden_size / shape.num_heads == 64


def test_random_models_load_and_are_deleted(tmp_path: Path) -> None:
    with material(TINY, tmp_path) as made:
        model = AutoModelForCausalLM.from_pretrained(made.dense)
        assert model.dtype == torch.bfloat16
        assert float(model.lm_head.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
        assert AutoTokenizer.from_pretrained(made.dense)("a b").input_ids == [3 + ord("a"), 259, 3 + ord("b")]
        assert made.convert(made.recipe(MOE), "moe").is_dir()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(RefusedError, match=r"take up to 0\.0 GB") as error, material(TINY, tmp_path):
        pass
    assert "TMPDIR" in str(error.value.hint)
    assert not list(tmp_path.iterdir())


def test_every_expert_is_used_alike(tmp_path: Path) -> None:
    """With random weights a router must not prefer few experts: they would stay in a cache, and more speed be measured."""
    from llamamoe.models.loading import load_weights, open_model
    from llamamoe.training.moe_layers import find_moe_layers

    with material(ModelShape("small", 128, 512, 3, 4, 2, 2000), tmp_path) as made:
        model = load_weights(open_model(made.convert(made.recipe(NARROW), "moe")), "float32", "cpu")
        chosen: list[torch.Tensor] = []
        for layer in find_moe_layers(model):
            layer.router.register_forward_hook(lambda module, inputs, output: chosen.append(output[-1]))
        with torch.no_grad():
            model(torch.randint(3, 2000, (4, 256), generator=torch.Generator().manual_seed(0)))
    for ids in chosen:
        share = torch.bincount(ids.flatten(), minlength=16) / (ids.numel() / 16)
        assert float(share.min()) > 0.6
        assert float(share.max()) < 1.5


def test_a_store_measures_what_is_missing_and_no_more(fake: Fake, tmp_path: Path) -> None:
    store = SpeedStore(tmp_path / "study", TINY, load=LOAD, turns=2, room=tmp_path)
    wanted = [Wanted("fake", shape) for shape in (STATIC, MOE, MOE, NARROW)]
    assert store.measure(wanted) == []
    assert len(fake.runs) == 2 * 6, "dense, a static one for each number of active neurons, and three shapes"
    result = store.load(wanted[1])
    assert result is not None
    assert set(result["rates"]) == {"dense", "static", "shape"}
    assert result["sizes"]["expert_width"] * 8 + result["sizes"]["shared"] == TINY.intermediate_size
    assert store.measure(wanted) == []
    assert len(fake.runs) == 12
    next((tmp_path / "study" / "speeds").glob("fake_4_of_16*")).write_text("{")
    store.measure(wanted)
    assert len(fake.runs) == 12 + 2 * 3
    assert [path.name for path in tmp_path.iterdir()] == ["study"], "models are deleted"


def test_a_gguf_source_is_measured_itself(fake: Fake, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from llamamoe import export_gguf

    write_random(tmp_path / "dense", TINY)
    source = export_gguf(tmp_path / "dense", tmp_path / "source.gguf").out
    store = SpeedStore(tmp_path / "study", source, load=LOAD, turns=1, room=tmp_path)
    assert store.measure([Wanted("fake", MOE)]) == []
    result = store.load(Wanted("fake", MOE))
    assert result is not None
    assert result["model"]["name"].startswith("source")
    assert source.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "source.gguf", "study"]


def test_a_store_stops_between_runs(fake: Fake, tmp_path: Path) -> None:
    store = SpeedStore(tmp_path, TINY, load=LOAD, turns=1, room=tmp_path)
    store.measure([Wanted("fake", MOE)], go_on=lambda: False)
    assert fake.runs == []
    assert store.load(Wanted("fake", MOE)) is None


def test_what_fails_is_told_and_the_rest_is_done(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamamoe.studies.speed.store.TOGETHER", 1)
    store = SpeedStore(tmp_path, TINY, load=LOAD, turns=1, room=tmp_path)
    fake.refuses = "static"
    failed = store.measure([Wanted("fake", MOE), Wanted("fake", STATIC)])
    assert [(each.shape, reason) for each, reason in failed] == [(MOE, "it fell over.")]
    assert store.load(Wanted("fake", STATIC)) is not None


def test_transformers_is_timed(tmp_path: Path) -> None:
    with material(TINY, tmp_path) as made:
        found = Transformers().rates(made.convert(made.recipe(MOE), "moe"), LOAD)
    assert set(found) == set(LOAD.measures)
    assert all(0 < rate < 1e9 for rate in found.values())


def _interpreter(path: Path, body: str) -> Path:
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo 1.2; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return path


def test_llama_cpp_runs_in_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    answer = json.dumps({"rates": dict.fromkeys(LOAD.measures, 7)})
    monkeypatch.setenv(
        runtimes.PYTHON, str(_interpreter(tmp_path / "python", f"echo noise; echo '{answer}'; echo $@ >&2"))
    )
    with material(TINY, tmp_path) as made:
        program = runtime("llama.cpp")
        model = program.prepare(made.dense, made.work)
        assert model.suffix == ".gguf"
        assert program.prepare(made.dense, made.work) == model
        assert program.rates(model, LOAD) == dict.fromkeys(LOAD.measures, 7.0)
    assert program.facts()["versions"] == {"xllamacpp": "1.2"}


def test_what_llama_cpp_says_when_it_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtimes.PYTHON, str(_interpreter(tmp_path / "python", "echo no memory >&2; exit 1")))
    program = LlamaCpp()
    with pytest.raises(LlamaMoeError, match="no memory"):
        program._ask(["model"])
    monkeypatch.setenv(runtimes.PYTHON, str(tmp_path / "none"))
    with pytest.raises(MissingExtraError, match="clients"):
        runtime("llama.cpp")


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'vllm'"):
        runtime("vllm")


def test_a_model_is_timed_in_turns_with_its_parent(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LlamaCpp", lambda: fake)
    for name, width in (("parent", 100), ("model", 50)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"intermediate_size": width}))
    given = {"batch_sizes": (2, 1, 2), "repeats": 2}
    found = bench_llama_cpp(tmp_path / "model", against=tmp_path / "parent", **given)  # type: ignore[arg-type]
    assert fake.runs == ["parent", "model", "model", "parent"]
    assert list(found.rates) == ["decode 1", "decode 2", "prefill"]
    # each reading is a tenth of the one before: 2 / 10 in the first turn, 2 * 10 in the second
    assert (found.rates["prefill"].lowest, found.rates["prefill"].highest) == pytest.approx((0.2, 20.0))
    assert found.parent_rates is not None
    alone = bench_llama_cpp(tmp_path / "model")
    assert alone.parent_rates is None
    assert alone.rates["decode 1"].ratio == 1.0
    with pytest.raises(UsageError, match="repeats is 0, but must be at least 1"):
        bench_llama_cpp(tmp_path / "model", repeats=0)
