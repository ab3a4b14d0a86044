"""``llamamoe.evaluate_tasks``: run tasks of lm-evaluation-harness, with a paired test between two models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import LlamaMoeError, MissingExtraError, UsageError, near_misses
from ..lazy import lm_eval
from ..progress import ProgressCallback, counting, ignore_progress
from ..recipes import Recipe
from .task_scores import Answers, TaskScore, task_scores


class TaskRequest(BaseModel):
    """One task of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(min_length=1, description="Name of the task in lm-evaluation-harness, or in a file of include.")
    num_fewshot: int | None = Field(
        None, ge=0, le=1000, description="Few-shot examples before each question; null: the task's own number."
    )


def _requests(value: Any) -> Any:
    """Return requests from names, or from mappings with a number of examples."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        return value  # pydantic reports the error
    return [{"task": each} if isinstance(each, str) else each for each in value]


class TaskRecipe(Recipe):
    """The tasks to run, and their settings."""

    tasks: Annotated[tuple[TaskRequest, ...], BeforeValidator(_requests)] = Field(
        min_length=1, description="Tasks: names, or mappings {task: NAME, num_fewshot: N}."
    )
    include: tuple[str, ...] = Field((), description="Folders with your own tasks, as YAML files of the harness.")
    limit: int | None = Field(None, ge=1, description="Maximum number of questions per task; null: all.")


load_task_recipe = TaskRecipe.load


@dataclass(frozen=True)
class TaskEvaluation:
    """The result of an evaluation by tasks.

    Attributes:
        model: The model.
        against: The other one, or None.
        dtype: Dtype of the weights.
        harness: Version of lm-evaluation-harness.
        limit: Maximum number of questions per task, or None for all.
        scores: Scores by task and metric.
        failed: Tasks that could not be run, with the reason.
        warnings: Sentences for the user, such as that experts run one by one.
    """

    model: str
    against: str | None
    dtype: str
    harness: str
    limit: int | None
    scores: tuple[TaskScore, ...]
    failed: dict[str, str]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return asdict(self)


def evaluate_tasks(
    model: str | Path,
    recipe: TaskRecipe,
    *,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> TaskEvaluation:
    """Run tasks of lm-evaluation-harness on one or two models, with one in memory at a time.

    Data on the hub are downloaded by the harness; your own tasks can be on disk (``include``). The
    paired test compares question by question, so that it detects differences that two separate standard errors hide.

    Args:
        model: A folder, a ``.gguf`` file or a hub id.
        recipe: The tasks.
        against: Another model.
        tokenizer: For GGUF files, a folder whose tokenizer is used instead of the one in the file.
        batch_size: Requests that run together.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: A torch device, or ``"auto"``.
        progress: Called after every task.

    Raises:
        MissingExtraError: The harness is not installed (``pip install 'llamamoe[eval]'``).
        UsageError: A task, model or device does not exist.
        LlamaMoeError: No task can be run; a single failing task (for example, because its data cannot be downloaded) is
            reported in the result.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "Running tasks of lm-evaluation-harness")
    from ..models.devices import pick_device
    from ..models.loading import open_models

    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1.")
    device = pick_device(device)
    manager = _manager(recipe)
    places = [each for each in (model, against) if each is not None]
    opened = open_models(places, tokenizer=tokenizer)
    tell = counting("evaluate", len(places) * len(recipe.tasks), "task", progress)
    run = _Run(recipe, manager, batch_size, dtype, device, tell)
    mine = run.ask(opened[0])
    theirs = run.ask(opened[1]) if against is not None else None
    return TaskEvaluation(
        model=str(model),
        against=None if against is None else str(against),
        dtype=mine.dtype,
        harness=version("lm_eval"),
        limit=recipe.limit,
        scores=tuple(task_scores(mine, theirs)),
        failed=run.failed,
        warnings=tuple(note for side in opened for note in side.notes),
    )


def _manager(recipe: TaskRecipe) -> Any:
    """Return the harness's tasks and those of the recipe's folders, after checking every name."""
    for folder in recipe.include:
        if not Path(folder).expanduser().is_dir():
            raise UsageError(f"include: {folder} is not a folder.")
    manager = lm_eval.tasks.TaskManager(include_path=[str(Path(each).expanduser()) for each in recipe.include] or None)
    for request in recipe.tasks:
        if request.task not in manager.all_tasks:
            raise UsageError(
                f"{request.task!r} is not a task of lm-evaluation-harness.",
                hint=near_misses(request.task, manager.all_tasks),
            )
    return manager


@dataclass(frozen=True)
class _Run:
    """The settings of a run; ``failed`` collects failures."""

    recipe: TaskRecipe
    manager: Any
    batch_size: int
    dtype: str
    device: str
    tell: Callable[[str], None]
    failed: dict[str, str] = field(default_factory=dict)

    def ask(self, side: Any) -> Answers:
        """Run all tasks on one model."""
        from lm_eval.models.huggingface import HFLM

        from ..models.loading import free_memory, load_weights

        model = load_weights(side, self.dtype, self.device)
        dtype = str(model.dtype).removeprefix("torch.")
        wrapped = HFLM(pretrained=model, tokenizer=side.tokenizer, backend="causal", batch_size=self.batch_size)
        results = {}
        for request in self.recipe.tasks:
            if request.task not in self.failed:
                try:
                    results[request.task] = self._one(wrapped, request)
                except LlamaMoeError as error:
                    self.failed[request.task] = error.message
                    if len(self.failed) == len(self.recipe.tasks):
                        raise
            self.tell(f"{side.name}: {request.task}")
        del model, wrapped
        free_memory()
        return Answers(dtype, results)

    def _one(self, wrapped: Any, request: TaskRequest) -> dict[str, Any]:
        try:
            found: dict[str, Any] | None = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[request.task],
                num_fewshot=request.num_fewshot,
                limit=self.recipe.limit,
                task_manager=self.manager,
                log_samples=True,
                bootstrap_iters=1000,
            )
        except Exception as error:  # foreign data sets and tasks can fail in any way
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise LlamaMoeError(
                f"the task {request.task!r} cannot be run: {lines[0]}",
                hint="Its data may have to be downloaded first (is there a network, and is HF_HUB_OFFLINE unset?).",
            ) from error
        if found is None:
            raise LlamaMoeError("only the first process of a distributed run has results: start one process.")
        return found
