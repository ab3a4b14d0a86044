"""A whole study on a tiny model: what is measured, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamamoe.errors import LlamaMoeError, MissingExtraError, RefusedError, UsageError
from llamamoe.evaluation.perplexity import evaluate
from llamamoe.methods.contributions import contributions
from llamamoe.methods.layer import LayerInputs
from llamamoe.studies import engine, run, store
from llamamoe.studies.by_layer import with_top_k
from llamamoe.studies.compare import compare, plan_comparison
from llamamoe.studies.in_memory import convert_in_memory, oracle_of
from llamamoe.studies.measure import replaced_ffns
from llamamoe.studies.store import read_result, write_result
from llamamoe.studies.table import Comparison, markdown
from tests.dense import make_dense
from tests.studies.common import REPAIRED, make_study, open_dense

LAYERS = 2


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A study that is done, with all methods' first cells written as checkpoints too."""
    folder = tmp_path_factory.mktemp("study")
    dense = make_dense(folder / "dense")
    soft = {**REPAIRED, "router_scale": "soft", "name": "soft"}
    recipe = make_study(folder, methods=[REPAIRED, soft], export="first")
    found = compare(dense, folder / "out", recipe)
    return SimpleNamespace(folder=folder, dense=dense, recipe=recipe, out=folder / "out", found=found)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if a cell is measured."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished cell was done again")

    monkeypatch.setattr(engine.Engine, "measure", refuse)
    monkeypatch.setattr(engine.Engine, "export", refuse)
    return


def row(found: Comparison, method: str) -> Any:
    (one,) = [r for r in found.rows if r.method == method]
    return one


def test_the_dense_model_is_measured_as_evaluate_does(study: SimpleNamespace) -> None:
    keys = {"max_tokens": 64, "context_length": 32, "dtype": "float32"}
    want = evaluate(study.dense, [study.folder / "evaluation"], **keys).model
    dense = row(study.found, "dense")
    assert dense.perplexity == pytest.approx(want.mean_over_domains.perplexity, rel=1e-6)
    assert dense.domains == {name: pytest.approx(score.perplexity, rel=1e-6) for name, score in want.domains.items()}
    assert (dense.ratio, dense.share, set(dense.domains)) == (1.0, 1.0, {"a", "b"})


def test_written_checkpoints_have_the_same_perplexity(study: SimpleNamespace) -> None:
    """Hard routers store logits so small that near ties fall otherwise in float32; soft ones do not."""
    assert study.found.failed == ()
    for method, tolerance in (("soft", 1e-4), ("static", 1e-4), ("static + least_squares", 1e-4), ("repaired", 0.05)):
        found = row(study.found, method)
        assert found.exported_ratio is not None, method
        assert 1.0 <= found.exported_ratio < 1 + tolerance, method
    assert row(study.found, "repaired, oracle router").exported_ratio is None
    assert (study.out / "checkpoints" / "soft_0.5_0" / "config.json").is_file()


def test_controls_are_there_and_labelled(study: SimpleNamespace) -> None:
    rows = {r.method: r for r in study.found.rows}
    assert {"dense", "random", "static", "static + least_squares", "repaired, oracle router"} < set(rows)
    for name, found in rows.items():
        assert found.simulated == ("simulated: cannot be exported" if "oracle" in name else None)
        assert found.share <= (found.budget or 1.0) + 1e-9
    assert rows["static"].share == rows["static + least_squares"].share == 0.5
    assert rows["static"].active_parameters == rows["static + least_squares"].active_parameters
    assert rows["repaired"].recall_at_k is not None
    assert rows["repaired"].output_error < 1


def test_a_k_for_each_layer_costs_no_more_and_is_called_simulated(study: SimpleNamespace, tmp_path: Path) -> None:
    methods = [{**REPAIRED, "top_k_by_layer": "proxy"}, {**REPAIRED, "name": "kl", "top_k_by_layer": "kl"}]
    recipe = make_study(tmp_path, methods=methods, controls=False, export="all")
    found = compare(study.dense, tmp_path / "out", recipe, only=["*, k by layer"])
    assert found.failed == ()
    uniform = row(study.found, "repaired")
    for name, measure in (("repaired, k by layer", "proxy"), ("kl, k by layer", "kl")):
        one = row(found, name)
        assert one.simulated == "simulated: split writes one k for all layers"
        each, top_k = one.sizes["top_k_by_layer"], one.sizes["top_k"]
        assert f"k of each layer, {one.method} at 50 %: {', '.join(map(str, each))}." in markdown(found)
        assert (len(each), top_k, one.sizes["measure"]) == (LAYERS, uniform.sizes["top_k"], measure)
        assert sum(each) <= LAYERS * top_k
        assert one.share <= uniform.share + 1e-9
        assert one.sizes["damage"] <= one.sizes["damage_uniform"]
        assert one.exported_ratio is None
    with pytest.raises(RefusedError, match="is a model, but a study writes results only"):
        plan_comparison(study.dense, recipe, out=study.dense)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "(simulated: split writes one k for all layers)" in page
    assert "A k for each layer (under the same total" in page


def test_a_second_run_does_nothing_and_says_the_same(study: SimpleNamespace, no_work: None) -> None:
    again = compare(study.dense, study.out, study.recipe)
    assert again == study.found
    listed = plan_comparison(study.dense, study.recipe, out=study.out)
    assert all(cell.finished for cell in listed.cells)
    assert (listed.seconds_left, listed.rate_measured) == (0, True)


def test_a_lost_or_broken_cell_is_done_again_alike(study: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(study.out, out)
    lost, broken = next(out.glob("cells/soft_0.5_0.*")), next(out.glob("cells/dense.*"))
    lost.unlink()
    broken.write_text(broken.read_text()[:100])
    others = {path: path.stat().st_mtime_ns for path in out.glob("cells/*") if path not in (lost, broken)}
    again = compare(study.dense, out, study.recipe.model_copy(update={"export": "none"}))
    assert [(r.method, r.perplexity) for r in again.rows] == [(r.method, r.perplexity) for r in study.found.rows]
    assert lost.is_file()
    assert {path: path.stat().st_mtime_ns for path in others} == others, "the others were left alone"


@pytest.mark.parametrize("damage", ["digit", "key", "nested", "pipe"])
def test_a_changed_result_is_done_again(damage: str, tmp_path: Path) -> None:
    """By its hash: a changed number would have been believed, a lost one was a traceback."""
    path = tmp_path / "cells" / "one.json"
    data = {"key": "k", "perplexity": 12.5, "shares": [0.5, None]}
    assert write_result(path, data) == read_result(path) == data
    stored = json.loads(path.read_text())
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "nested":
        path.write_text("[" * 100_000)
    else:
        changed = stored | {"perplexity": 11.5} if damage == "digit" else {k: stored[k] for k in ("key", "sha256")}
        path.write_text(json.dumps(changed))
    assert read_result(path) is None


def test_what_changes_makes_other_cells(
    study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(study.out / "cells", out / "cells")

    def left(**changes: Any) -> set[str]:
        """Methods that would be done again; the text is looked at."""
        done: list[str] = []

        def measure(self: Any, cell: Any, advance: Any) -> dict[str, Any]:
            done.append(cell.method)
            raise LlamaMoeError("not now")

        monkeypatch.setattr(engine.Engine, "measure", measure)
        update = {"export": "none", **changes}
        compare(study.dense, out, type(study.recipe).model_validate(study.recipe.model_dump() | update))
        return set(done)

    everything = {r.method for r in study.found.rows}
    calibrated = everything - {"dense", "random"}
    assert left() == set()
    assert left(device="cpu", batch_size=2) == set(), "what changes no number"
    assert left(calibration_tokens=320) == calibrated
    assert left(calibration_weights={"a": 3.0, "b": 1.0}) == calibrated
    assert left(evaluation_tokens=63) == everything
    assert left(context_length=16) == everything
    assert left(seeds=[1]) == everything - {"dense"}
    text = next((study.folder / "calibration").rglob("*.txt"))
    before = text.read_text()
    text.write_text("!" + before)
    assert left() == calibrated
    text.write_text(before)
    source = store._source
    changed = lambda name: ("other", ()) if name.endswith("routers.ridge") else source(name)  # noqa: E731
    monkeypatch.setattr(store, "_source", changed)
    routed = {name for name in everything if name.startswith(("repaired", "soft"))}
    assert left() == routed, "only those that use the method whose code changed"


def test_the_code_counts_but_not_its_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(text: str) -> str:
        path = tmp_path / "some_method.py"
        path.write_text(text)
        monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: SimpleNamespace(
            origin=str(path), submodule_search_locations=None))  # fmt: skip
        store._source.cache_clear()
        return store._source("llamamoe.some_method")[0]

    first = digest('"""A."""\ndef f(x):\n    """B."""\n    return x + 1\n')
    assert digest('"""C."""\n# D\ndef f(x):\n    """E."""\n\n    return (x + 1)  # F\n') == first
    assert digest("def f(x):\n    return x + 2\n") != first
    monkeypatch.undo()
    store._source.cache_clear()


def test_overlapping_text_is_refused(study: SimpleNamespace, tmp_path: Path) -> None:
    recipe = study.recipe.model_copy(update={"calibration": (str(study.folder),), "calibration_tokens": 1024})
    with pytest.raises(UsageError, match=r"would be evaluated on, but the same text is in the calibration text"):
        compare(study.dense, tmp_path / "out", recipe)
    assert not (tmp_path / "out" / "cells").exists()


def test_only_and_failures(study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = study.recipe.model_copy(update={"export": "none"})
    measure = engine.Engine.measure

    def fail(self: Any, cell: Any, advance: Any) -> Any:
        if cell.method == "static":
            raise LlamaMoeError("layer 1: NaN")
        return measure(self, cell, advance)

    monkeypatch.setattr(engine.Engine, "measure", fail)
    found = compare(study.dense, tmp_path / "out", recipe, only=["dense", "random", "static"])
    assert {r.method for r in found.rows} == {"dense", "random"}
    assert found.failed == (("static/0.5/0", "layer 1: NaN"),)
    assert "soft/0.5/0" in found.pending
    assert "static/0.5/0: layer 1: NaN" in (tmp_path / "out" / "comparison.md").read_text()
    with pytest.raises(UsageError, match="matches no cell"):
        compare(study.dense, tmp_path / "out", recipe, only=["nothing"])


def test_a_stop_keeps_what_is_finished(study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = engine.Engine.measure
    done: list[str] = []

    def stop(self: Any, cell: Any, advance: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(cell.method)
        return measure(self, cell, advance)

    monkeypatch.setattr(engine.Engine, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(study.dense, tmp_path / "out", study.recipe, only=["dense", "random"])
    assert [path.name.split(".")[0] for path in (tmp_path / "out" / "cells").iterdir()] == ["dense"]
    assert not (tmp_path / "out" / "work").exists()


def test_files(study: SimpleNamespace) -> None:
    data = json.loads((study.out / "comparison.json").read_text())
    assert data == json.loads(json.dumps(study.found.to_json()))
    assert set(data) == {
        "source",
        "rows",
        "cells",
        "pending",
        "failed",
        "protocol",
        "text",
        "recipe",
        "warnings",
        "files",
        "speeds",
    }
    cell = next(c for c in data["cells"] if c["method"] == "repaired")
    assert {"perplexity", "loss", "domains", "share", "sizes", "layers", "seconds", "peak_bytes", "active_parameters",
            "key", "seed", "budget", "simulated", "exported"} <= set(cell)  # fmt: skip
    assert len(cell["layers"]) == LAYERS
    assert cell["layers"][0]["router_quality"]["recall_at_k"] >= 0
    page = (study.out / "comparison.md").read_text()
    assert "**repaired**" in page
    assert "(simulated: cannot be exported)" in page
    assert (study.out / "comparison.svg").read_text().count("<svg") == 1
    assert (study.out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_still_comes(study: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    def missing(*_: Any) -> None:
        raise MissingExtraError("matplotlib", "plot", "Drawing the picture")

    monkeypatch.setattr(run, "draw", missing)
    out = tmp_path / "out"
    shutil.copytree(study.out / "cells", out / "cells")
    found = compare(study.dense, out, study.recipe)
    assert found.rows == study.found.rows
    assert "pip install 'llamamoe[plot]'" in found.warnings[-1]
    assert set(found.files) == {"json", "markdown"}


# ---- the parts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(study: SimpleNamespace) -> Any:
    from llamamoe.studies.cells import cells_of

    cells = cells_of(study.recipe, open_dense(study.dense))
    return next(cell.plan for cell in cells if cell.method == "random")


def test_layers_may_differ_in_k_alone(plan: Any) -> None:
    plans = [with_top_k(plan, k) for k in (1, 3)]
    ffns = convert_in_memory(plan, None, None, by_layer=plans).ffns  # type: ignore[arg-type]
    assert [(ffn.top_k, ffn.coefficient) for ffn in ffns.values()] == [
        (k, pytest.approx(plan.layout.num_experts / k)) for k in (1, 3)
    ]
    alike = convert_in_memory(plan, None, None).ffns  # type: ignore[arg-type]
    for layer, ffn in ffns.items():
        assert torch.equal(ffn.router_NH, alike[layer].router_NH)
        assert ffn.partition.experts.tolist() == alike[layer].partition.experts.tolist()


def test_the_oracle_takes_the_experts_of_largest_contribution(plan: Any) -> None:
    converted = convert_in_memory(plan, None, None)  # type: ignore[arg-type]
    moe = converted.ffns[0]
    from llamamoe.calibration.walk import read_ffn

    ffn = read_ffn(plan.model, 0)
    x_BH = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    chosen = oracle_of(moe, ffn).expert_weights(x_BH) != 0
    h_BF = torch.nn.functional.silu(x_BH @ ffn.gate_FH.T) * (x_BH @ ffn.up_FH.T)
    for token in range(20):
        sizes = []
        for members in moe.partition.experts:
            real = torch.from_numpy(members[members >= 0])
            sizes.append(float((ffn.down_HF[:, real] @ h_BF[token, real]).norm()))
        best = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: moe.top_k]
        assert set(chosen[token].nonzero().ravel().tolist()) == set(best)
    inputs = LayerInputs(x_BH, torch.ones(20), torch.device("cpu"), torch.float32)
    (captured,) = contributions(ffn, moe.partition, inputs)
    routed = moe.expert_weights(x_BH) != 0
    assert ((captured * chosen).sum(1) >= (captured * routed).sum(1) - 1e-5).all()
    assert float((captured * chosen).sum()) > float((captured * routed).sum())


def test_a_soft_oracle_keeps_the_routers_weights_for_its_own_choice(study: SimpleNamespace, plan: Any) -> None:
    from dataclasses import replace

    from llamamoe.calibration.walk import read_ffn

    moe = convert_in_memory(plan, None, None).ffns[0]  # type: ignore[arg-type]
    moe = replace(moe, scale="soft", weighting="renormalised", router_NH=torch.randn(moe.num_experts, 64))
    x_BH = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    weights = oracle_of(moe, read_ffn(plan.model, 0)).expert_weights(x_BH)
    logits = x_BH @ moe.router_NH.T
    for token in range(9):
        chosen = weights[token].nonzero().ravel()
        assert len(chosen) == moe.top_k
        torch.testing.assert_close(weights[token, chosen], logits[token, chosen].softmax(0) * moe.factor)


def test_ffns_are_replaced_and_put_back(study: SimpleNamespace, plan: Any) -> None:
    """With all experts selected, a random partition computes what the dense model computes."""
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(study.dense)
    ids = torch.arange(3, 33)[None]
    every = {
        layer: replace(moe, top_k=moe.num_experts, factor=float(moe.num_experts), router_NH=moe.router_NH * 0)
        for layer, moe in convert_in_memory(plan, None, None).ffns.items()  # type: ignore[arg-type]
    }
    with torch.no_grad():
        dense = model(ids).logits
        with replaced_ffns(model, every):
            torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
        with replaced_ffns(model, convert_in_memory(plan, None, None).ffns):  # type: ignore[arg-type]
            assert float((model(ids).logits - dense).abs().max()) > 0.1
        torch.testing.assert_close(model(ids).logits, dense, rtol=0, atol=0)


def test_the_shipped_study_runs_shrunk(study: SimpleNamespace, tmp_path: Path) -> None:
    from llamamoe.studies.recipe import load_compare_recipe

    given = {"evaluation": [str(study.folder / "evaluation")], "calibration": [str(study.folder / "calibration")]}
    small = ["calibration_tokens=384", "calibration_length=64", "evaluation_tokens=64", "context_length=32",
             "budgets=[0.5]", "seeds=[0]", "controls=false"]  # fmt: skip
    path = Path(__file__).parents[2] / "recipes" / "compare" / "stories260k.yaml"
    recipe = load_compare_recipe(path, given=given, overrides=small)
    found = compare(study.dense, tmp_path / "out", recipe)
    assert found.failed == ()
    assert {r.method for r in found.rows} == {"dense", *(method.name for method in recipe.methods)}
    assert found.pending == ()
