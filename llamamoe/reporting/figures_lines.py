"""Draw lines over the depth of the models, all in one plot, and the course of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import Chart, Key, Line, Panel, panel
from .page_values import LIMIT_SERIES, Series, get
from .page_words import undecided

_DASHED = "dash"


def load_panels(series: Sequence[Series]) -> list[Chart]:
    """Draw the balance of experts and the certainty of routers; dead experts only if there are any."""
    dead = _lines(series, ("dead_experts", "dead experts", False))
    deciding = [one for one in series if not undecided(one.model)]
    note, keys = "Entropy of the load over experts (1: all equally busy)", [Key("load", "ink")]
    if deciding:
        note += " and, averaged over tokens, of the router’s own probabilities (1: undecided; 0: certain)"
        keys.append(Key("router", "ink", _DASHED))
    return _drawn(
        Panel(
            "Evenness of the load",
            "share of log N",
            _lines(series, ("load_entropy", "load", False)) + _lines(deciding, ("router_entropy", "router", True)),
            note=f"{note}.",
            keys=[*_models(series), *keys],
            low=None,
            high=1.0,
        ),
        Panel(
            "Maximal violation",
            "busiest over even − 1",
            _lines(series, ("max_violation", "max violation", False)),
            note="0 is perfect balance; 1 means that the busiest expert takes twice its even share.",
            keys=_models(series),
        ),
        Panel(
            "Dead experts",
            "experts never selected",
            dead if any(any(line.ys) for line in dead) else [],
            keys=_models(series),
            high=1.0,
        ),
        Panel(
            "Probability of the selected",
            "probability",
            _lines(deciding, ("selected_probability", "selected", False)),
            note="Sum of the router’s probabilities of the selected experts, averaged over tokens.",
            keys=_models(deciding),
            high=1.0,
        ),
    )


def domain_panels(series: Sequence[Series]) -> list[Chart]:
    """Draw the distance of domains in each layer, and that of two halves of one domain."""
    keys = [*_models(series), Key("between domains", "ink"), Key("noise floor", "ink", _DASHED)]
    return _drawn(
        Panel(
            "Distance between domains by depth",
            "divergence, bits",
            _lines(series, ("domain_distance", "domains", False), ("within_distance", "noise floor", True)),
            note="Mean over pairs of domains of the Jensen–Shannon divergence of their loads (0: the same experts equally often; 1: no "
            "expert in common). Noise floor: the same between two halves of one domain.",
            keys=keys,
        )
    )


def router_panels(series: Sequence[Series]) -> list[Chart]:
    """Draw routers against the oracle, experts against each other, and routed against shared ones."""
    chance = Key("chance", "ink", _DASHED)
    return _drawn(
        Panel(
            "Recall of the oracle’s experts",
            "recall@k",
            _lines(series, ("recall_at_k", "router", False), ("chance_recall", "chance", True)),
            note="Share of the k experts that contribute most to the output that the router selects too.",
            keys=[*_models(series), Key("router", "ink"), chance],
            high=1.0,
        ),
        Panel(
            "Captured contribution",
            "share of the oracle’s",
            _lines(series, ("captured", "router", False), ("captured_by_chance", "chance", True)),
            note="Contribution of the selected experts over that of the best k.",
            keys=[*_models(series), Key("router", "ink"), chance],
            high=1.0,
        ),
        Panel(
            "Overlap of experts",
            "distance from independence",
            _lines(series, ("overlap", "overlap", False)),
            note="Mean over pairs of experts of the deviation of their probability of being selected together from "
            "independence, as a share of it: 0 if choices are independent.",
            keys=_models(series),
        ),
        Panel(
            "Shared against routed",
            "share of the FFN’s norm",
            _lines(series, ("routed_norm", "routed", False), ("shared_norm", "shared", True)),
            note="Mean norms of the outputs of routed experts and shared expert, over that of the FFN’s output.",
            keys=[*_models(series), Key("routed", "ink"), Key("shared", "ink", _DASHED)],
        ),
    )


def training_panel(runs: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draw the losses of all runs against the number of trained tokens."""
    lines, keys = [], []
    for i, run in enumerate(runs):
        place = i % LIMIT_SERIES + 1
        keys.append(Key(str(get(run, "name")), f"s{place}"))
        for kind, label, faint in (("train", "training", True), ("validation", "held out", False)):
            points = [point for point in get(run, kind) or [] if get(point, 0) is not None]
            xs, ys = [point[0] for point in points], [get(point, 1) for point in points]
            lines.append(Line(f"{run['name']}, {label}", xs, ys, place, faint=faint))
    keys += [Key("held out", "ink"), Key("training", "ink", "faint")]
    most = max((x for line in lines for x in line.xs), default=0)
    scale, unit = (1e9, "billion ") if most >= 1e9 else (1e6, "million ") if most >= 1e6 else (1.0, "")
    scaled = [Line(each.label, [x / scale for x in each.xs], each.ys, each.colour, faint=each.faint) for each in lines]
    return panel(Panel("Loss in training", "nats a token", scaled, f"{unit}tokens", keys=keys, low=None))


def _lines(series: Sequence[Series], *quantities: tuple[str, str, bool]) -> list[Line]:
    """Return one line per model and quantity ``(key, name, dashed)``."""
    found = []
    for one in series:
        layers = [each for each in get(one.model, "routing", "layers") or [] if get(each, "layer") is not None]
        for key, name, dashed in quantities:
            ys = [get(each, key) for each in layers]
            found.append(Line(f"{one.name}, {name}", [each["layer"] for each in layers], ys, one.colour, dashed))
    return found


def _models(series: Sequence[Series]) -> list[Key]:
    """Return the legend's models; empty if there is only one."""
    return [Key(one.name, f"s{one.colour}", "shape") for one in series] if len(series) > 1 else []


def _drawn(*panels: Panel) -> list[Chart]:
    return [chart for each in panels if (chart := panel(each)) is not None]
