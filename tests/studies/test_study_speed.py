"""Speeds in a study: measured once for each shape, in rows, page and picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamamoe.conversion.recipe import SplitRecipe
from llamamoe.errors import MissingExtraError, UsageError
from llamamoe.studies.compare import compare, plan_comparison
from llamamoe.studies.speed import runtimes
from llamamoe.studies.speed.material import Material
from llamamoe.studies.speed.shapes import MODEL_SHAPES
from llamamoe.studies.speed_picture import frontier
from llamamoe.studies.table import Comparison
from tests.dense import make_dense
from tests.studies.common import REPAIRED, make_study
from tests.studies.speed.fake import TINY, Fake


def only_config(self: Material, recipe: SplitRecipe, name: str) -> Path:
    """A conversion as far as `Fake` looks at it."""
    out = self.work / name
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(self.plan(recipe).config))
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two methods of one shape, two seeds, done; then done again."""
    folder = tmp_path_factory.mktemp("study")
    dense = make_dense(folder / "dense")
    fake = Fake()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtimes.RUNTIMES, "transformers", lambda: fake)  # type: ignore[arg-type]
        patch.setitem(MODEL_SHAPES, "1B", TINY)
        patch.setattr(Material, "convert", only_config)
        recipe = make_study(folder, methods=["kmeans", REPAIRED], budgets=[0.5], seeds=[0, 1], speed=["transformers"])
        plan = plan_comparison(dense, recipe)
        found = compare(dense, folder / "out", recipe)
        runs = len(fake.runs)
        again = compare(dense, folder / "out", recipe)
    return SimpleNamespace(folder=folder, plan=plan, found=found, again=again, runs=runs, fake=fake, dense=dense)


def test_a_shape_is_measured_once(study: SimpleNamespace) -> None:
    found: Comparison = study.found
    shapes = {json.dumps(each["shape"], sort_keys=True) for each in found.speeds}
    assert len(shapes) == len(found.speeds) == len(study.plan.speeds)
    assert len(list((study.folder / "out" / "speeds").iterdir())) == len(shapes)
    assert not any("not measured" in warning for warning in found.warnings)


def test_nothing_is_measured_again(study: SimpleNamespace) -> None:
    assert len(study.fake.runs) == study.runs
    assert study.again.to_json() == study.found.to_json()


def test_rows_of_one_shape_have_one_speed_and_oracles_none(study: SimpleNamespace) -> None:
    speeds = {(row.method, row.budget): row.speed for row in study.found.rows}
    assert speeds["kmeans", 0.5] == speeds["repaired", 0.5] != {}
    assert speeds["kmeans", 0.5] != speeds["static", 0.5]
    assert set(speeds["static", 0.5]) == {"transformers"}
    assert speeds["kmeans, oracle router", 0.5] == {}
    dense = speeds["dense", None]["transformers"]["prefill"]
    assert dense["ratio"] == 1.0
    assert dense["tokens_per_second"] > 0


def test_the_page_and_the_picture_show_them(study: SimpleNamespace) -> None:
    page = (study.folder / "out" / "comparison.md").read_text()
    assert "## Speed, over the dense model's" in page
    assert "transformers, decode 8" in page
    assert "median of 3 turns" in page
    rate = next(row for row in study.found.rows if row.method == "static").speed["transformers"]["prefill"]
    assert f"{rate['ratio']:.2f} ({rate['lowest']:.2f}-{rate['highest']:.2f})" in page
    pytest.importorskip("matplotlib")
    assert "](speed.svg)" in page
    svg = (study.folder / "out" / "speed.svg").read_text()
    assert svg.count('id="axes_') == 3, "one panel for each task"
    assert (study.folder / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_frontier_is_of_measured_points() -> None:
    points = [(1.0, 1.0), (1.5, 1.6), (1.4, 1.7), (1.6, 1.6), (1.7, 2.0), (0.9, 1.0), (1.7, 3.0)]
    assert frontier(points) == [(1.0, 1.0), (1.6, 1.6), (1.7, 2.0)]


def test_a_program_that_is_not_there_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runtimes.PYTHON, str(tmp_path / "none"))
    dense = make_dense(tmp_path / "dense")
    recipe = make_study(tmp_path, speed=["llama.cpp"])
    for study in (compare, plan_comparison):
        with pytest.raises(MissingExtraError, match="xllamacpp"):
            study(dense, out=tmp_path / "out", recipe=recipe)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="speed"):
        make_study(tmp_path, speed=["vllm"])
