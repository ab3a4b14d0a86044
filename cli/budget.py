"""``llamamoe budget``: which layers stay dense under one budget of active parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamamoe.checkpoint.files import write_text
from llamamoe.errors import UsageError

from ._format import amount
from ._output import Interrupted, Output, output_options
from ._recipe_options import recipe_file, split_options
from ._style import COUNT, Command, Name, Option, flag, tokenizer_option
from ._tables import bullets, facts, heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.conversion.recipe import SplitRecipe
    from llamamoe.studies.budget.budget import Allocation

HELP = """Choose which layers of SOURCE stay dense under a budget of active parameters, from their measured sensitivity.

All converted layers have the same sizes, because the architectures in transformers require it. A layer that stays dense
spends its whole FFN of the budget, which leaves less for the others. The sensitivity of each layer is measured on
calibration text: by a proxy (one dense pass, no conversion), or by converting that layer alone and taking the KL
divergence of the model's output (kl; each of --points takes about as long as one conversion, plus the passes from each
layer to the output).

The result is a recipe for `llamamoe split`. Given values of --experts and --shared are kept; k and the dense layers are
always chosen from the budget.
"""
EXAMPLES = """
llamamoe budget SOURCE --budget 0.5 --calibration texts/ --write-recipe half.yaml
llamamoe budget SOURCE --budget 0.5 --calibration texts/ --measure kl --points 1
llamamoe split SOURCE OUT --recipe half.yaml
"""
BUDGET, RUN = "Budget", "Run"
_CHOSEN = ("top_k", "active", "keep_dense", "prefer")
"""Keys of the recipe that follow from the budget or have no effect beside it, so that they are no flags here."""
_UNSET = {
    "num_experts": "Routed experts per layer (N).  [default: about 24, whatever fills the budget]",
    "shared": "Neurons that every token uses: a share or a count.  [default: from --shared-of-active]",
}
"""Help of options whose default here differs from that of ``split``."""


def _measures() -> list[str]:
    from llamamoe.studies.budget.sensitivities import SENSITIVITIES

    return SENSITIVITIES.names()


@click.command(cls=Command, section="Convert", rank=1, short_help="Choose expert sizes and dense layers for a budget.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("source")
@flag("--budget", group=BUDGET, metavar="SHARE", type=float, default=0.5, show_default=True,
       text="Active multiply-adds of the FFNs per token, router and padding included, as a share of the dense FFNs'.")  # fmt: skip
@flag("--measure", group=BUDGET, metavar="proxy|kl", type=Name(_measures), default="proxy", show_default=True,
       text="How to measure sensitivity.")  # fmt: skip
@flag("--shared-of-active", group=BUDGET, metavar="SHARE", type=float, default=0.5, show_default=True,
       text="Share of the active neurons that are shared, if --shared is not given.")  # fmt: skip
@flag("--points", group=BUDGET, metavar="N", type=int, default=2, show_default=True,
       text="With kl: number of shares at which each layer is converted (the budget, 3/4 of it, ...).")  # fmt: skip
@flag("--held-out-tokens", group=BUDGET, metavar="N", type=COUNT, default=4096, show_default=True,
       text="With kl: maximum number of tokens on which outputs are compared, from the last fifth of the text.")  # fmt: skip
@flag(
    "--recipe",
    group="Recipe",
    metavar="FILE|NAME",
    text="A YAML file, or the name of a recipe that ships with llamamoe.",
)
@flag("--set", "overrides", group="Recipe", metavar="KEY=VALUE", multiple=True,
       text="Set one key of the recipe, such as method.max_iter=50; may be repeated.")  # fmt: skip
@split_options
@flag("--write-recipe", group=RUN, metavar="FILE", text="Write the result as a recipe for `llamamoe split --recipe`.")
@flag("--force", group=RUN, is_flag=True, text="Replace FILE if it exists.")
@tokenizer_option(RUN)
@output_options
def command(
    source: str,
    budget: float,
    measure: str,
    shared_of_active: float,
    points: int,
    held_out_tokens: int,
    recipe: str | None,
    overrides: tuple[str, ...],
    write_recipe: str | None,
    force: bool,
    tokenizer: str | None,
    output: Output,
    **given: Any,
) -> None:
    """Parse, then measure and choose, then print."""
    file = Path(write_recipe).expanduser() if write_recipe else None
    if file is not None:
        _check_file(file, force)
    complete = _recipe(recipe, given, overrides)
    keys = {"shared_of_active": shared_of_active, "points": points, "held_out_tokens": held_out_tokens}
    allocation = _allocate(source, complete, budget, output, measure=measure, tokenizer=tokenizer, **keys)
    if file is not None:
        write_text(file, allocation.to_yaml())
    output.result(
        {**allocation.to_json(), "written": write_recipe},
        lambda: _print(allocation, write_recipe, verbose=output.verbose),
    )


command.params = [param for param in command.params if param.name not in _CHOSEN]
for _param in command.params:
    if isinstance(_param, Option) and _param.name in _UNSET:
        _param.help, _param.explain = _UNSET[_param.name], None


def _check_file(file: Path, force: bool) -> None:
    """Before anything is measured: can the recipe be written?"""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"--write-recipe {str(file)!r}: not a file name in an existing folder.")
    if file.exists() and not force:
        raise UsageError(f"--write-recipe {str(file)!r} already exists.", hint="--force replaces it.")


def _recipe(recipe: str | None, given: dict[str, Any], overrides: tuple[str, ...]) -> SplitRecipe:
    from llamamoe.conversion.recipe import load_recipe

    with recipe_file(recipe) as path:
        return load_recipe(path, given=given, overrides=overrides)


def _allocate(source: str, recipe: SplitRecipe, budget: float, output: Output, **keys: Any) -> Allocation:
    import llamamoe

    try:
        with output.progress() as report:
            return llamamoe.budget(source, recipe, budget, progress=report, **keys)
    except KeyboardInterrupt:
        raise Interrupted("nothing was written") from None


def _print(allocation: Allocation, written: str | None, *, verbose: bool) -> None:
    dense = ", ".join(map(str, allocation.keep_dense)) or "none"
    echo(bold(f"{allocation.source}: {100 * allocation.active_share:.2f} % of the FFNs active"))
    facts(
        [
            ("target", f"{allocation.target} (dense layers: {allocation.dense_form})"),
            ("kept dense", dense),
            ("the others", f"{allocation.top_k} of {allocation.num_experts} experts of {allocation.expert_width} neurons, "
                           f"{allocation.shared} shared: {100 * allocation.layer_share:.1f} %"),
            ("damage", f"{allocation.damage:.4g} {allocation.unit}; {allocation.damage_uniform:.4g} if no layer stays dense"),
            ("measured by", f"{allocation.measure} (about {amount(allocation.flops)} operations)"),
        ]
    )  # fmt: skip
    _layers(allocation)
    if verbose and len(allocation.by_count) > 1:
        _alternatives(allocation)
    if allocation.warnings:
        heading("Warnings")
        bullets(allocation.warnings, mark="!")
    if verbose:
        heading("Recipe")
        echo("".join(f"  {line}\n" for line in allocation.recipe.to_yaml().splitlines()), nl=False)
    if written:
        echo()
        paragraph(f"llamamoe split {allocation.source} OUT --recipe {written}")


def _layers(allocation: Allocation) -> None:
    """Print every layer's damage, and the shared neurons that it would have if layers might differ."""
    heading("Layers")
    note = allocation.simulated["per_layer_shared"] is not None
    rows = [
        (
            str(layer.layer),
            f"{layer.damage_uniform:.4g}",
            "dense" if layer.dense else f"{layer.damage:.4g}",
            str(layer.simulated_shared) if note else "",
        )
        for layer in allocation.layers
    ]
    table(
        ("layer", "damage, all alike", "damage", "shared neurons (simulated)" if note else ""), rows, right=(0, 1, 2, 3)
    )
    if note:
        echo()
        paragraph(
            f"With another number of shared neurons in every layer the damage would be {allocation.simulated['damage']:.4g}: "
            f"{allocation.simulated['note']}."
        )


def _alternatives(allocation: Allocation) -> None:
    """Print the details of ``-v``: the best set for every number of dense layers."""
    heading("By number of dense layers")
    rows = [
        (
            str(len(each["layers"])),
            f"{100 * each['layer_share']:.1f} %",
            f"{each['damage']:.4g}",
            ", ".join(map(str, each["layers"])),
        )
        for each in allocation.by_count
    ]
    table(("dense", "the others", "damage", "layers"), rows, right=(0, 1, 2))
