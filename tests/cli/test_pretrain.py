"""``llamamoe pretrain``: what it prints, its JSON, its errors; a dry run writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llamamoe
from tests.training.runs import make_world, recipe_of

from .conftest import Run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    found = recipe_of(make_world(folder), "steps=2", "save_every=1", losses=[{"name": "switch"}])
    (folder / "recipe.yaml").write_text(found.to_yaml())
    return folder / "recipe.yaml"


def test_result_for_people_and_as_json(recipe: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    shown = run("pretrain", "--recipe", recipe, "--out", out).stdout
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if line["kind"] == "validation" and line["step"] in (0, 2))
    for part in ("2 steps, 256 tokens", f"{first['loss']:.4f} -> {last['loss']:.4f}", str(out / "model")):
        assert part in shown
    assert "holds a run already" in run("pretrain", "--recipe", recipe, "--out", out, code=2).output
    data = json.loads(run("pretrain", "--recipe", recipe, "--out", out, "--force", "--json").stdout)
    assert (data["steps"], data["tokens"], data["model"]) == (2, 256, str(out / "model"))
    assert data["last_validation"]["loss"] == last["loss"]
    assert data["best_checkpoint"]["path"] in {str(out / "checkpoint-1"), str(out / "checkpoint-2")}
    again = json.loads(run("pretrain", "--recipe", recipe, "--out", out, "--resume", "--json").stdout)
    assert again["last_validation"]["loss"] == last["loss"]
    assert run("pretrain", "--recipe", recipe, "--out", out, "--resume", "-q").stdout == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--model", "nowhere"), "It is model of the recipe; --model replaces it."),
        (("--set", "data.train=nowhere"), "It is data.train of the recipe; --set data.train=FOLDER replaces it."),
    ],
)
def test_an_error_about_a_place_names_the_key(
    change: tuple[str, str], says: str, recipe: Path, tmp_path: Path, run: Run
) -> None:
    shown = run("pretrain", "--recipe", recipe, *change, "--out", tmp_path / "run", code=3).stderr
    assert "'nowhere'" in shown
    assert says in " ".join(shown.split())


def test_the_held_out_loss_before_the_first_step_is_reported(recipe: Path, tmp_path: Path, run: Run) -> None:
    shown = run("pretrain", "--recipe", recipe, "--out", tmp_path / "run").stderr
    assert "load: model 1 of " in shown
    assert shown.count("held-out loss at the start: ") >= 1
    assert shown.index("held-out loss at the start") < shown.index("train: ")


def test_dry_run_writes_nothing(recipe: Path, tmp_path: Path, run: Run) -> None:
    args = ("pretrain", "--recipe", recipe, "--out", tmp_path / "run", "--dry-run")
    paper = ("--world-size", 2, "--device-memory", 80, "--peak-tflops", 100)
    shown = run(*args, *paper).stdout
    for part in (
        "2 steps, 256 tokens",
        "Mixture",
        "large",
        "Memory of one device",
        "peak",
        "disk, total",
        "a rank)",
        "resume",
        "time",
        "Nothing was",
    ):
        assert part in shown, part
    data = json.loads(run(*args, *paper, "--json").stdout)
    assert data["dry_run"] is True
    assert data["estimate"]["accumulation"] == 1  # two micro-batches of four, one for each process
    small = run(*args, "--device-memory", "1e-6").stdout
    assert "does not fit" in small
    assert list(tmp_path.iterdir()) == []


def test_time_of_a_run_on_this_machine(recipe: Path, tmp_path: Path, run: Run) -> None:
    args = ("pretrain", "--recipe", recipe, "--out", tmp_path / "run", "--dry-run")
    for part in ("this machine's products, measured", "held-out losses", "time in all", "2 operations per parameter"):
        assert part in run(*args).stdout
    plan = json.loads(run(*args, "--json").stdout)
    estimate, rate = plan["estimate"], 0.4 * plan["measured_flops_per_second"]
    assert estimate["operations_per_second"] == rate
    assert estimate["seconds"] == pytest.approx(256 * estimate["flops_per_token"] / rate)
    assert plan["validations"] == 2
    assert plan["validation_seconds"] == plan["validation_tokens"] * estimate["forward_operations"] / rate
    assert 0 < plan["validation_tokens"] <= plan["held_out_tokens"]
    for elsewhere in (("--set", "device=npu"), ("--world-size", 2)):
        shown = run(*args, *elsewhere).stdout
        assert "unknown: give --peak-tflops" in shown
        assert "held-out losses" not in shown


def test_bad_input(recipe: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    args = ("pretrain", "--recipe", recipe, "--out", out)
    shown = run(*args, "--set", "optimizer.lrr=1", "--set", "steps=-1", code=2).output
    assert "Did you mean 'lr'" in shown
    assert "steps" in shown
    assert "are mutually exclusive" in run(*args, "--resume", "--force", code=2).output
    assert "ships with" in run("pretrain", "--recipe", "smollm2_cpy", "--out", out, code=2).output
    assert "cannot be dealt to 3 ranks" in run(*args, "--dry-run", "--world-size", 3, code=2).output
    assert "does not exist" in run(*args, "--model", tmp_path / "nowhere", code=3).output
    assert "train_tokens" in run(*args, "--set", "data.train=train_tokens", code=3).output
    assert not out.exists()


def test_a_damaged_checkpoint_is_told_and_an_older_one_can_be_named(recipe: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    args = ("pretrain", "--recipe", recipe, "--out", out)
    run(*args)
    weights = (out / "model" / "model.safetensors").read_bytes()
    path = out / "checkpoint-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    told = " ".join(run(*args, "--resume", code=3).output.split())
    assert "model.safetensors was changed after it was written" in told
    assert "--resume checkpoint-1 goes on" in told
    run(*args, "--resume", "checkpoint-1", "-q")
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    assert "is not a checkpoint of the run" in run(*args, "--resume", "checkpoint-7", code=2).output
    assert "are mutually exclusive" in run(*args, "--resume", "checkpoint-1", "--force", code=2).output


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        (None, "nothing was written"),
        (1, "{out} is kept, --resume starts over: it has no checkpoint yet"),
        (2, "{out} is kept, --resume continues from its newest checkpoint, checkpoint-1"),
    ],
)
def test_ctrl_c_tells_what_is_there(
    stage: int | None, told: str, recipe: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = llamamoe.pretrain

    def interrupted(*args: Any, progress: Any, **keys: Any) -> Any:
        def stop(each: Any) -> None:
            if each.stage == "train" and each.done == stage:
                raise KeyboardInterrupt

        if stage is None:
            raise KeyboardInterrupt
        return real(*args, progress=stop, **keys)

    monkeypatch.setattr(llamamoe, "pretrain", interrupted)
    args = ("pretrain", "--recipe", recipe, "--out", tmp_path / "run")
    assert run(*args, code=130).stderr.strip().endswith("interrupted; " + told.format(out=tmp_path / "run"))
    monkeypatch.undo()
    said = run(*args, *(("--resume",) if stage else ())).stderr
    assert ("resume: 1 of " in said) == (stage == 2)


def test_a_dry_run_refuses_what_the_run_would(recipe: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    (out / "checkpoint-500").mkdir(parents=True)
    for flags in ((), ("--force",), ("--resume",)):
        shown = run("pretrain", "--recipe", recipe, "--out", out, "--dry-run", *flags, code=3).output
        assert "checkpoint-500" in shown
    assert [path.name for path in out.iterdir()] == ["checkpoint-500"]


def test_another_recipe_cannot_go_on_and_the_way_out_works(recipe: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    run("pretrain", "--recipe", recipe, "--out", out)
    refused = " ".join(
        run("pretrain", "--recipe", recipe, "--out", out, "--resume", "--set", "seed=3", code=3).output.split()
    )
    assert "was made by another recipe" in refused
    assert "with model=" in refused
    run("pretrain", "--recipe", recipe, "--out", tmp_path / "next", "--model", out / "checkpoint-2", "--set", "seed=3")
