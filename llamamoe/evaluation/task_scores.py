"""Compute scores of benchmark tasks from the harness's answers, with a paired test between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("acc_norm", "acc", "exact_match", "f1", "mc2", "word_perplexity", "perplexity", "bits_per_byte")
"""Metrics that are shown, all of them if a task has several; others are only in the harness's own output."""
PAIRED = frozenset({"acc_norm", "acc", "exact_match", "mc2"})
"""Metrics that are means over questions, for which a difference is the mean of the questions' differences."""
Z_95 = 1.959963984540054
"""Half-width of a 95 % confidence interval, in standard errors."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Its name; a group's parts are separate tasks.
        metric: Its name in the harness.
        num_fewshot: Examples before each question.
        questions: Number of questions.
        value: The model's value.
        stderr: Its standard error.
        against: The other model's, or None.
        difference: Model minus other, question by question; None if there is no other, or the metric is not a mean over
            questions (a group that weights its parts equally).
        difference_stderr: Standard error of that mean of pairs.
        interval: Its 95 % confidence interval (normal approximation).
    """

    task: str
    metric: str
    num_fewshot: int | None
    questions: int
    value: float
    stderr: float | None
    against: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Answers:
    """The harness's results for one model."""

    dtype: str
    results: dict[str, dict[str, Any]]


def task_scores(mine: Answers, theirs: Answers | None) -> list[TaskScore]:
    """Return every shown metric of every task; with ``theirs`` those that both models answered, with the difference."""
    scores = []
    for name, found in mine.results.items():
        other = None if theirs is None else theirs.results.get(name)
        if theirs is not None and other is None:
            continue  # failed with the other model
        for task, values in found["results"].items():
            for key, value in values.items():
                metric, _, kind = key.partition(",")
                if metric in METRICS and isinstance(value, int | float):
                    scores.append(_score(found, other, task, metric, kind, float(value)))
    return scores


def _score(
    found: Mapping[str, Any], other: Mapping[str, Any] | None, task: str, metric: str, kind: str, value: float
) -> TaskScore:
    results = found["results"][task]
    stderr = results.get(f"{metric}_stderr,{kind}")
    mine = _samples(found, task, metric, kind)
    theirs = {} if other is None or metric not in PAIRED else _samples(other, task, metric, kind)
    pairs = [(value, theirs[key]) for key, value in mine.items() if key in theirs]
    if pairs and abs(sum(a for a, _ in pairs) / len(pairs) - value) > 1e-6:
        pairs = []  # not a plain mean over these questions
    mean, error = _paired(pairs)
    return TaskScore(
        task=task,
        metric=metric,
        num_fewshot=found.get("n-shot", {}).get(task),
        questions=len(mine) or int(found.get("n-samples", {}).get(task, {}).get("effective", 0)),
        value=value,
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        against=None if other is None else float(other["results"][task][f"{metric},{kind}"]),
        difference=mean,
        difference_stderr=error,
        interval=None if mean is None or error is None else (mean - Z_95 * error, mean + Z_95 * error),
    )


def _samples(found: Mapping[str, Any], task: str, metric: str, kind: str) -> dict[tuple[str, int], float]:
    """Return the metric of every question, by part and number; for a group, those of all its parts, recursively."""
    values = {}
    for part in _leaves(found.get("group_subtasks", {}), task):
        for sample in found.get("samples", {}).get(part, ()):
            value = sample.get(metric)
            if sample.get("filter", kind) == kind and isinstance(value, int | float):
                values[part, int(sample["doc_id"])] = float(value)
    return values


def _leaves(groups: Mapping[str, Sequence[str]], task: str) -> list[str]:
    """Return the tasks below a group; a task is its own only one."""
    parts = [part for part in groups.get(task) or () if part != task]
    return [leaf for part in parts for leaf in _leaves(groups, part)] if parts else [task]


def _paired(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Return the mean of the differences and its standard error; None where there are no (fewer than two) pairs."""
    if not pairs:
        return None, None
    gaps = [a - b for a, b in pairs]
    mean = sum(gaps) / len(gaps)
    if len(gaps) < 2:
        return mean, None
    variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return mean, math.sqrt(variance / len(gaps))
