"""The page that a report becomes."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
import sys
from collections import Counter
from functools import cache
from typing import Any

import pytest

from llamamoe.errors import MissingExtraError

from .sample import HOSTILE, SMOLLM, Size, report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from llamamoe.reporting.page import render

VOID = {"meta", "br", "input", "link", "img", "hr", "path", "use"}


class Outline(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@cache
def page() -> str:
    return render(report())


@cache
def outline() -> Outline:
    return Outline(page())


def nulled(value: Any) -> Any:
    """The same report with nothing measured."""
    if isinstance(value, dict):
        return {key: nulled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulled(item) for item in value]
    return None if isinstance(value, float) else value


def test_everything_that_was_measured_is_there() -> None:
    text = re.sub(r"\s+", " ", outline().text)
    for words in ("smollm2-moe", "smollm2-moe-healed", "converted from the dense model HuggingFaceTB/SmolLM2-135M"):
        assert words in text
    assert re.search(
        r"smollm2-moe uses \d+\.\d % of the parent’s FFN for a token \(3 of 8 experts in 5 of 6 layers\)", text
    )
    assert re.search(r"Over 3 domains its perplexity is [\d.]+ against [\d.]+ \(× [\d.]+\)", text)
    for title in ("Quality", "Cost", "Routing", "Domains by depth", "Tokens", "Router", "Training", "Provenance"):
        assert title in text
    assert "num_experts: 88" in text
    assert "0123456789abcdef" * 4 in text
    assert "llamamoe split dense my-moe" in text


def test_nothing_is_fetched() -> None:
    assert "default-src 'none'" in page()
    for tag, attributes in outline().attributes:
        assert tag not in {"link", "img", "iframe", "base"}
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in page()
    assert not re.search(r"url\((?!#)", page())


def test_names_and_tokens_cannot_leave_their_place() -> None:
    hostile = report()
    for model in [hostile["parent"], *hostile["models"]]:
        model["name"] = HOSTILE + '" onmouseover="alert(1)'
        model["provenance"]["recipe"] = HOSTILE
        model["provenance"]["commands"] = [HOSTILE]
    hostile["training"][0]["name"] = HOSTILE
    hostile["domains"][0] = hostile["notes"] = hostile["protocol"] = HOSTILE
    hostile["notes"] = [HOSTILE]

    found = Outline(render(hostile))

    assert found.tags["script"] == 2
    assert not any(name.startswith("on") for _, attributes in found.attributes for name in attributes)
    assert HOSTILE in found.text
    assert HOSTILE in json.dumps(json.loads(found.scripts[0])).replace("\\u003c", "<")
    assert found.tags["b"] == outline().tags["b"]


def test_any_text_can_be_written() -> None:
    odd = report(Size(domains=1, models=1, runs=1))
    odd["models"][0]["routing"]["passages"][0]["tokens"][:4] = ["\ud800", "\x00\x1b[31m", "\u2028", "\U0001f600"]
    odd["models"][0]["name"] = "\udfff$\\frac{$ & 名"
    written = render(odd).encode("utf-8").decode("utf-8")
    assert "\x00" not in written
    assert "\x1b" not in written
    assert "␀␛[31m" in written
    assert "$\\frac{$" in written


def test_headings_and_labels_are_in_order() -> None:
    headings = outline().headings
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    ids = Counter(attributes["id"] for _, attributes in outline().attributes if "id" in attributes)
    assert set(ids.values()) == {1}
    references = {a[name] for _, a in outline().attributes for name in ("for", "aria-labelledby") if name in a}
    assert references <= set(ids)
    anchors = {(a["href"] or "")[1:] for tag, a in outline().attributes if tag == "a"}
    assert anchors <= set(ids)
    svgs = [attributes for tag, attributes in outline().attributes if tag == "svg"]
    assert all(attributes["aria-hidden"] == "true" for attributes in svgs)
    images = [attributes for _, attributes in outline().attributes if attributes.get("role") == "img"]
    assert len(images) == len(svgs)
    assert all(len(attributes["aria-label"] or "") > 20 for attributes in images)
    assert ("html", {"lang": "en"}) in outline().attributes


def test_figures_take_the_pages_colours() -> None:
    drawings = re.findall(r"<svg.*?</svg>", page(), re.DOTALL)
    assert len(drawings) > 10
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b", drawing)
        assert "font-family" not in drawing


def test_nulls_are_dashes() -> None:
    empty = nulled(report())
    found = Outline(render(empty))
    assert "Its perplexity was not measured" in found.text
    assert "The distance between domains was not measured" in found.text
    assert "–" in found.text
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b", found.text)


def test_numbers_that_are_not_finite() -> None:
    odd = report(Size(domains=2, models=1, runs=1))
    bad = itertools.cycle([math.nan, math.inf, -math.inf, None])
    for layer in odd["models"][0]["routing"]["layers"]:
        layer |= {key: next(bad) for key in ("max_violation", "domain_distance", "recall_at_k", "dead_experts")}
        layer["load"] = [next(bad), *layer["load"][1:]]
    odd["models"][0]["scores"]["domains"]["arxiv"]["perplexity"] = next(bad)
    odd["models"][0]["routing"]["passages"][0]["first_expert"][2][0] = next(bad)
    odd["training"][0]["train"][0][1] = next(bad)
    found = Outline(render(odd))
    assert not re.search(r"\bnan\b|\bNaN\b|\bInfinity\b", found.scripts[0] + found.text)


def test_without_what_may_be_missing() -> None:
    odd = report(Size(models=1, runs=0), parent=False)
    odd["models"][0] |= {"routing": None, "experts": None}
    odd["models"][0]["provenance"] = dict.fromkeys(odd["models"][0]["provenance"])
    found = Outline(render(odd))
    assert "No parent was measured" in found.text
    assert "Tokens by expert" not in found.text
    assert "Loss in training" not in found.text


def test_other_tokenizer_compares_bits_per_byte_only() -> None:
    text = Outline(render(report(bits_per_byte=True))).text
    assert "only bits per byte compare" in text
    assert "bits per byte are" in text
    assert "erplexity against the parent" not in text
    assert "Perplexity by domain" not in text


def test_one_domain_one_layer_two_experts() -> None:
    found = Outline(render(report(Size(layers=2, experts=2, top_k=1, domains=1, tokens=3, models=1, runs=1))))
    assert "Only one domain was measured" in found.text


def test_four_models_and_twenty_domains() -> None:
    assert "domain 19" in Outline(render(report(Size(domains=20, models=4, tokens=5)))).text


def test_size_and_repetition() -> None:
    assert len(render(report(SMOLLM)).encode()) < 3_000_000
    given = report()
    assert render(given) == page()
    assert given == report()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"llamamoe\[report\]"):
        render(report())


def test_a_hard_router_is_explained_and_its_own_probabilities_are_left_out() -> None:
    found = report(Size(models=1))
    assert "router entropy" in render(found)
    for layer in found["models"][0]["routing"]["layers"]:
        layer["router_entropy"] = 1.0
    page = render(found)
    assert "its router is hard" in page
    assert "router entropy" not in page
    assert "Probability of the selected" not in page


def test_a_control_without_experts_has_numbers_and_no_routing() -> None:
    found = report(Size(models=2))
    found["models"][1] |= {"name": "pruned", "experts": None, "routing": None}
    page = render(found)
    assert page.count('<h2 id="routing-title">') == 1
    assert "By layer: pruned" not in page
    assert "<bdi>pruned</bdi>" in page
