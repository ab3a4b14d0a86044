"""Build the views with a picker: drawn for one layer, with the numbers that page.js needs to draw the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .page_grid import bar_path, heat_paths, tick_path, ticks
from .page_values import Series, get

TOKEN_COLOURS = 12
"""Number of experts of a passage with their own colour, the most frequent first; the others are pale."""
_UNIT = 100_000  # loads are sent as whole numbers in units of 1 / this
_ROWS = 10  # labels beside a heat map


@dataclass(frozen=True)
class Token:
    """One token of a passage: its text as shown, and its first expert."""

    text: str
    expert: int | None
    rank: int | None


@dataclass(frozen=True)
class Passage:
    """A passage of one domain, coloured for the layer shown first."""

    domain: str
    tokens: Sequence[Token]
    legend: Sequence[tuple[int, int, int]]  # rank, expert, number of tokens
    others: int


@dataclass(frozen=True)
class View:
    """The page's view of one model's routing.

    Attributes:
        series: The model.
        experts: N.
        layers: Numbers of the MoE layers, in order.
        at: Index of the layer shown first.
        heat: Path data by level of the map layer x expert.
        row_ticks: Rows of it to label, and their names.
        column_ticks: Experts to label.
        bars: Path data of that layer's sorted loads; empty if nothing was measured.
        importance: Path data of the same experts' importance.
        uniform_at: Height of the uniform load in the bars, as a share.
        top_load: The largest load, as text.
        domains: Domains with a measured load.
        preference: Path data by level of the map domain x expert.
        passages: The token view.
        top: For each expert of that layer, busiest first: expert, load, and its tokens with their shares.
        data: Numbers for page.js.
    """

    series: Series
    experts: int
    layers: Sequence[int]
    at: int
    heat: Mapping[int, str]
    row_ticks: Sequence[tuple[int, str]]
    column_ticks: Sequence[int]
    bars: str
    importance: str
    uniform_at: float
    top_load: str
    domains: Sequence[str]
    preference: Mapping[int, str]
    passages: Sequence[Passage]
    top: Sequence[tuple[int, str, Sequence[tuple[str, str]]]]
    data: Mapping[str, Any] = field(repr=False)


def view_of(series: Series, domains: Sequence[str]) -> View | None:
    """Return the view of a model; None for a dense one or if its routing was not measured."""
    routing = get(series.model, "routing")
    layers = [each for each in get(routing, "layers") or [] if get(each, "layer") is not None]
    experts = max((len(get(each, "load") or []) for each in layers), default=0)
    if not experts:
        return None
    data = _data(series.name, routing, layers, domains, experts)
    at, loads = data["at"], data["load"]
    bars, importance, uniform_at = _bars(loads[at], data["importance"][at])
    return View(
        series=series,
        experts=experts,
        layers=data["layers"],
        at=at,
        heat=heat_paths([_ratios(load, experts) for load in loads]),
        row_ticks=[(row, str(data["layers"][row])) for row in ticks(data["layers"], _ROWS)],
        column_ticks=ticks(range(experts), _ROWS),
        bars=bars,
        importance=importance,
        uniform_at=uniform_at,
        top_load=unit_percent(max(known_units(loads[at]), default=None)),
        domains=data["domains"],
        preference=heat_paths(preference(loads[at], data["domainLoad"][at])),
        passages=[_passage(each, at) for each in get(routing, "passages") or []],
        top=_first_top(loads[at], data["words"], data["top"][at]),
        data=data,
    )


def _data(
    name: str, routing: Any, layers: Sequence[Mapping[str, Any]], domains: Sequence[str], experts: int
) -> dict[str, Any]:
    """Return the numbers of all layers for page.js."""
    named = [domain for domain in domains if any(get(each, "domain_load", domain) for each in layers)]
    words, top = _top_tokens(get(routing, "top_tokens") or [], len(layers), experts)
    return {
        "name": name,
        "experts": experts,
        "layers": [each["layer"] for each in layers],
        "at": len(layers) // 2,
        "load": [_units(get(each, "load"), experts) for each in layers],
        "importance": [_units(get(each, "importance"), experts) for each in layers],
        "domains": named,
        "domainLoad": [[_units(get(each, "domain_load", domain), experts) for domain in named] for each in layers],
        "first": [get(each, "first_expert") or [] for each in get(routing, "passages") or []],
        "words": words,
        "top": top,
    }


def known_units(load: Sequence[int | None]) -> list[int]:
    """Return the loads that were measured."""
    return [value for value in load if value is not None]


def _units(load: Sequence[float | None] | None, experts: int) -> list[int | None]:
    """Return shares as whole numbers, one per expert."""
    found = [None if share is None else int(_UNIT * share + 0.5) for share in load or []]
    return found + [None] * (experts - len(found))


def _ratios(load: Sequence[int | None], experts: int) -> list[float | None]:
    return [None if share is None else share * experts / _UNIT for share in load]


def _bars(load: Sequence[int | None], importance: Sequence[int | None]) -> tuple[str, str, float]:
    """Return sorted bars, ticks of the importance, and the height of the uniform load as a share of the drawing's."""
    measured = [(value, expert) for expert, value in enumerate(load) if value is not None]
    busiest = sorted(measured, key=lambda pair: (-pair[0], pair[1]))
    other = [importance[expert] for _, expert in busiest]
    uniform = _UNIT / len(load)
    top = max([*(value for value, _ in busiest), *known_units(other), 1.25 * uniform])
    return bar_path([value for value, _ in busiest], top), tick_path(other, top), uniform / top


def preference(load: Sequence[int | None], by_domain: Sequence[Sequence[int | None]]) -> list[list[float | None]]:
    """Return for each domain the experts' loads over their loads on all text, grouped by preferred domain."""
    rows: list[list[float | None]] = [
        [mine / every if mine is not None and every else None for mine, every in zip(row, load, strict=True)]
        for row in by_domain
    ]
    order = preference_order(rows, len(load))
    return [[row[expert] for expert in order] for row in rows]


def preference_order(rows: Sequence[Sequence[float | None]], experts: int) -> list[int]:
    """Return experts by the domain that prefers them most, strongest preference first; without any load last."""

    def key(expert: int) -> tuple[int, float, int]:
        column = [-1.0 if (value := row[expert]) is None else value for row in rows]
        best = max(column, default=-1.0)
        return (len(rows) if best < 0 else column.index(best), -best, expert)

    return sorted(range(experts), key=key)


def _passage(passage: Mapping[str, Any], at: int) -> Passage:
    tokens = get(passage, "tokens") or []
    first = get(passage, "first_expert", at) or []
    first = [*first, *([None] * (len(tokens) - len(first)))][: len(tokens)]
    counts = Counter(expert for expert in first if expert is not None)
    ranked = sorted(counts, key=lambda expert: (-counts[expert], expert))[:TOKEN_COLOURS]
    ranks = {expert: rank for rank, expert in enumerate(ranked)}
    shown = [Token(shown_token(t), e, ranks.get(e)) for t, e in zip(tokens, first, strict=True)]
    legend = [(rank, expert, counts[expert]) for expert, rank in ranks.items()]
    return Passage(str(get(passage, "domain")), shown, legend, len(counts) - len(ranked))


def shown_token(text: Any) -> str:
    """Return a token with visible line breaks and tabs; breaks still take effect."""
    return str(text).replace("\r", "").replace("\n", "↵\n").replace("\t", "⇥")


def _top_tokens(top: Sequence[Any], layers: int, experts: int) -> tuple[list[str], list[list[list[list[Any]]]]]:
    """Return every token once, and for each layer and expert indices, counts and shares in per cent."""
    places: dict[str, int] = {}
    found: list[list[list[list[Any]]]] = []
    for layer in range(layers):
        row = []
        for expert in range(experts):
            entries = get(top, layer, expert) or []
            row.append([_entry(entry, places) for entry in entries])
        found.append(row)
    return list(places), found


def _entry(entry: Sequence[Any], places: dict[str, int]) -> list[Any]:
    text = str(get(entry, 0)).replace("\n", "↵").replace("\r", "").replace("\t", "⇥")
    share = get(entry, 2)
    return [places.setdefault(text, len(places)), get(entry, 1), None if share is None else int(100 * share + 0.5)]


def _first_top(
    load: Sequence[int | None], words: Sequence[str], top: Sequence[Sequence[Sequence[Any]]]
) -> list[tuple[int, str, list[tuple[str, str]]]]:
    busiest = sorted(range(len(load)), key=lambda expert: (-(load[expert] or 0), expert))
    return [
        (expert, unit_percent(load[expert]), [(words[w], "" if s is None else f"{s} %") for w, _, s in top[expert]])
        for expert in busiest
    ]


def unit_percent(load: int | None) -> str:
    """Format a load in per cent with two decimals, as page.js does."""
    return "–" if load is None else f"{load * 100 / _UNIT:.2f} %"
