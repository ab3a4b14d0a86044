"""The results of a study: cells gathered over their seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: Its name in the recipe, or a control's.
        kind: ``"dense"``, ``"method"`` or ``"control"``.
        simulated: Reason why it cannot be stored; None if it can.
        budget: Permitted share of the dense FFN's multiply-adds; None for the dense model.
        share: Actual share, router, padding and stubs included.
        active_parameters: Active parameters of the whole model, per token.
        total_parameters: Parameters of the whole model.
        sizes: ``num_experts``, ``top_k``, ``expert_width``, ``shared`` and ``target``; empty for the dense model. With a k for
            each layer also ``top_k_by_layer``, ``measure``, ``damage`` and ``damage_uniform`` (of the first seed).
        seeds: The finished seeds.
        loss: Mean over seeds of the mean over domains of the loss, in nats.
        perplexity: Mean over seeds of the exponential of it.
        perplexity_stdev: Sample standard deviation over seeds; None for one seed.
        ratio: ``perplexity`` over the dense model's; None if that is not finished.
        ratio_stdev: Its sample standard deviation.
        domains: Perplexity of every domain, mean over seeds.
        recall_at_k: Mean over layers and seeds of the router's recall against the oracle, if measured.
        captured: The captured contribution, averaged likewise.
        output_error: Mean over layers and seeds of the relative error of the FFN's output on the calibration text.
        seconds: Mean time of a cell.
        peak_bytes: Peak resident memory of the process in a cell.
        exported_ratio: Largest factor between a written checkpoint's perplexity and the one here, either way; None if
            none was written.
        speed: By program and task a `llamamoe.studies.speed.measure.Rate` as JSON-compatible data, if measured.
    """

    method: str
    kind: str
    simulated: str | None
    budget: float | None
    share: float
    active_parameters: int
    total_parameters: int
    sizes: Mapping[str, Any]
    seeds: tuple[int, ...]
    loss: float
    perplexity: float
    perplexity_stdev: float | None
    ratio: float | None
    ratio_stdev: float | None
    domains: Mapping[str, float]
    recall_at_k: float | None
    captured: float | None
    output_error: float | None
    seconds: float
    peak_bytes: int
    exported_ratio: float | None
    speed: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The result of `llamamoe.compare`.

    Attributes:
        source: Name of the dense model.
        rows: The dense model, then budget by budget (the largest first) by perplexity.
        cells: The content of each finished cell's file, without its dependencies.
        pending: Labels of the selected cells that are not finished.
        failed: Label and reason of failed cells.
        protocol: Description of the perplexity measurement.
        text: Amount of text by domain; for calibration also its origin.
        recipe: The study's recipe.
        warnings: Sentences for the user.
        files: Written files: ``json``, ``markdown``, and the pictures if they could be drawn.
        speeds: The content of each measured shape's file, without its dependencies.
    """

    source: str
    rows: tuple[Row, ...]
    cells: tuple[Mapping[str, Any], ...]
    pending: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    protocol: str
    text: Mapping[str, Any]
    recipe: Mapping[str, Any]
    warnings: tuple[str, ...]
    files: Mapping[str, str]
    speeds: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON-compatible data."""
        return asdict(self)


def rows_of(cells: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    """Gather finished cells by method and budget.

    Args:
        cells: Results of `llamamoe.studies.engine.Engine.measure`.
    """
    dense = next((cell["perplexity"] for cell in cells if cell["kind"] == "dense"), None)
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["budget"]), []).append(cell)
    rows = [_row(group, dense) for group in groups.values()]
    return tuple(sorted(rows, key=lambda row: (row.budget is not None, -(row.budget or 0), row.perplexity)))


def _row(group: Sequence[Mapping[str, Any]], dense: float | None) -> Row:
    first = group[0]
    values = [cell["perplexity"] for cell in group]
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    exported = [math.log(c["exported"]["perplexity"] / c["perplexity"]) for c in group if c.get("exported")]
    return Row(
        method=first["method"],
        kind=first["kind"],
        simulated=first["simulated"],
        budget=first["budget"],
        share=first["share"],
        active_parameters=first["active_parameters"],
        total_parameters=first["total_parameters"],
        sizes=first["sizes"],
        seeds=tuple(cell["seed"] for cell in group if cell["seed"] is not None),
        loss=statistics.fmean(cell["loss"] for cell in group),
        perplexity=mean,
        perplexity_stdev=spread,
        ratio=mean / dense if dense else None,
        ratio_stdev=spread / dense if dense and spread is not None else None,
        domains={name: statistics.fmean(c["domains"][name]["perplexity"] for c in group) for name in first["domains"]},
        recall_at_k=_layers_mean(group, "recall_at_k"),
        captured=_layers_mean(group, "captured"),
        output_error=_layers_mean(group, "output_error"),
        seconds=statistics.fmean(cell["seconds"] for cell in group),
        peak_bytes=max(cell["peak_bytes"] for cell in group),
        exported_ratio=math.exp(max(map(abs, exported))) if exported else None,
    )


def _layers_mean(group: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean over layers and seeds; oracles have no router quality."""
    found = []
    for cell in group:
        oracle = cell["simulated"] and "top_k_by_layer" not in cell["sizes"]
        if oracle and name != "output_error":
            continue
        for layer in cell["layers"]:
            value = layer.get(name, layer.get("router_quality", {}).get(name))
            if value is not None:
                found.append(value)
    return statistics.fmean(found) if found else None


def number(value: float) -> str:
    """Format a perplexity or ratio with four digits: ``36.58``, ``1,204``, ``3.3e+06``."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1e}" if value >= 1e6 else f"{value:,.0f}" if value >= 999.5 else f"{value:.4g}"


def with_spread(value: float, spread: float | None) -> str:
    """Format ``88.1 +-0.4``, without the deviation if there is one seed."""
    return number(value) if spread is None else f"{number(value)} +-{spread:.2g}"


def shape(sizes: Mapping[str, Any]) -> str:
    """Format ``7 of 24, 416 shared`` (``2 to 11 of 24`` if layers differ), or the number of kept neurons for pruning."""
    if not sizes:
        return ""
    shared = f"{sizes['shared']:,}"
    if not sizes["num_experts"]:
        return f"{shared} neurons"
    each = sizes.get("top_k_by_layer") or [sizes["top_k"]]
    top_k = f"{min(each)} to {max(each)}" if min(each) < max(each) else f"{each[0]}"
    routed = f"{top_k} of {sizes['num_experts']}"
    return f"{routed}, {shared} shared" if sizes["shared"] else routed


def markdown(found: Comparison) -> str:
    """Return the study as a Markdown page: tables, and a description of the measurement."""
    lines = [f"# {found.source}: ways to convert it, compared", ""]
    if "svg" in found.files:
        lines += [f"![Perplexity against active share]({found.files['svg']})", ""]
    lines += _markdown_rows(found.rows)
    lines += _markdown_speed(found)
    domains = list(dict.fromkeys(name for row in found.rows for name in row.domains))
    if len(domains) > 1:
        lines += ["", "## Perplexity by domain", ""]
        lines += _markdown_table(
            ["method", "budget", *domains],
            [[row.method, _percent(row.budget), *(number(row.domains[d]) for d in domains)] for row in found.rows],
        )
    lines += ["", "## How it was measured", "", found.protocol, ""]
    lines += [
        "Active share: multiply-adds of the FFNs per token, router, padding and stubs included, as a share of the dense "
        "model's. +- is the sample standard deviation over seeds.",
        "",
        *simulations(found.rows),
    ]
    for title, items in (("Not done", [*found.pending, *(f"{a}: {b}" for a, b in found.failed)]),
                         ("Warnings", found.warnings)):  # fmt: skip
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


def simulations(rows: Sequence[Row]) -> list[str]:
    """Explain the simulated rows, a sentence for each kind."""
    ours = [row for row in rows if row.simulated]
    found = []
    if any("top_k_by_layer" not in row.sizes for row in ours):
        found.append(
            "An oracle router selects by the true contribution of each expert; it is simulated and cannot be exported."
        )
    if any("top_k_by_layer" in row.sizes for row in ours):
        found.append(
            "A k for each layer (under the same total as one k, by the measured loss of each layer) is simulated: all "
            "targets but hunyuan_v1_moe hold one k for all layers, and split writes one."
        )
    found += [
        f"k of each layer, {row.method} at {_percent(row.budget)}: {', '.join(map(str, row.sizes['top_k_by_layer']))}."
        for row in ours
        if "top_k_by_layer" in row.sizes
    ]
    return found


def speed_tasks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return program and task of every speed that any row has."""
    return list(
        dict.fromkeys((program, task) for row in rows for program, tasks in row.speed.items() for task in tasks)
    )


def over_dense(rate: Mapping[str, float] | None) -> str:
    """Format ``1.62 (1.55-1.70)``: the rate over the dense model's, and its minimum and maximum over the rounds."""
    return "" if rate is None else f"{rate['ratio']:.2f} ({rate['lowest']:.2f}-{rate['highest']:.2f})"


def speed_protocol(speeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the measurement of speeds, in a sentence per program."""
    said = []
    for each in speeds:
        load, model = each["load"], each["model"]
        versions = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
        said.append(
            f"{each['program']} ({versions}): {model['name']}, {each['threads']} threads of {each['machine']['processor']}, "
            f"{each['measured']}; a prompt of {load['prompt_tokens']} tokens, {load['new_tokens']} steps of decoding, median of "
            f"{each['turns']} turns of the ratio to the dense model within a turn, (smallest-largest)."
        )
    return list(dict.fromkeys(said))


def _markdown_speed(found: Comparison) -> list[str]:
    """Return the table of speeds, over the dense model's; empty if none was measured."""
    tasks = speed_tasks(found.rows)
    if not tasks:
        return []
    header = ["method", "budget", "experts", "perplexity, x dense", *(f"{program}, {task}" for program, task in tasks)]
    body = [
        [row.method, _percent(row.budget), shape(row.sizes), "" if row.ratio is None else number(row.ratio),
         *(over_dense(row.speed.get(program, {}).get(task)) for program, task in tasks)]
        for row in found.rows
        if row.speed
    ]  # fmt: skip
    lines = ["", "## Speed, over the dense model's", ""]
    if "speed_svg" in found.files:
        lines += [f"![Perplexity against speed]({found.files['speed_svg']})", ""]
    return lines + _markdown_table(header, body) + ["", *(f"- {each}" for each in speed_protocol(found.speeds))]


def _markdown_rows(rows: Sequence[Row]) -> list[str]:
    header = ["method", "budget", "active share", "experts", "perplexity", "x dense", "recall@k", "seeds", "s/cell"]
    body = []
    for row in rows:
        name = f"{row.method} ({row.simulated})" if row.simulated else row.method
        name = f"**{name}**" if row.kind == "method" else name
        ratio = "" if row.ratio is None else with_spread(row.ratio, row.ratio_stdev)
        recall = "" if row.recall_at_k is None else f"{row.recall_at_k:.2f}"
        seeds = str(len(row.seeds)) if row.seeds else ""
        perplexity = with_spread(row.perplexity, row.perplexity_stdev)
        body.append([name, _percent(row.budget), f"{100 * row.share:.1f} %", shape(row.sizes), perplexity, ratio, recall,
                     seeds, f"{row.seconds:.0f}"])  # fmt: skip
    return _markdown_table(header, body)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] * len(header)) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _percent(budget: float | None) -> str:
    return "" if budget is None else f"{100 * budget:g} %"
