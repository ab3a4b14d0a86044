"""The notebook and the scripts in examples/ run on a tiny model, and say what they should."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dense import make_byte_level, make_dense

from .pages import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
SMALLER = {
    '"num_experts": 24, "top_k": 7': '"num_experts": 4, "top_k": 2',
    "CALIBRATION_TOKENS, EVALUATION_TOKENS, WINDOW = 4096, 2048, 512": "CALIBRATION_TOKENS, EVALUATION_TOKENS, WINDOW = 512, 256, 64",
}
"""Of the notebook's settings."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    make_byte_level(make_dense(folder, "llama-tied", max_position_embeddings=256, vocab_size=300), "smollm")
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Arguments that name calibration text and other text."""
    found = []
    for name, page in (("--calibration", "README.md"), ("--evaluation", "SECURITY.md")):
        (tmp_path / f"{page}.txt").write_text((ROOT / page).read_text(encoding="utf-8")[:1500], encoding="utf-8")
        found += [name, str(tmp_path / f"{page}.txt")]
    return [*found, "--tokens", "256", "--window", "64"]


Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a script as its own program; return what it printed."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def perplexity(line: str) -> float:
    return float(line.split("perplexity")[1].split()[0].rstrip(","))


def test_split_shows_the_plan_and_both_perplexities(
    script: Script, dense: Path, texts: list[str], tmp_path: Path
) -> None:
    lines = script("split.py", dense, tmp_path / "moe", *texts).splitlines()
    assert "experts" in lines[0]
    before, after = map(perplexity, lines[-2:])
    assert lines[-2].startswith("dense")
    assert before != after
    assert (tmp_path / "moe" / "model.safetensors").is_file()


def test_compare_has_the_methods_beside_their_controls(
    script: Script, dense: Path, texts: list[str], tmp_path: Path
) -> None:
    out = script("compare.py", dense, tmp_path / "study", *texts)
    assert "failed" not in out
    for name in ("dense", "token_clusters", "cluster_shared", "random", "static"):
        assert f"\n{name}" in out, out
    assert not list((tmp_path / "study").rglob("*.safetensors"))


def test_train_on_trains_a_conversion(script: Script, dense: Path, texts: list[str], tmp_path: Path) -> None:
    import llamamoe

    given = {"num_experts": 4, "top_k": 2, "method": "random"}
    llamamoe.split(dense, tmp_path / "moe", llamamoe.load_recipe(given=given), verify=False)
    text, held_out = texts[1], texts[3]
    out = script("train_on.py", tmp_path / "moe", dense, tmp_path / "run", "--text", text, "--held-out", held_out, "--steps", "2",
                 "--window", "32")  # fmt: skip
    assert "2 steps, 512 tokens" in out
    before, after = (float(line.split()[-1]) for line in out.splitlines()[-2:])
    assert before != after
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.fixture
def notebook() -> Any:
    return pytest.importorskip("nbformat").read(NOTEBOOK, 4)


def test_the_notebook_runs(notebook: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("LLAMAMOE_EXAMPLE_MODEL", str(dense))
    [settings] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for given, smaller in SMALLER.items():
        assert given in settings.source
        settings.source = settings.source.replace(given, smaller)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    out = tmp_path / "quickstart-output"
    assert (out / "moe" / "model.safetensors").is_file()
    assert (out / "moe.gguf").stat().st_size > 0
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "dense parent" in printed
    assert "2 of 4" in printed


def test_what_the_notebook_keeps_is_whole_small_and_from_nowhere(notebook: Any) -> None:
    """Every cell was run, in order, without an error, and no output names a folder of the machine that ran it."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000
    for place in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages"):
        assert place not in text
