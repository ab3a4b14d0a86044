"""Teacher correction: the parent is trained on the text first, in one run with what it then teaches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe import plan_pretraining, pretrain
from llamamoe.errors import LlamaMoeError, RefusedError, UsageError
from llamamoe.progress import Progress
from llamamoe.training.distillation import Distillation
from llamamoe.training.distillation_options import DistillOptions
from llamamoe.training.loss_head import LossHead, next_token_labels
from llamamoe.training.parent import Parent
from llamamoe.training.recipe import PretrainRecipe

from .runs import BLOCK, lines_of, recipe_of, start

DISTILL = {"lm": {"weight": 0.5}, "kl": {"weight": 1.0}}
TOKENS = 3 * 8 * BLOCK


def recipe_for(world: dict[str, str], *overrides: str, **keys: Any) -> PretrainRecipe:
    """Three steps of the parent, then six of the model."""
    teacher = {"tokens": TOKENS, "lr": 1e-3}
    return recipe_of(
        world, *overrides, **{"distill": DISTILL, "teacher": teacher, "losses": [{"name": "switch"}], **keys}
    )


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    pretrain(recipe_for(world), out)
    return out


def test_it_is_the_same_as_two_runs_by_hand(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    first = recipe_of(
        world,
        "steps=3",
        "optimizer.lr=1e-3",
        "precision.save=float32",
        model=world["parent"],
        parent=None,
        allow_dense=True,
    )
    parent = pretrain(first, tmp_path / "dense").model
    pretrain(recipe_for(world, teacher=None, parent=str(parent)), tmp_path / "moe")
    assert weights(finished / "teacher") == weights(tmp_path / "dense")
    assert weights(finished) == weights(tmp_path / "moe")
    assert lines_of(finished) == lines_of(tmp_path / "moe")


def test_the_parent_s_tokens_are_counted_and_its_checkpoints_dropped(finished: Path, world: dict[str, str]) -> None:
    plan = plan_pretraining(recipe_for(world))
    assert plan.teacher is not None
    assert plan.teacher.estimate.tokens == TOKENS
    assert plan.to_json()["teacher"]["estimate"]["tokens"] == TOKENS
    assert not list((finished / "teacher").glob("checkpoint-*"))
    assert lines_of(finished / "teacher")[-1]["tokens"] == TOKENS


class Stop(Exception):
    """Raised where a user would interrupt."""


@pytest.mark.parametrize(("stage", "at"), [("train teacher", 3), ("train", 4)])
def test_an_interrupted_run_continues_to_the_same_bytes(
    finished: Path, world: dict[str, str], tmp_path: Path, stage: str, at: int
) -> None:
    seen = []

    def interrupt(step: Progress) -> None:
        seen.append(step.stage)
        if (step.stage, step.done) == (stage, at):
            raise Stop

    out = tmp_path / "run"
    with pytest.raises(Stop):
        pretrain(recipe_for(world), out, progress=interrupt)
    again = []
    result = pretrain(recipe_for(world), out, resume=True, progress=lambda step: again.append((step.stage, step.done)))
    assert ("train teacher", 1) not in again, "it continues from a checkpoint, or has nothing left to do"
    assert weights(out / "teacher") == weights(finished / "teacher")
    assert weights(out) == weights(finished)
    assert result.teacher_tokens == result.receipt["trained"]["teacher_tokens"] == TOKENS


def test_two_processes_train_it_too(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_for(world).to_yaml())
    assert start(recipe, tmp_path / "run", processes=2).wait() == 0
    for ours, theirs in zip(lines_of(tmp_path / "run"), lines_of(finished), strict=True):
        if "loss" in theirs:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-5)


def test_a_run_with_a_teacher_is_not_begun_twice(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    with pytest.raises(UsageError, match="holds a run already"):
        pretrain(recipe_for(world), out)
    (out / "teacher" / "notes.txt").write_text("mine")
    pretrain(recipe_for(world, "steps=2", teacher=None), out, force=True)
    assert [path.name for path in (out / "teacher").iterdir()] == ["notes.txt"], "only what the run wrote is deleted"


def test_another_recipe_of_the_teacher_is_refused(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    with pytest.raises(RefusedError, match=r"another recipe: optimizer\.lr 0\.001 -> 0\.002"):
        pretrain(recipe_for(world, "teacher.lr=2e-3"), tmp_path / "run", resume=True)


def test_a_damaged_teacher_is_refused(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    file = tmp_path / "run" / "teacher" / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(LlamaMoeError, match="damaged") as found:
        pretrain(recipe_for(world), tmp_path / "run", resume=True)
    assert "Delete" in str(found.value.hint)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parent": None, "distill": None}, "teacher needs parent"),
        ({"distill": None}, "distill has no term from it"),
        ({"lora": {}}, "lora is there to avoid"),
    ],
)
def test_what_contradicts_it_is_refused(world: dict[str, str], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_for(world, **keys)


def test_separators_can_be_left_out_of_the_divergence(world: dict[str, str]) -> None:
    torch.manual_seed(0)
    student, parent = (AutoModelForCausalLM.from_pretrained(world[key]).float() for key in ("model", "parent"))
    with torch.no_grad():
        student.lm_head.weight.add_(torch.randn_like(student.lm_head.weight) * 0.02)
    separator, ids_BT = 7, torch.randint(8, 100, (2, 12))
    ids_BT[0, 4] = ids_BT[1, 0] = ids_BT[1, 11] = separator

    def each(separators: bool) -> torch.Tensor:
        options = DistillOptions.model_validate({"kl": {"separators": separators}})
        distillation = Distillation(options, student, Parent(parent), separator)
        with distillation.recording({"input_ids": ids_BT}, 0, 1) as recorded:
            losses = LossHead(student)(student, {"input_ids": ids_BT}, next_token_labels(ids_BT), recorded.target)
        distillation.close()
        assert losses.kl_BT is not None
        return losses.kl_BT

    every, within = each(separators=True), each(separators=False)
    dropped = {(0, 3), (0, 4), (1, 0), (1, 10)}  # beside the last positions, which predict nothing
    for b in range(2):
        for t in range(11):
            assert every[b, t] > 0
            assert within[b, t] == (0 if (b, t) in dropped else every[b, t]), (b, t)


def test_the_plan_of_the_teacher_assumes_the_same_device(world: dict[str, str]) -> None:
    plan = plan_pretraining(recipe_for(world), peak_flops=1e12, disk_rate=1e6)
    assert plan.teacher is not None
    for each in (plan, plan.teacher):
        assert each.estimate.saving["save_seconds"] == each.estimate.disk["checkpoint"] / 1e6
        assert each.estimate.seconds is not None
