"""The outcome of a conversion, for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._format import amount, change, error, plural, size, took
from ._plan import ffn_active, print_advice, print_warnings
from ._tables import facts, heading
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.conversion.plan import SplitPlan
    from llamamoe.conversion.split import SplitResult


def print_result(result: SplitResult) -> None:
    """Print the result of a conversion."""
    from llamamoe.conversion.advice import UNTRAINED

    plan, run = result.plan, result.receipt["run"]
    echo("\n", bold(str(result.out)), f": {plan.target.name}, ready for transformers.")
    before, after = plan.parent_cost, plan.cost
    active = change(before.active_parameters, after.active_parameters)
    facts(
        [
            (
                "parameters",
                f"{amount(after.total_parameters)}; {amount(after.active_parameters)} active, in the parent "
                f"{amount(before.active_parameters)} ({active})",
            ),
            ("FFN active", ffn_active(plan)),
            ("files", f"{plural(len(plan.shards), 'file')}, {size(after.nbytes)}"),
            *_verified(plan, result.receipt.get("verification")),
            *layer_errors(result.receipt["layers"], "the dense output", "0 is the parent, 1 as far away as zeros"),
            ("took", f"{took(run)}, at most {size(run['peak_resident_bytes'])} of memory"),
            *(
                [("notes", f"{plural(len(plan.advice), 'note')} in {result.out / 'README.md'}")]
                if plan.recipe.card and plan.advice
                else []
            ),
        ]
    )
    print_warnings(result.warnings)
    if plan.recipe.card:
        print_advice([note for note in plan.advice if note == UNTRAINED])
    else:
        print_advice(plan.advice)
    _next_commands(result)


def _next_commands(result: SplitResult) -> None:
    """Print the commands that measure and run the result."""
    from llamamoe.models.devices import pick_device
    from llamamoe.transforms.export_gguf import runs_in_llama_cpp

    plan, out = result.plan, shlex.quote(str(result.out))
    models = f"{out} --against {shlex.quote(plan.source)}"
    heading("Measure it (HELD_OUT_TEXT: a file or folder of text that was not used for calibration)")
    echo(f"  llamamoe evaluate {models} --text HELD_OUT_TEXT")
    experts_on_cpu = plan.target.routed and not plan.target.attention_experts and pick_device("auto") == "cpu"
    echo(f"  llamamoe bench {models}{' --experts llamamoe_auto' if experts_on_cpu else ''}")
    if plan.target.routed:
        echo(f"  llamamoe report {models} --text HELD_OUT_TEXT")
    if runs_in_llama_cpp(result.out):
        heading("Run it in llama.cpp, and measure its speed there (extra clients)")
        echo(f"  llamamoe export-gguf {out} {out}.gguf")
        both = runs_in_llama_cpp(plan.model.checkpoint.path)
        echo(f"  llamamoe bench {models if both else out} --program llama.cpp")


def layer_errors(layers: Sequence[Mapping[str, Any]], of: str, ends: str) -> list[tuple[str, str]]:
    """Return a row with the errors of layer outputs on the calibration text, if there was any.

    Args:
        layers: Facts of the layers.
        of: The outputs that the errors are relative to.
        ends: The meaning of the numbers.
    """
    after = sorted(layer["output_error"] for layer in layers if "output_error" in layer)
    before = sorted(layer["output_error_before_repair"] for layer in layers if "output_error_before_repair" in layer)
    if not after:
        return []
    was = f" ({before[len(before) // 2]:.2f} before repair)" if before else ""
    middle = after[len(after) // 2]
    text = f"{middle:.2f} of {of} on the calibration text, in the median layer{was}; {ends}. Less text is fitted more closely: `evaluate` compares"
    return [("layer error", text)]


def _verified(plan: SplitPlan, check: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return the outcome of the comparison with the parent; ``check`` is `Verification` as plain data."""
    if check is None:
        return [("parity", "not checked (--no-verify); `llamamoe verify` does it")]
    if not check["passed"]:
        return [("parity", f"NOT checked: {check['note']}")]
    if check["equal_weights"] is None:
        return [
            ("verified", "files, names, shapes, and all weights that are kept from the parent"),
            (
                "parity",
                f"not meant to be: {_why_not(plan)}, so outputs differ; perplexity says what that costs",
            ),
        ]
    text = f"logits differ by {error(check['equal_weights'])} of the largest with all experts at equal weights"
    if check["as_stored"] is not None:
        text += f", {error(check['as_stored'])} with the router as stored"
    return [("parity", text)]


def _why_not(plan: SplitPlan) -> str:
    if plan.fitted:
        return "weights are refitted to the parent's output"
    return "neurons are changed or repeated" if plan.target.routed else "neurons are left out"
