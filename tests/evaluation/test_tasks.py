"""Tasks of lm-evaluation-harness, from disk: the same answers as by hand, and a paired test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe import LlamaMoeError, UsageError, evaluate_tasks, load_recipe, load_task_recipe, split
from llamamoe.evaluation.task_scores import Answers, task_scores

from ..dense import make_dense, make_tokenizer
from ..transforms.test_resplit import foreign

pytest.importorskip("lm_eval")
QUESTIONS = ["a b c", "d e f g", "the sun", "x y", "one two", "red", "q r s t", "m n", "up", "k l"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("world")
    dense = make_dense(root / "dense")
    recipe = load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, "target": "mixtral"})
    split(dense, root / "moe", recipe, verify=False)
    rows = [{"question": q, "answer": i % 2} for i, q in enumerate(QUESTIONS)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: dict[str, Any] = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (root / "tasks").mkdir()
    (root / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    return {"dense": dense, "moe": root / "moe", "tasks": root / "tasks"}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def by_hand(model: Path) -> list[float]:
    """Return for each question whether its likelier choice is the right one."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = []
    for number, question in enumerate(QUESTIONS):
        scores = []
        for choice in ("yes", "no"):
            start = tokenizer(question, add_special_tokens=False)["input_ids"]
            end = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = loaded(torch.tensor([start + end])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(end)))
        right.append(float((scores[0] < scores[1]) == bool(number % 2)))
    return right


def test_answers_and_pairs_are_those_made_by_hand(world: dict[str, Path]) -> None:
    recipe = load_task_recipe(given={"tasks": "tiny_choice", "include": [str(world["tasks"])]})
    told: list[Any] = []
    found = evaluate_tasks(
        world["moe"], recipe, against=world["dense"], dtype="float32", batch_size=3, progress=told.append
    )
    [score] = found.scores
    mine, theirs = by_hand(world["moe"]), by_hand(world["dense"])
    assert (score.task, score.metric, score.questions) == ("tiny_choice", "acc", 10)
    assert score.value == pytest.approx(sum(mine) / 10)
    assert score.against == pytest.approx(sum(theirs) / 10)
    gaps = [a - b for a, b in zip(mine, theirs, strict=True)]
    mean = sum(gaps) / 10
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 9 / 10)
    assert score.difference == pytest.approx(mean)
    assert score.difference_stderr == pytest.approx(error)
    assert score.interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=1e-4)
    assert (told[-1].done, told[-1].total) == (2, 2)
    json.dumps(found.to_json())


def test_a_limit_and_no_other_model(world: dict[str, Path]) -> None:
    given = {"tasks": [{"task": "tiny_choice", "num_fewshot": 0}], "include": [str(world["tasks"])], "limit": 4}
    [score] = evaluate_tasks(world["moe"], load_task_recipe(given=given), dtype="float32").scores
    assert (score.questions, score.against, score.difference, score.num_fewshot) == (4, None, None, 0)
    assert score.value == pytest.approx(sum(by_hand(world["moe"])[:4]) / 4)


def test_experts_of_any_width_answer(world: dict[str, Path], tmp_path: Path) -> None:
    make_tokenizer(foreign(tmp_path / "odd", "mixtral", intermediate_size=22))
    given = {"tasks": "tiny_choice", "include": [str(world["tasks"])], "limit": 1}
    [warning] = evaluate_tasks(tmp_path / "odd", load_task_recipe(given=given)).warnings
    assert 'experts_implementation="eager"' in warning


def test_groups_and_metrics_that_are_no_means() -> None:
    """Groups in groups are pooled where their value is the pooled mean; a perplexity has no paired difference."""

    def result(right: float) -> dict[str, Any]:
        rows = [{"doc_id": i, "filter": "none", "acc": right, "perplexity": -3.0} for i in range(4)]
        return {
            "results": {"all": {"acc,none": right, "perplexity,none": 20.0}, "odd": {"acc,none": 0.123}},
            "group_subtasks": {"all": ["part"], "part": ["leaf"], "odd": ["leaf"]},
            "samples": {"leaf": rows},
        }

    scores = {
        (s.task, s.metric): s for s in task_scores(Answers("f", {"t": result(1.0)}), Answers("f", {"t": result(0.0)}))
    }
    assert scores["all", "acc"].difference == 1.0
    assert scores["all", "acc"].questions == 4
    assert scores["all", "perplexity"].difference is None
    assert scores["odd", "acc"].difference is None


def test_a_task_that_fails_keeps_the_others(world: dict[str, Path], tmp_path: Path) -> None:
    broken = yaml.safe_load((world["tasks"] / "tiny.yaml").read_text())
    broken |= {"task": "broken", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "broken.yaml").write_text(yaml.safe_dump(broken))
    given = {"tasks": ["broken", "tiny_choice"], "include": [str(world["tasks"]), str(tmp_path / "tasks")]}
    found = evaluate_tasks(world["moe"], load_task_recipe(given=given), dtype="float32")
    assert [score.task for score in found.scores] == ["tiny_choice"]
    assert "'broken' cannot be run" in found.failed["broken"]
    with pytest.raises(LlamaMoeError, match="'broken' cannot be run"):
        evaluate_tasks(world["moe"], load_task_recipe(given=given | {"tasks": "broken"}), dtype="float32")


def test_silly_requests(world: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="'tiny_chioce' is not a task"):
        evaluate_tasks(world["moe"], load_task_recipe(given={"tasks": "tiny_chioce", "include": [str(world["tasks"])]}))
    with pytest.raises(UsageError, match="is not a folder"):
        evaluate_tasks(world["moe"], load_task_recipe(given={"tasks": "piqa", "include": ["nowhere"]}))
    with pytest.raises(UsageError, match="num_fewshot"):
        load_task_recipe(given={"tasks": [{"task": "piqa", "num_fewshot": -1}]})
    for given in ({}, {"tasks": {"piqa": 0}}, {"tasks": 5}):
        with pytest.raises(UsageError, match="tasks"):
            load_task_recipe(given=given)


def test_the_paper_names_tasks_that_there_are() -> None:
    from lm_eval.tasks import TaskManager

    path = Path(__file__).parents[2] / "recipes" / "eval" / "llama_moe_paper.yaml"
    names = [request.task for request in load_task_recipe(path).tasks]
    assert len(names) == 11
    assert set(names) <= set(TaskManager().all_tasks)


def test_a_gguf_file_answers_as_its_folder_does(world: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from ..checkpoint.gguf.test_gguf import Kind, write_gguf

    path = tmp_path / "dense.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(world["dense"], dtype=torch.float32), Kind.F32)
    recipe = load_task_recipe(given={"tasks": "tiny_choice", "include": [str(world["tasks"])]})
    [score] = evaluate_tasks(path, recipe, against=world["dense"], tokenizer=world["dense"], dtype="float32").scores
    assert score.value == score.against
    assert score.difference == 0
