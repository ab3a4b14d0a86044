"""``llamamoe budget``: a table, JSON, and a recipe that ``split`` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dense import make_dense

from .conftest import Run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("budget") / "dense", num_hidden_layers=3, intermediate_size=256)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    path = source.parent / "text.txt"
    path.write_text("".join(chr(33 + 7 * i * i % 80) for i in range(600)), encoding="utf-8")
    return path


def flags(text: Path) -> tuple[str | Path, ...]:
    return ("--calibration", text, "--calibration-tokens", "512", "--calibration-length", "32", "--method", "kmeans")


def test_a_recipe_for_split(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.yaml"
    result = run("budget", source, "--budget", "0.5", *flags(text), "--write-recipe", file, "--json")
    found = json.loads(result.stdout)
    assert found["written"] == str(file)
    assert found["active_share"] <= 0.5
    assert len(found["layers"]) == 3
    plan = json.loads(run("split", source, "--recipe", file, "--dry-run", "--json").stdout)
    for key in ("num_experts", "top_k", "expert_width"):
        assert plan[key] == found[key]
    assert plan["dense_layers"] == found["keep_dense"]
    assert plan["shared_neurons"] == found["shared"]
    assert "already exists" in run("budget", source, *flags(text), "--write-recipe", file, code=2).stderr


def test_the_divergence_for_people(run: Run, source: Path, text: Path) -> None:
    keys = ("--measure", "kl", "--points", "1", "--held-out-tokens", "32", "--target", "qwen2_moe")
    result = run("budget", source, "--budget", "0.6", *flags(text), *keys, "-v")
    for part in (
        "nats per token",
        "kept dense",
        "simulated: no architecture of transformers supports it",
        "experts of",
        "By number of dense layers",
        "keep_dense:",
    ):
        assert part in " ".join(result.stdout.split())
    assert "sensitivity" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--top-k", "2"), "No such option"),
        (("--keep-dense", "0"), "No such option"),
        (("--budget", "2"), "between 0 and 1"),
        (("--measure", "klx"), "unknown measure 'klx'"),
        (("--write-recipe", "no/such/place.yaml"), "not a file name in an existing folder"),
        (("--target", "qwen9"), "unknown target"),
    ],
)
def test_usage_errors(run: Run, source: Path, text: Path, more: tuple[str, ...], message: str) -> None:
    assert message in " ".join(run("budget", source, *flags(text), *more, code=2).stderr.split())


def test_too_small_a_budget_is_refused(run: Run, source: Path, text: Path) -> None:
    assert "the smallest possible" in run("budget", source, "--budget", "0.05", *flags(text), code=3).stderr
