"""The loader that all recipes share: what keyword arguments and overrides do to what a file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llamamoe.alignment.recipe import AlignmentOptions
from llamamoe.conversion.recipe import SplitRecipe
from llamamoe.data.recipe import TokenizeRecipe
from llamamoe.errors import UsageError
from llamamoe.evaluation.tasks import TaskRecipe
from llamamoe.healing.recipe import HealRecipe
from llamamoe.recipes import Recipe
from llamamoe.studies.recipe import CompareRecipe
from llamamoe.training.recipe import PretrainRecipe

PRETRAIN: dict[str, Any] = {"model": "moe", "data": {"train": "tokens"}, "steps": 10}
STUDY: dict[str, Any] = {"methods": ["random"], "evaluation": "text"}


def test_a_bare_name_keeps_the_options_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(PRETRAIN | {"gate": {"name": "jitter", "eps": 0.25}}))
    assert PretrainRecipe.load(tmp_path / "r.yaml", given={"gate": "jitter"}).gate.options == {"eps": 0.25}
    other = PretrainRecipe.load(tmp_path / "r.yaml", given={"gate": "top_k"}).gate
    assert (other.name, other.options) == ("top_k", {})


def test_numbers_of_tokens_of_a_run_have_units() -> None:
    data = {"model": "moe", "data": {"train": "tokens", "skip_tokens": "2k"}, "tokens": "1.5M", "parent": "dense"}
    recipe = PretrainRecipe.load(given=data | {"distill": {"kl": {}}}, overrides=["teacher.tokens=100k"])
    assert recipe.teacher is not None
    assert (recipe.tokens, recipe.data.skip_tokens, recipe.teacher.tokens) == (1.5e6, 2000, 1e5)


@pytest.mark.parametrize(
    ("model", "given", "override", "expected"),
    [
        (SplitRecipe, {"calibration": "t"}, "calibration_weights.web=2", {"calibration_weights": {"web": 2.0}}),
        (HealRecipe, {"text": "t"}, "losses.switch=0.5", {"losses": {"switch": 0.5}}),
        (TokenizeRecipe, {"tokenizer": "t", "text": "t"}, "validation.documents=3", {"validation": {"share": None, "documents": 3}}),
        (PretrainRecipe, PRETRAIN, "data.mixture.web=1", {"data.mixture": {"web": 1.0}}),
        (PretrainRecipe, PRETRAIN, "trainer.report_to=none", {"trainer": {"report_to": "none"}}),
    ],
)  # fmt: skip
def test_parts_that_are_left_out_begin_empty(
    model: type[Recipe], given: dict[str, Any], override: str, expected: dict[str, Any]
) -> None:
    data = model.load(given=given, overrides=[override]).model_dump(mode="json")
    for path, value in expected.items():
        at = data
        for part in path.split("."):
            at = at[part]
        assert at == value


@pytest.mark.parametrize(
    ("model", "given", "override", "words"),
    [
        (PretrainRecipe, PRETRAIN, "gate.epz=1", "gate: epz: unknown key"),
        (PretrainRecipe, PRETRAIN, "data.update.x=1", "data.update: x: unknown key"),
        (PretrainRecipe, PRETRAIN, "nothing.a=1", "there is no 'nothing'"),
        (PretrainRecipe, PRETRAIN, "losses.switch=1", "losses"),
        (CompareRecipe, STUDY, "static_by.x=1", "static_by: x: unknown key"),
        (SplitRecipe, {}, "selector.a=1", "there is no 'selector'"),
        (SplitRecipe, {}, "repair.ridge=1", "name the repair first"),
        (TaskRecipe, {"tasks": "piqa"}, "limit.a=1", "limit"),
    ],
)
def test_overrides_name_what_is_wrong(model: type[Recipe], given: dict[str, Any], override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        model.load(given=given, overrides=[override])


def test_overrides_leave_what_was_given_alone() -> None:
    given = {**PRETRAIN, "data": {"train": "tokens"}}
    PretrainRecipe.load(given=given, overrides=["data.block_length=16", "data.mixture.web=1"])
    assert given["data"] == {"train": "tokens"}


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (HealRecipe, {"text": "t", "weights": {"name": 1, "options": 2}}),
        (SplitRecipe, {"calibration": "t", "calibration_weights": {"name": 1, "options": 2}, "method": "kmeans"}),
        (PretrainRecipe, PRETRAIN | {"data": {"train": "t", "mixture": {"name": 1, "options": 2}}, "losses": ["z"]}),
    ],
)
def test_yaml_is_read_back_whatever_domains_are_called(
    model: type[Recipe], given: dict[str, Any], tmp_path: Path
) -> None:
    recipe = model.load(given=given)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert model.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize("value", [None, 512, "512", "64k", "1Ki"])
def test_numbers_of_tokens_may_be_null_where_they_have_a_default(value: object) -> None:
    number = {None: None, 512: 512, "512": 512, "64k": 64_000, "1Ki": 1024}[value]  # type: ignore[index]
    assert SplitRecipe.model_validate({"calibration_length": value}).calibration_length == number
    assert AlignmentOptions.model_validate({"length": value}).length == number
    assert HealRecipe.model_validate({"text": "t", "length": value}).length == number
    study = CompareRecipe.model_validate({**STUDY, "context_length": value, "evaluation_tokens": value})
    assert (study.context_length, study.evaluation_tokens) == (number, number)
    run = PretrainRecipe.model_validate({**PRETRAIN, "steps": 1 if value is None else None, "tokens": value})
    assert run.tokens == number


def test_numbers_of_tokens_have_limits() -> None:
    for model, data in ((SplitRecipe, {"calibration_length": 1}), (AlignmentOptions, {"length": "1"})):
        with pytest.raises(ValidationError, match="greater than or equal to 2"):
            model.model_validate(data)
