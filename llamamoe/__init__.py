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
    from .benching import Benchmark, bench
    from .budgeting import Allocation, allocate
    from .catalog import Matrix, Method, list_methods, matrix
    from .comparison import compare, plan_comparison
    from .config_compat import fix_config
    from .conversion import SplitResult, plan_conversion, split
    from .data.token_recipe import TokenizeRecipe, load_tokenize_recipe
    from .demonstration import DemoResult, demo
    from .densifying import DensifyResult, densify
    from .errors import CheckpointError, LlamaMoeError, RefusedError, StoppedError, UsageError, VerificationError
    from .evaluation import evaluate
    from .experts import register_experts
    from .exporting import GgufExport, export_gguf
    from .healing import HealResult, heal
    from .inspection import Inspection, inspect_checkpoint
    from .merging import MergeResult, merge
    from .pretraining import PretrainResult, pretrain
    from .recipe import SplitRecipe, load_recipe
    from .recovery.planning import plan_heal
    from .recovery.recipe import HealRecipe, load_heal_recipe
    from .reports import report
    from .retopping import RetopResult, retop
    from .scores import Evaluation
    from .studies.recipe import CompareRecipe, load_compare_recipe
    from .studies.table import Comparison
    from .task_evaluation import TaskEvaluation, TaskRecipe, evaluate_tasks, load_task_recipe
    from .tokenization import Tokenized, tokenize
    from .training.planning import PretrainPlan, plan_pretraining
    from .training.recipe import PretrainRecipe, load_pretrain_recipe
    from .verification import Verification, verify

_PLACES = {
    "split": "conversion",
    "plan_conversion": "conversion",
    "SplitResult": "conversion",
    "verify": "verification",
    "Verification": "verification",
    "SplitRecipe": "recipe",
    "load_recipe": "recipe",
    "allocate": "budgeting",
    "Allocation": "budgeting",
    "evaluate": "evaluation",
    "compare": "comparison",
    "plan_comparison": "comparison",
    "Comparison": "studies.table",
    "CompareRecipe": "studies.recipe",
    "load_compare_recipe": "studies.recipe",
    "Evaluation": "scores",
    "inspect_checkpoint": "inspection",
    "Inspection": "inspection",
    "list_methods": "catalog",
    "Method": "catalog",
    "matrix": "catalog",
    "Matrix": "catalog",
    "fix_config": "config_compat",
    "demo": "demonstration",
    "DemoResult": "demonstration",
    "heal": "healing",
    "HealResult": "healing",
    "plan_heal": "recovery.planning",
    "HealRecipe": "recovery.recipe",
    "load_heal_recipe": "recovery.recipe",
    "tokenize": "tokenization",
    "Tokenized": "tokenization",
    "TokenizeRecipe": "data.token_recipe",
    "load_tokenize_recipe": "data.token_recipe",
    "register_experts": "experts",
    "densify": "densifying",
    "DensifyResult": "densifying",
    "report": "reports",
    "export_gguf": "exporting",
    "GgufExport": "exporting",
    "evaluate_tasks": "task_evaluation",
    "load_task_recipe": "task_evaluation",
    "TaskEvaluation": "task_evaluation",
    "TaskRecipe": "task_evaluation",
    "bench": "benching",
    "Benchmark": "benching",
    "merge": "merging",
    "MergeResult": "merging",
    "retop": "retopping",
    "RetopResult": "retopping",
    "pretrain": "pretraining",
    "plan_pretraining": "training.planning",
    "PretrainPlan": "training.planning",
    "PretrainResult": "pretraining",
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
