"""The same work under datatrove's local executor: the same bytes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from datatrove.executor.local import LocalPipelineExecutor
from llamamoe_recipes.tokenize import cluster

from llamamoe.data.datatrove_pipeline import MergeIndex, TokenizeFiles, merge
from llamamoe.data.tokenize import tokenize
from llamamoe.errors import LlamaMoeError, RefusedError, UsageError
from tests.hostile.conftest import digests
from tests.slurm import environment
from tests.tokens import make_model, make_text, recipe

KEYS = {"shard_tokens": 200, "validation": {"share": 0.2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path) -> Path:
    make_text(tmp_path / "text")
    return tmp_path / "text"


def test_a_local_executor_gives_the_same_bytes(model, text, tmp_path):
    wanted = recipe(model, text, **KEYS)
    tokenize(wanted, tmp_path / "one")
    logs = tmp_path / "logs"
    files = LocalPipelineExecutor(
        [TokenizeFiles(wanted, tmp_path / "many")], tasks=2, workers=1, logging_dir=str(logs / "files")
    )
    LocalPipelineExecutor([MergeIndex(wanted, tmp_path / "many")], depends=files, logging_dir=str(logs / "merge")).run()
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    assert not (tmp_path / "many.partial").exists()


def test_slurm_jobs_give_the_same_bytes(model, text, tmp_path, monkeypatch):
    """Datatrove's own scripts, run by commands that stand in for Slurm's."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    wanted = recipe(model, text, **KEYS)
    tokenize(wanted, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(wanted.to_yaml())
    arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "many"), "--tasks", "2"]
    cluster.main([*arguments, "--executor", "slurm", "--partition", "cpu"])
    log = (tmp_path / "slurm.log").read_text()
    assert digests(tmp_path / "many") == digests(tmp_path / "one"), log
    script = (tmp_path / "many.logs" / "files" / "launch_script.slurm").read_text()
    for part in ("--partition=cpu", "--time=24:00:00", "--mem-per-cpu=4G", "--array=0-1"):
        assert part in script
    assert "--qos" not in script


def test_only_missing_units_are_done_again(model, text, tmp_path, monkeypatch):
    wanted, out = recipe(model, text, **KEYS), tmp_path / "out"
    tokenize(wanted, tmp_path / "one")
    TokenizeFiles(wanted, out).run(None, 0, 2)
    with pytest.raises(LlamaMoeError, match=r"1 of 3 units in .* are not finished"):
        merge(wanted, out)
    TokenizeFiles(wanted, out).run(None, 1, 2)
    work = tmp_path / "out.partial" / "work"
    damaged = next((work / "000001").rglob("*.bin"))
    damaged.write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.bin") if "000001" not in path.parts}
    for rank in range(2):
        TokenizeFiles(wanted, out).run(None, rank, 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    MergeIndex(wanted, out).run(None)
    assert digests(out) == digests(tmp_path / "one")


def test_units_of_something_else_do_not_count(model, text, tmp_path):
    out = tmp_path / "out"
    TokenizeFiles(recipe(model, text), out).run(None)
    with pytest.raises(LlamaMoeError, match="3 of 3 units"):
        merge(recipe(model, text, shard_tokens=100), out)
    shutil.rmtree(tmp_path / "out.partial" / "work" / "000002")
    with pytest.raises(LlamaMoeError, match="the first is 000002"):
        merge(recipe(model, text), out)


def test_what_is_refused_before_any_task_runs(model, text, tmp_path):
    with pytest.raises(UsageError, match=r"validation\.documents needs all text"):
        TokenizeFiles(recipe(model, text, validation={"documents": 2}), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(RefusedError, match="not empty"):
        TokenizeFiles(recipe(model, text), tmp_path / "full")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".ledger.jsonl").write_text(json.dumps({"fingerprint": "x"}) + "\n")
    with pytest.raises(RefusedError, match="left from a run of llamamoe tokenize"):
        TokenizeFiles(recipe(model, text), tmp_path / "out")
