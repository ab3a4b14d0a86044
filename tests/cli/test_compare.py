"""``llamamoe compare``: what it prints, its JSON, its errors; it lists cells without torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

from tests.studies.common import make_study

from .conftest import Run


@pytest.fixture(scope="module")
def study(dense: Path, tmp_path_factory: pytest.TempPathFactory, run: Run) -> tuple[list[str | Path], Path, Result]:
    """Arguments of a study without calibration, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    make_study(folder, methods=["kmeans"], calibration=[], seeds=[0, 1])
    out = folder / "out"
    args: list[str | Path] = ["compare", dense, "--recipe", folder / "study.yaml", "--out", out]
    return args, out, run(*args)


def test_table_and_files(study: tuple[list[str | Path], Path, Result]) -> None:
    _, out, result = study
    for expected in ("method", "active share", "x dense", "kmeans", "random", "kmeans, oracle router (simulated)",
                     "it is simulated and cannot be exported", "comparison.svg"):  # fmt: skip
        assert expected in result.stdout
    assert " +-" in result.stdout, "two seeds"
    assert "compare:" in result.stderr
    assert {p.name for p in out.iterdir()} == {
        "cells", "comparison.json", "comparison.md", "comparison.png", "comparison.svg"
    }  # fmt: skip


def test_json_verbose_and_a_second_run(study: tuple[list[str | Path], Path, Result], run: Run) -> None:
    args, out, first = study
    found = run(*args, "--json")
    data = json.loads(found.stdout)
    assert data == json.loads((out / "comparison.json").read_text())
    assert [r["seeds"] for r in data["rows"] if r["method"] == "kmeans"] == [[0, 1]]
    assert data["rows"][0]["method"] == "dense"
    text = run(*args, "-v").stdout
    assert "Perplexity by domain" in text
    assert "How it was measured" in text
    assert run(*args, "-q").stdout == first.stdout


def test_dry_run(study: tuple[list[str | Path], Path, Result], run: Run) -> None:
    args, out, _ = study
    text = run(*args, "--dry-run").stdout
    assert "kmeans/0.5/1" in text
    assert text.count("finished") >= 6
    assert "Nothing was written" in text
    other = out.parent / "other"
    data = json.loads(run(*args, "--out", other, "--only", "random*", "--dry-run", "--json").stdout)
    assert [(c["label"], c["finished"]) for c in data["cells"]] == [("random/0.5/0", False), ("random/0.5/1", False)]
    assert not other.exists()


def test_the_shape_that_a_dry_run_proposes_can_be_compared(
    study: tuple[list[str | Path], Path, Result], tmp_path: Path, run: Run
) -> None:
    args, out = study[0], tmp_path / "new"
    proposed = run(*args, "--out", out, "--dry-run").stdout.strip().splitlines()[-1]
    given = shlex.split(proposed.replace("token_clusters", "kmeans"))  # this study has no text
    own = run(*args, "--out", out, *given, "--set", "budgets=[0.9]", "--dry-run").stdout
    assert "mine/0.9/0" in own
    assert "8 of 32" in own


def test_dry_run_imports_nothing_heavy(study: tuple[list[str | Path], Path, Result]) -> None:
    line = [str(arg) for arg in study[0]] + ["--dry-run"]
    script = (
        "import sys\nfrom llamamoe_cli.main import root\n"
        f"try: root.main({line!r}, prog_name='llamamoe')\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_errors(study: tuple[list[str | Path], Path, Result], dense: Path, tmp_path: Path, run: Run) -> None:
    args = study[0]
    assert "Did you mean 'kmeans'" in run(*args, "--set", "methods=[kmaens]", code=2).stderr
    assert "Did you mean 'kmeans'" in run(*args, "--only", "kmeens", code=2).stderr
    assert "the smallest budget is" in run(*args, "--set", "budgets=[0.01]", code=3).stderr
    assert "matches" in run(*args, "--evaluation", tmp_path / "none.txt", code=2).stderr
    assert "cannot be read" in run("compare", dense, "--recipe", tmp_path / "none.yaml", code=2).stderr
    assert "Did you mean 'smollm2'" in run("compare", dense, "--recipe", "smolm2", code=2).stderr
    assert "does not exist" in run("compare", tmp_path / "none", "--recipe", args[3], code=3).stderr
    assert "Missing option '--recipe'. Give a YAML file, or a recipe that ships" in (
        said := run("compare", dense, code=2).stderr
    )
    assert ": quick, smollm2, " in said


def test_overlap_is_refused(
    study: tuple[list[str | Path], Path, Result], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = study[0]
    text = next((study[1].parent / "evaluation").rglob("*.txt"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "same.txt").write_text(text.read_text())
    (tmp_path / "c" / "more.txt").write_text("more text " * 60)
    method = "methods=[{name: r, method: kmeans, router: ridge}]"
    args = [*args, "--calibration", tmp_path / "c", "--set", method, "--out", tmp_path / "out"]
    planned = " ".join(run(*args, "--dry-run").stdout.split())
    assert f"{text} would be evaluated on and is in the calibration text, too" in planned
    monkeypatch.setattr("llamamoe.studies.compare._MOST_TEXT", 10)
    assert "the run begins with it" in run(*args, "--dry-run").stdout
    stderr = run(*args, code=2).stderr
    assert "the same text is in the calibration text" in stderr
    assert not (tmp_path / "out").exists()
