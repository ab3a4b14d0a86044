"""Render the report as one self-contained HTML document."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

from ..lazy import jinja2, require
from . import figures_bars, figures_lines, page_tables, page_values, page_words
from .page_grid import legend
from .page_values import Series, clean, get, parts_of_routing, percent, series_of
from .page_verdict import verdicts
from .page_view import View, view_of


def render(report: Mapping[str, Any]) -> str:
    """Return the whole document.

    Names and tokens may contain any characters; numbers may be None or not finite, and are shown as a dash.

    Args:
        report: The content of ``report.json``.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    found: dict[str, Any] = clean(report)
    series = series_of(found)
    views = [view for one in parts_of_routing(series) if (view := view_of(one, found["domains"])) is not None]
    template = _environment().get_template("page.html.j2")
    page: str = template.render(
        report=found,
        series=series,
        views=views,
        style=_read("page.css"),
        script=_read("page.js"),
        data=_embedded([view.data for view in views]),
        load_steps=legend("even", "nothing: dead"),
        preference_steps=legend("as usual", "nothing"),
        verdicts=verdicts(series),
        **_quality(found, series),
        **_cost(series),
        **_routing(series, views),
        **_training(found),
    )
    return page.lstrip()  # the macros before the document leave empty lines


def _environment() -> jinja2.Environment:
    require("jinja2", "report", "The report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": page_values.number,
        "coded": _coded,
        "percent": percent,
        "whole": page_values.whole,
        "pretty": partial(json.dumps, indent=2, ensure_ascii=False),
    }
    environment.globals["get"] = get
    return environment


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _coded(text: str) -> str:
    """Return a sentence as HTML, with what stands between backticks as code."""
    escaped = html.escape(text)
    return re.sub(r"`([^`]+)`", lambda found: _words(found[1]), escaped)


def _words(command: str) -> str:
    """Return a command word by word, so that lines break between words only."""
    return " ".join(f"<code>{word}</code>" for word in command.split())


def _embedded(value: Any) -> str:
    """Return JSON that cannot end the script element, whatever tokens it contains."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _quality(report: Mapping[str, Any], series: Sequence[Series]) -> dict[str, Any]:
    measure, domains = page_words.measure_of(series), report["domains"]
    charts = [figures_bars.quality(series, domains, measure), figures_bars.difference(series, domains, measure)]
    tables = [page_tables.quality(series, domains, measure)]
    if measure == "perplexity":
        tables.append(page_tables.quality(series, domains, "bits_per_byte"))
    return {
        "measure": measure,
        "summaries": page_words.summaries(series, domains),
        "glance": page_tables.glance(series),
        "quality_charts": [chart for chart in charts if chart],
        "quality_tables": tables,
    }


def _cost(series: Sequence[Series]) -> dict[str, Any]:
    charts = [figures_bars.shares(series), figures_bars.cost(series)]
    return {"cost_charts": [chart for chart in charts if chart], "cost_table": page_tables.cost(series)}


def _routing(series: Sequence[Series], views: Sequence[View]) -> dict[str, Any]:
    routed = [view.series for view in views]
    depth = [(one.name, get(one.model, "routing", "layers")) for one in routed]
    return {
        "load_charts": figures_lines.load_panels(routed),
        "domain_charts": figures_lines.domain_panels(routed) if views and len(views[0].domains) > 1 else [],
        "router_charts": figures_lines.router_panels(routed),
        "load_sentences": [page_words.load_sentence(name, layers) for name, layers in depth],
        "depth_sentences": [page_words.depth_sentence(name, layers) for name, layers in depth],
        "head_sentences": [text for one in routed if (text := page_words.head_sentence(one.name, one.model))],
        "hard": [one.name for one in routed if page_words.undecided(one.model)],
        "router_sentences": [page_words.router_sentence(name, layers) for name, layers in depth],
        "layer_tables": [page_tables.layers(one) for one in routed],
    }


def _training(report: Mapping[str, Any]) -> dict[str, Any]:
    runs = report.get("training") or []
    return {
        "training_chart": figures_lines.training_panel(runs) if runs else None,
        "training_table": page_tables.training(runs) if runs else None,
    }
