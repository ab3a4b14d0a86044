"""Turn a trained dense LLaMA-style language model into a sparse mixture of experts that plain transformers loads.

    import llamamoe

    recipe = llamamoe.load_recipe(given={"num_experts": 8, "top_k": 2, "method": "kmeans"})
    llamamoe.split("path/to/dense", "path/to/moe", recipe)

Importing this package imports neither torch nor transformers; the names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .architectures.inspect import Inspection, inspect_checkpoint
    from .catalog import Matrix, Method, list_methods, matrix
    from .conversion.recipe import SplitRecipe, load_recipe
    from .conversion.split import SplitResult, plan_conversion, split
    from .conversion.verify import Verification, verify
    from .data.recipe import TokenizeRecipe, load_tokenize_recipe
    from .data.tokenize import Tokenized, tokenize
    from .errors import CheckpointError, LlamaMoeError, RefusedError, StoppedError, UsageError, VerificationError
    from .evaluation.bench import Benchmark, bench
    from .evaluation.perplexity import evaluate
    from .evaluation.scores import Evaluation
    from .evaluation.tasks import TaskEvaluation, TaskRecipe, evaluate_tasks, load_task_recipe
    from .healing.heal import HealResult, heal
    from .healing.plan import plan_heal
    from .healing.recipe import HealRecipe, load_heal_recipe
    from .models.experts import register_experts
    from .reporting.report import report
    from .studies.budget.budget import Allocation, allocate
    from .studies.compare import compare, plan_comparison
    from .studies.demo import DemoResult, demo
    from .studies.recipe import CompareRecipe, load_compare_recipe
    from .studies.table import Comparison
    from .training.plan import PretrainPlan, plan_pretraining
    from .training.pretrain import PretrainResult, pretrain
    from .training.recipe import PretrainRecipe, load_pretrain_recipe
    from .transforms.densify import DensifyResult, densify
    from .transforms.export_gguf import GgufExport, export_gguf
    from .transforms.fix_config import fix_config
    from .transforms.merge import MergeResult, merge
    from .transforms.retop import RetopResult, retop

_PLACES = {
    "split": "conversion.split",
    "plan_conversion": "conversion.split",
    "SplitResult": "conversion.split",
    "verify": "conversion.verify",
    "Verification": "conversion.verify",
    "SplitRecipe": "conversion.recipe",
    "load_recipe": "conversion.recipe",
    "allocate": "studies.budget.budget",
    "Allocation": "studies.budget.budget",
    "evaluate": "evaluation.perplexity",
    "compare": "studies.compare",
    "plan_comparison": "studies.compare",
    "Comparison": "studies.table",
    "CompareRecipe": "studies.recipe",
    "load_compare_recipe": "studies.recipe",
    "Evaluation": "evaluation.scores",
    "inspect_checkpoint": "architectures.inspect",
    "Inspection": "architectures.inspect",
    "list_methods": "catalog",
    "Method": "catalog",
    "matrix": "catalog",
    "Matrix": "catalog",
    "fix_config": "architectures.config_compat",
    "demo": "studies.demo",
    "DemoResult": "studies.demo",
    "heal": "healing.heal",
    "HealResult": "healing.heal",
    "plan_heal": "healing.planning",
    "HealRecipe": "healing.recipe",
    "load_heal_recipe": "healing.recipe",
    "tokenize": "data.tokenize",
    "Tokenized": "data.tokenize",
    "TokenizeRecipe": "data.recipe",
    "load_tokenize_recipe": "data.recipe",
    "register_experts": "models.experts",
    "densify": "transforms.densify",
    "DensifyResult": "transforms.densify",
    "report": "reporting.report",
    "export_gguf": "transforms.export_gguf",
    "GgufExport": "transforms.export_gguf",
    "evaluate_tasks": "evaluation.tasks",
    "load_task_recipe": "evaluation.tasks",
    "TaskEvaluation": "evaluation.tasks",
    "TaskRecipe": "evaluation.tasks",
    "bench": "evaluation.bench",
    "Benchmark": "evaluation.bench",
    "merge": "transforms.merge",
    "MergeResult": "transforms.merge",
    "retop": "transforms.retop",
    "RetopResult": "transforms.retop",
    "pretrain": "training.pretrain",
    "plan_pretraining": "training.plan",
    "PretrainPlan": "training.plan",
    "PretrainResult": "training.pretrain",
    "PretrainRecipe": "training.recipe",
    "load_pretrain_recipe": "training.recipe",
    "LlamaMoeError": "errors",
    "UsageError": "errors",
    "RefusedError": "errors",
    "CheckpointError": "errors",
    "StoppedError": "errors",
    "VerificationError": "errors",
}

__all__ = [
    "Allocation",
    "Benchmark",
    "CheckpointError",
    "CompareRecipe",
    "Comparison",
    "DemoResult",
    "DensifyResult",
    "Evaluation",
    "GgufExport",
    "HealRecipe",
    "HealResult",
    "Inspection",
    "LlamaMoeError",
    "Matrix",
    "MergeResult",
    "Method",
    "PretrainPlan",
    "PretrainRecipe",
    "PretrainResult",
    "RefusedError",
    "RetopResult",
    "SplitRecipe",
    "SplitResult",
    "StoppedError",
    "TaskEvaluation",
    "TaskRecipe",
    "TokenizeRecipe",
    "Tokenized",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "allocate",
    "bench",
    "compare",
    "demo",
    "densify",
    "evaluate",
    "evaluate_tasks",
    "export_gguf",
    "fix_config",
    "heal",
    "inspect_checkpoint",
    "list_methods",
    "load_compare_recipe",
    "load_heal_recipe",
    "load_pretrain_recipe",
    "load_recipe",
    "load_task_recipe",
    "load_tokenize_recipe",
    "matrix",
    "merge",
    "plan_comparison",
    "plan_conversion",
    "plan_heal",
    "plan_pretraining",
    "pretrain",
    "register_experts",
    "report",
    "retop",
    "split",
    "tokenize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
