"""``llamamoe mix``: several dense models as the experts of one mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._format import error, plural, size
from ._output import Output, kept_when_interrupted, output_options
from ._plan import costs, expert_width, print_warnings
from ._recipe_options import recipe_file
from ._style import COUNT, Command, check_resume_or_force, flag, run_options
from ._tables import facts, heading, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.mix import MixResult
    from llamamoe.transforms.mixing.plan import MixPlan
    from llamamoe.transforms.mixing.recipe import MixRecipe

HELP = """Make the FFNs of several fine-tuned models the experts of one mixture of experts in the folder OUT.

BASE is the dense model that all of them were trained from; attention, norms, embedding and head are taken from it. The models
must have its architecture, its sizes and its tokenizer. One expert alone computes BASE with the FFNs of its model, which is
verified for each expert.

Files are written to OUT.partial, which is renamed to OUT once everything in it has been verified.

Flags override the values of the recipe, and --set overrides both.
"""
EXAMPLES = """
llamamoe mix BASE OUT --expert CODE --expert MATHS --dry-run
llamamoe mix BASE OUT --expert BASE --expert CODE --expert MATHS --top-k 2
llamamoe mix BASE OUT --expert CODE --expert MATHS --prompts prompts.yaml
llamamoe mix BASE OUT --expert CODE --expert MATHS --text code/ --text maths.jsonl
llamamoe mix BASE OUT --recipe my.yaml --resume
"""
RECIPE, WRITING, RUN = "Recipe", "Output", "Run"


def _weights(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | str | None:
    if value is None or "," not in value:
        return value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither base, average nor a list of numbers such as 0.5,0.25,0.25."
        ) from None


@click.command(cls=Command, section="Convert", rank=1, short_help="Make several fine-tuned models the experts of one.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("base")
@click.argument("out", required=False)
@flag("--expert", "experts", group=RECIPE, metavar="MODEL", multiple=True, key="experts",
      text="A model whose FFNs become an expert: a folder or Hub id; repeat it for each expert.")  # fmt: skip
@flag(
    "--recipe", group=RECIPE, metavar="FILE|NAME", text="A YAML file, or the name of a recipe that ships with llamamoe."
)
@flag("--set", "overrides", group=RECIPE, metavar="KEY=VALUE", multiple=True,
      text="Set one key of the recipe, such as top_k=1; may be repeated.")  # fmt: skip
@flag("--backbone", group=RECIPE, metavar="base|average|W,W,..", callback=_weights,
      text="Attention, norms, embedding and head: BASE's, averaged over the experts, or weights of BASE and each expert.  "
      "[default: base]")  # fmt: skip
@flag("--top-k", group=RECIPE, metavar="K", type=int, text="Models selected per token.  [default: 2]")
@flag(
    "--router",
    group=RECIPE,
    metavar="NAME",
    text="How the router is made: random (to be trained), hidden (from prompts) or text (from a text of each expert).  [default: random]",
)
@flag("--prompts", group=RECIPE, metavar="FILE",
      text="Positive and negative prompts of each expert, YAML or JSON: makes a hidden router.")  # fmt: skip
@flag("--text", "texts", group=RECIPE, metavar="PATH", multiple=True, key="texts",
      text="Text of the kind that an expert is for: a file, folder or glob; repeat it for each expert, in their order: makes a text "
      "router.")  # fmt: skip
@flag(
    "--text-tokens",
    group=RECIPE,
    metavar="N",
    type=COUNT,
    text="Maximum number of tokens of each text.  [default: 16384]",
)
@flag(
    "--router-std",
    group=RECIPE,
    metavar="X",
    type=float,
    text="Standard deviation of a random router.  [default: 0.02]",
)
@flag("--seed", group=RECIPE, metavar="N", type=int, text="Random seed.  [default: 0]")
@flag("--target", group=WRITING, metavar="NAME", text="Target architecture in transformers.  [default: auto]")
@flag("--dtype", group=WRITING, metavar="NAME",
      text="Dtype of the stored weights: float32, bfloat16 or float16.  [default: BASE's]")  # fmt: skip
@flag("--shard-size", group=WRITING, metavar="SIZE",
      text="Maximum size of one weights file, for example 5GB or 500MB.  [default: 5GB]")  # fmt: skip
@flag("--dry-run", group=RUN, is_flag=True, text="Print the plan and write nothing; only file headers are read.")
@run_options(RUN, resume="Resume an interrupted run of the same command.",
              force="Replace an existing checkpoint in OUT and discard the files of an interrupted run.")  # fmt: skip
@flag("--no-verify", group=RUN, is_flag=True, text="Skip the comparison of each expert with its model.")
@output_options
def command(
    base: str,
    out: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    resume: bool,
    force: bool,
    no_verify: bool,
    output: Output,
    **given: Any,
) -> None:
    """Parse, then plan or mix, then print."""
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT': the folder to write.")
    check_resume_or_force(resume, force)
    given |= {"experts": list(given["experts"]) or None, "texts": list(given["texts"]) or None}
    for key, router in (("prompts", "hidden"), ("texts", "text")):
        if given[key] is not None and given["router"] is None:
            given["router"] = router
    complete = _recipe(recipe, given, overrides)
    if dry_run:
        _plan(base, out, complete, resume, force, output)
        return
    from llamamoe import mix

    with kept_when_interrupted(str(out)), output.progress() as report:
        found = mix(base, str(out), complete, verify=not no_verify, resume=resume, force=force, progress=report)
    output.result(
        {"out": str(found.out), **found.receipt}, lambda: _print(found), summary=True, warnings=found.warnings
    )


def _recipe(recipe: str | None, given: dict[str, Any], overrides: tuple[str, ...]) -> MixRecipe:
    from llamamoe.transforms.mixing.recipe import load_mix_recipe

    with recipe_file(recipe, "mix") as path:
        return load_mix_recipe(path, given=given, overrides=overrides)


def _plan(base: str, out: str | None, recipe: MixRecipe, resume: bool, force: bool, output: Output) -> None:
    from llamamoe.transforms.mixing.plan import check_mix_place, plan_mix

    plan = plan_mix(base, recipe)
    if out is not None:
        check_mix_place(plan, out, resume=resume, force=force)
    output.result({"dry_run": True, "out": out, **plan.to_json()}, lambda: _print_plan(plan))


def _print_plan(plan: MixPlan) -> None:
    layout = plan.layout.layout
    echo(bold(f"{plan.places[0].name}: {plan.base.source.name} -> {plan.layout.target.name}"))
    facts([
        *((f"expert {i}", place.name) for i, place in enumerate(plan.places[1:])),
        ("selected", f"{layout.top_k} of {layout.num_experts} per token; {plan.exactness}"),
        ("expert width", expert_width(layout, plan.layout.padding_per_layer)),
        ("router", plan.recipe.router),
        ("loads in", f"transformers {' and '.join(plan.layout.majors)}"),
        ("to write", f"{size(plan.layout.cost.nbytes)} of {plan.recipe.dtype} in {plural(len(plan.layout.shards), 'file')}"),
        ("memory", f"{size(plan.peak_bytes)} at most"),
    ])  # fmt: skip
    heading("Costs")
    costs(plan.layout.parent_cost, plan.layout.cost)
    print_warnings(plan.warnings)
    echo("\nNothing was written.")


def _print(found: MixResult) -> None:
    plan = found.plan
    echo(bold(f"{found.out}: {plan.layout.target.name} of {len(plan.experts)} models, ready for transformers."))
    checks = found.receipt.get("verification", {}).get("experts", [])
    if checks:
        rows = [(str(each["expert"]), each["model"], _compared(each, plan.rest)) for each in checks]
        table(("expert", "model", "alone, it computes"), rows, right=(0,))
    else:
        echo("Not verified (--no-verify).")
    fit = found.receipt.get("router_fit", [])
    if fit:
        shares = [each["held_out_accuracy"] for each in fit]
        chance = 1 / len(plan.experts)
        echo(
            f"Router: on held-out tokens of the texts it ranks the right expert first in {min(shares):.0%} to {max(shares):.0%} by layer "
            f"(by chance {chance:.0%})."
        )
    print_warnings(found.warnings)


def _compared(check: dict[str, Any], rest: str) -> str:
    if not check["passed"]:
        return f"NOT checked: {check['note']}"
    what = "the model" if check["is_the_model"] else f"{rest} with its FFNs"
    return f"{what}: logits differ by {error(check['equal_weights'])} of the largest"
