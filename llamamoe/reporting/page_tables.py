"""Build the tables of the report: every figure's numbers, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .figures_bars import MEASURES, PARTS, parts_of
from .page_values import DASH, Series, count, error_of, get, number, percent, signed, size, times, whole, with_error
from .page_words import ffn_share, measure_of, parent_of, times_parent, undecided

OVERALL = (("mean over domains", ("mean_over_domains",)), ("all tokens", ("overall",)))


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading.

    Attributes:
        caption: Description of the content.
        head: Column headings, the first one that of the row headings.
        rows: Text, row by row.
        sums: Number of last rows that summarise the others.
        groups: Names over the columns and the number of columns of each, the first column's included; empty: none.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    sums: int = 0
    groups: Sequence[tuple[str, int]] = ()

    @property
    def starts(self) -> set[int]:
        """Columns that begin a group."""
        return set(accumulate(span for _, span in self.groups))


def glance(series: Sequence[Series]) -> Table:
    """Return the key numbers, one column per model."""
    parent, measure = parent_of(series), measure_of(series)
    mean = ("scores", "mean_over_domains")
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []
    if measure == "perplexity":
        rows.append(("Perplexity, mean over domains", lambda m: number(get(m, *mean, "perplexity"))))
        rows.append(("Perplexity against the parent", lambda m: times(times_parent(m, "mean_over_domains"))))
    rows += [
        ("Bits per byte, mean over domains", lambda m: number(get(m, *mean, "bits_per_byte"))),
        ("FFN used for a token", lambda m: percent(ffn_share(m, parent or m))),
        ("FLOPs for a token", lambda m: count(get(m, "cost", "flops_per_token"))),
        ("Parameters used for a token", lambda m: count(get(m, "cost", "active_parameters"))),
        ("Parameters in all", lambda m: count(get(m, "cost", "total_parameters"))),
        ("Weights in memory", lambda m: size(get(m, "cost", "bytes"))),
        ("Experts, selected of all", _experts),
        ("Neurons of an expert, shared", _widths),
    ]
    head = ["", *(f"{one.name} (parent)" if one.place == 0 else one.name for one in series)]
    return Table("Key numbers", head, [[name, *(cell(one.model) for one in series)] for name, cell in rows])


def _experts(model: Mapping[str, Any]) -> str:
    chosen, total = get(model, "experts", "top_k"), get(model, "experts", "num_experts")
    return DASH if total is None else f"{DASH if chosen is None else chosen} of {total}"


def _widths(model: Mapping[str, Any]) -> str:
    width, shared = get(model, "experts", "expert_width"), get(model, "experts", "shared_width")
    return DASH if width is None else f"{whole(width)}, {whole(shared)}"


def quality(series: Sequence[Series], domains: Sequence[str], measure: str) -> Table:
    """Return a measure of every model by domain, with standard errors, and the paired differences."""
    rows = [(domain, ("domains", domain)) for domain in domains] + list(OVERALL)
    head, groups = ["domain", "tokens"], [("", 2)]
    for one in series:
        columns = [MEASURES[measure], *_compared(one, measure)]
        head += columns
        groups.append((one.name, len(columns)))
    spread_of = "loss" if measure == "perplexity" else "bits_per_byte"
    lines = []
    for name, path in rows:
        line = [name, whole(get(series[0].model, "scores", *path, "tokens"))]
        for one in series:
            value = get(one.model, "scores", *path, measure)
            spread = error_of(get(one.model, "scores", *path), spread_of)
            if measure == "perplexity" and spread is not None and value is not None:
                spread *= value
            line.append(with_error(value, spread))
            line += list(_compared(one, measure, path).values())
        lines.append(line)
    unit = "Perplexity; losses in nats a token" if measure == "perplexity" else "Bits per byte"
    errors = [error_of(get(series[0].model, "scores", *path), spread_of) for _, path in rows]
    which = " (not for domains of one document)" if None in errors else ""
    return Table(f"{unit}; ± one standard error over documents{which}", head, lines, sums=len(OVERALL), groups=groups)


def _compared(one: Series, measure: str, path: Sequence[str] = ()) -> dict[str, str]:
    """Return the columns of a model that compare it with the parent, if it was compared."""
    if one.place == 0 or not get(one.model, "difference"):
        return {}
    what, name = ("loss", "more loss") if measure == "perplexity" else ("bits_per_byte", "more")
    node = get(one.model, "difference", *path)
    factor = {"ratio": number(times_parent(one.model, *path))} if measure == "perplexity" else {}
    return factor | {name: with_error(get(node, what), error_of(node, what), sign=True)}


def cost(series: Sequence[Series]) -> Table:
    """Return parameters by part, stored and used, and figures derived from them."""
    head = ["part", *(name for _ in series for name in ("stored", "used"))]
    rows = [[PARTS[part], *(x for one in series for x in _part(one.model, part))] for part in parts_of(series)]
    sums = [["all", *(x for one in series for x in _total(one.model))]]
    for name, key, form in (("FLOPs a token", "flops_per_token", count), ("bytes of weights", "bytes", size)):
        values = [get(one.model, "cost", key) for one in series]
        sums.append([name, *(x for value in values for x in _placed(key, form(value)))])
    return Table("Parameters by part", head, rows + sums, sums=3, groups=[("", 1), *((one.name, 2) for one in series)])


def _part(model: Mapping[str, Any], part: str) -> tuple[str, str]:
    """Return stored and used; a part that is not named does not exist in the model."""
    none = {"total": 0, "active": 0}
    found = get(model, "cost", "parts") or {part: None}
    return count(get(found.get(part, none), "total")), count(get(found.get(part, none), "active"))


def _total(model: Mapping[str, Any]) -> tuple[str, str]:
    return count(get(model, "cost", "total_parameters")), count(get(model, "cost", "active_parameters"))


def _placed(key: str, text: str) -> tuple[str, str]:
    """Put FLOPs under used and bytes under stored."""
    return ("", text) if key == "flops_per_token" else (text, "")


_OWN: list[tuple[str, str, Callable[[float | None], str]]] = [
    ("router entropy", "router_entropy", percent),
    ("selected probability", "selected_probability", number),
]
"""Columns on a router's own probabilities, which say nothing of one whose experts tie."""


def layers(one: Series) -> Table:
    """Return everything that is measured by layer."""
    own = [] if undecided(one.model) else _OWN
    columns: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("load entropy", "load_entropy", percent),
        ("max violation", "max_violation", number),
        ("dead", "dead_experts", whole),
        *own,
        ("domain distance", "domain_distance", number),
        ("noise floor", "within_distance", number),
        ("recall@k", "recall_at_k", percent),
        ("captured", "captured", percent),
        ("overlap", "overlap", number),
        ("shared norm", "shared_norm", number),
        ("routed norm", "routed_norm", number),
    ]
    rows = []
    for layer in get(one.model, "routing", "layers") or []:
        rows.append([str(get(layer, "layer")), *(form(get(layer, key)) for _, key, form in columns)])
    return Table(f"By layer: {one.name}", ["layer", *(name for name, _, _ in columns)], rows)


def training(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the first and last held-out loss of each domain, for each run."""
    names = list(dict.fromkeys(name for run in runs for name in get(run, "domain_validation") or {}))
    ends = {run["name"]: get(run, "validation") for run in runs}
    if not names and not any(ends.values()):
        return None
    head = ["domain", *(name for _ in runs for name in ("first", "last", "change"))]
    groups = [("", 1), *((str(get(run, "name")), 3) for run in runs)]
    rows = [[name, *(x for run in runs for x in _ends(get(run, "domain_validation", name)))] for name in names]
    rows.append(["all", *(x for run in runs for x in _ends(get(run, "validation")))])
    return Table("Loss on held-out text, first and last measurement, nats a token", head, rows, sums=1, groups=groups)


def _ends(curve: Sequence[Sequence[float | None]] | None) -> tuple[str, str, str]:
    first, last = get(curve, 0, 1), get(curve, -1, 1)
    change = None if first is None or last is None else last - first
    return number(first, 4), number(last, 4), signed(change)
