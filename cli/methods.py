"""``llamamoe methods``: list methods, targets and model families."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from llamamoe.errors import UsageError, near_misses

from ._output import Output, output_options
from ._style import Command, Option
from ._tables import bullets, facts, heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.catalog import Cell, Matrix, Method

HELP = """List the methods for each step of a conversion and for training, the target architectures and the model families.

With NAME, show the details of that method, including its options.
"""
EXAMPLES = """
llamamoe methods
llamamoe methods kmeans
llamamoe methods --matrix
"""
TITLES = {
    "splitter": "How neurons are partitioned (--method)",
    "router": "How the router is initialised (--router)",
    "shared_by": "How shared neurons are chosen (--shared-by)",
    "rescale": "Factor on the output of selected experts (--rescale)",
    "repair": "How weights are fitted to the dense output on calibration text (--repair)",
    "target": "Target architectures (--target)",
    "family": "Dense model families that can be converted",
    "loss": "Auxiliary losses on the routing during training (losses: in recipes of pretrain; in those of heal a coefficient only)",
    "gate": "How tokens are routed during training (gate:)",
    "update": "How the mixture of domains changes during training (data.update:)",
    "experts": "How experts are computed (experts_implementation:, or from_pretrained)",
}
KEYS = {"splitter": "method", "update": "data.update"}
"""Kind to key of the recipe, where they differ."""


@click.command(cls=Command, section="Inspect and verify", rank=2, short_help="List methods, targets and model families.", help=HELP,
               examples=EXAMPLES)  # fmt: skip
@click.argument("name", required=False)
@click.option("--matrix", "as_matrix", cls=Option, group="List", is_flag=True,
              help="Show which family can be converted to which architecture.")  # fmt: skip
@output_options
def command(name: str | None, as_matrix: bool, output: Output) -> None:
    """Parse, list, print."""
    from llamamoe.catalog import list_methods, matrix

    if as_matrix:
        if name is not None:
            raise click.UsageError("NAME and --matrix are mutually exclusive.")
        found = matrix()
        output.result(found.to_json(), lambda: _print_matrix(found, verbose=output.verbose))
        return
    methods = list_methods()
    if name is not None:
        known = list(dict.fromkeys(m.name for m in methods))
        if name not in known:
            raise UsageError(f"there is no method, architecture or family {name!r}.", hint=near_misses(name, known))
        methods = [m for m in methods if m.name == name]
    data = [m.to_json() for m in methods]
    output.result(data, lambda: _print(methods, detailed=name is not None or output.verbose))


def _advice() -> str:
    """Return a sentence on which methods to use, from the defaults of ``split``."""
    from llamamoe.conversion.defaults import CALIBRATED_DEFAULT as BEST
    from llamamoe.conversion.defaults import UNCALIBRATED_DEFAULT

    return (
        f"Which to take: with calibration text none need be named, split takes {BEST['method']}, shared by "
        f"{BEST['shared_by']}, router {BEST['router']}, repair {BEST['repair']}; without text {UNCALIBRATED_DEFAULT}. "
        "random, static and oracle are controls, the others what papers did. A * needs text (--calibration)."
    )


def _print(methods: Sequence[Method], *, detailed: bool) -> None:
    if not detailed:
        paragraph(_advice())
        echo()
    for index, kind in enumerate(dict.fromkeys(m.kind for m in methods)):
        if index:
            echo()
        echo(bold(TITLES.get(kind, kind)))
        rows = [m for m in methods if m.kind == kind]
        if detailed:
            for method in rows:
                _details(method)
        else:
            text = ("activations", "gradients")
            table(("", ""), [(m.name + " *" * (m.needs in text), m.summary) for m in rows])
    if not detailed:
        echo("\n`llamamoe methods NAME` tells more of one, -v of all; `--matrix` which family becomes what.")


def _details(method: Method) -> None:
    echo("  ", bold(method.name), f": {method.summary}")
    known = [("reference", method.reference), ("needs", method.needs), ("parity", method.parity)]
    known += [(key.replace("_", " "), str(value)) for key, value in method.facts.items()]
    facts([pair for pair in known if pair[1]], indent=4)
    for option in method.options:
        rules = "".join(f", {rule}" for rule in option.rules)
        key, default = f"{KEYS.get(method.kind, method.kind)}.{option.name}", _as_yaml(option.default)
        if method.kind == "loss":  # recipes hold a list of them, which has no keys
            key = f"'losses=[{{name: {method.name}, {option.name}: {default}}}]'"
        bullets([f"{key} ({option.type}{rules}, default {default}): {option.description}"], mark="  --set")


def _as_yaml(default: object) -> str:
    """Return a default as recipes and ``--set`` write it."""
    return "null" if default is None else str(default)


def _print_matrix(found: Matrix, *, verbose: bool) -> None:
    rows = [
        (family, variant, *(_cell(found, family, target, variant) for target in found.targets))
        for family, variant in found.rows
    ]
    titles = [re.sub(r"_?moe", r"\n\g<0>", target) for target in found.targets]
    table(("family", "", *titles), rows, wrap=(1,), indent=0)
    echo()
    paragraph(
        "4.57: loads in transformers 4.57 and 5. 5: in transformers 5 only. s: neurons can be shared, too. "
        "*: exact in float32 only. -: refused" + ("." if verbose else "; -v says why.")
    )
    _print_clients(verbose=verbose)
    if verbose:
        heading("Refused because")
        reasons = {
            f"{c.family} ({c.variant}) -> {c.target}: {'; '.join(c.reasons)}"
            for c in found.cells
            if not c.supported and not c.shared
        }
        bullets(sorted(reasons))
        heading("Families that no target computes exactly")
        bullets(f"{family}: {reason}" for family, reason in sorted(found.refused.items()))


def _print_clients(*, verbose: bool) -> None:
    """Print the table of other programs that run each target."""
    from llamamoe.architectures.targets import clients

    heading("In other programs")
    header, *rows = clients.table()
    table(header, rows, indent=0)
    echo()
    paragraph(
        f"✓: the same logits and greedy tokens as transformers in float32. ≠: others, without an error. –: refused. Tested: "
        f"{clients.versions()}."
    )
    if verbose:
        bullets(clients.notes())


def _cell(found: Matrix, family: str, target: str, variant: str) -> str:
    plain = found.cell(family, target, variant=variant)
    shared = found.cell(family, target, variant=variant, shared=True)
    cell: Cell = plain if plain.supported else shared
    if not cell.supported:
        return "-"
    return cell.transformers[0] + " s" * shared.supported + "*" * (cell.dtype == "float32")
