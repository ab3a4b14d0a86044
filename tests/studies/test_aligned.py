"""A study with methods that are aligned: the same numbers as `split` writes, learned once, resumed after a stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamamoe.alignment import align
from llamamoe.errors import UsageError
from llamamoe.studies import store
from llamamoe.studies.compare import compare, plan_comparison
from llamamoe.studies.table import Comparison
from tests.dense import make_dense

from .common import REPAIRED, make_study, write_text

LEARNED = {"tokens": 1024, "length": 32, "batch": 32, "checks": 2, "lr_weights": 0.003, "lr_assignment": 0}
ALIGNED = {**REPAIRED, "name": "aligned", "repair": "none", "align": LEARNED}
PLAIN = {**REPAIRED, "name": "plain", "repair": "none"}
CONTROL = "static + align"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("aligned")
    dense = make_dense(folder / "dense")
    recipe = make_study(folder, methods=[ALIGNED, PLAIN], export="first")
    write_text(folder / "calibration", 12, seed=1)
    found = compare(dense, folder / "out", recipe)
    return SimpleNamespace(folder=folder, dense=dense, recipe=recipe, out=folder / "out", found=found)


def rows(found: Comparison) -> dict[str, Any]:
    return {row.method: row for row in found.rows}


def test_aligned_methods_are_measured_beside_their_control(study: SimpleNamespace) -> None:
    found = rows(study.found)
    assert study.found.failed == ()
    for name, plain in (("aligned", "plain"), (CONTROL, "static")):
        assert found[name].perplexity != found[plain].perplexity, "it learned something"
        assert found[name].exported_ratio == pytest.approx(1, abs=0.05 if name == "aligned" else 1e-4)
    assert found["aligned, oracle router"].simulated
    assert set(study.found.text["alignment"]) == {"seed 0, 1024 tokens"}
    assert not (study.out / "work").exists(), "nothing is kept once no cell needs it"


def test_the_plan_counts_the_alignment(study: SimpleNamespace, tmp_path: Path) -> None:
    flops = {cell.label: cell.flops for cell in plan_comparison(study.dense, study.recipe).cells}
    assert flops["aligned/0.5/0"] > 1.5 * flops["plain/0.5/0"]


def test_it_is_learned_once_for_a_method_and_its_oracle(
    study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[int] = []
    run = align.Alignment.run
    monkeypatch.setattr(align.Alignment, "run", lambda self: (learned.append(1), run(self))[1])
    recipe = study.recipe.model_copy(update={"export": "none"})
    compare(study.dense, tmp_path / "out", recipe, only=["aligned*"])
    assert len(learned) == 1


def test_a_stop_while_learning_goes_on_to_the_same_number(
    study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = study.recipe.model_copy(update={"export": "none"})
    step, steps = align.Alignment.step, []

    def stop(self: Any, index: int) -> float:
        if len(steps) == 20:
            raise KeyboardInterrupt
        steps.append(index)
        return step(self, index)

    monkeypatch.setattr(align.Alignment, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(study.dense, tmp_path / "out", recipe, only=["aligned"])
    assert list((tmp_path / "out" / "work").glob("alignment-*/state.safetensors"))
    steps.clear()
    monkeypatch.setattr(align.Alignment, "step", lambda self, index: (steps.append(index), step(self, index))[1])
    found = compare(study.dense, tmp_path / "out", recipe, only=["aligned"])
    assert steps[0] == 15, "it goes on from the last state"
    assert rows(found)["aligned"].perplexity == rows(study.found)["aligned"].perplexity


def test_a_stop_between_learning_and_keeping_loses_nothing(
    study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = study.recipe.model_copy(update={"export": "none"})

    def stop(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llamamoe.studies.aligned.save_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(study.dense, tmp_path / "out", recipe, only=["aligned"])
    monkeypatch.setattr(align.Alignment, "step", stop)
    found = compare(study.dense, tmp_path / "out", recipe, only=["aligned"])
    assert rows(found)["aligned"].perplexity == rows(study.found)["aligned"].perplexity


def test_text_that_only_the_alignment_reads_must_not_be_evaluated_on(study: SimpleNamespace, tmp_path: Path) -> None:
    text = write_text(tmp_path / "calibration", 12, seed=1)
    for path in (study.folder / "evaluation").rglob("*.txt"):
        (text / path.parent.name / f"later-{path.name}").write_text(path.read_text())
    keys = {"calibration": (str(text),), "calibration_tokens": 256, "export": "none"}
    plain = type(study.recipe).model_validate(study.recipe.model_dump() | keys | {"methods": [PLAIN]})
    assert compare(study.dense, tmp_path / "plain", plain, only=["plain"]).failed == ()
    more = type(study.recipe).model_validate(
        study.recipe.model_dump() | keys | {"methods": [{**ALIGNED, "align": {**LEARNED, "tokens": 4096}}]}
    )
    with pytest.raises(UsageError, match="would be evaluated on"):
        compare(study.dense, tmp_path / "out", more)


def test_code_of_the_alignment_counts_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {aligned: store.code_version([], aligned=aligned) for aligned in (False, True)}
    source = store._source
    monkeypatch.setattr(
        store, "_source", lambda name: ("other", ()) if name.endswith("alignment.distance") else source(name)
    )
    assert store.code_version([]) == before[False]
    assert store.code_version([], aligned=True) != before[True]
