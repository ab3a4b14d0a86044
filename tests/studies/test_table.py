"""Cells gathered over seeds, and the picture of them."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.errors import LlamaMoeError, MissingExtraError
from llamamoe.studies.picture import COLOURS, _apart, _contrast, _darker, draw
from llamamoe.studies.table import Comparison, markdown, number, rows_of, shape, with_spread


def cell(
    method: str, kind: str, budget: float | None, seed: int | None, perplexity: float, **more: Any
) -> dict[str, Any]:
    import math

    data = {
        "method": method, "kind": kind, "simulated": "simulated: cannot be exported" if "oracle" in method else None,
        "budget": budget, "seed": seed, "share": budget or 1.0, "sizes": {}, "loss": math.log(perplexity),
        "perplexity": perplexity, "domains": {"a": {"perplexity": perplexity}, "b": {"perplexity": 2 * perplexity}},
        "layers": [], "active_parameters": 5, "total_parameters": 9, "seconds": 2.0, "peak_bytes": 7,
    }  # fmt: skip
    return data | more


CELLS = [
    cell("dense", "dense", None, None, 10.0),
    cell("x", "method", 0.5, 0, 20.0, layers=[{"output_error": 0.5, "router_quality": {"recall_at_k": 0.25}}]),
    cell("x", "method", 0.5, 1, 26.0, layers=[{"output_error": 0.3, "router_quality": {"recall_at_k": 0.75}}]),
    cell("x", "method", 0.25, 0, 50.0, exported={"perplexity": 49.0}),
    cell("x, oracle router", "control", 0.5, 0, 15.0, layers=[{"router_quality": {"recall_at_k": 1.0}}]),
    cell("static", "control", 0.5, 0, 40.0),
    cell("random", "control", 0.5, 0, 1e5),
]


def comparison(cells: list[dict[str, Any]]) -> Comparison:
    return Comparison(
        "tiny", rows_of(cells), tuple(cells), ("y/0.5/0",), (("z/0.5/0", "no"),), "as said", {}, {}, ("w",), {}
    )


def test_mean_and_deviation_over_seeds() -> None:
    rows = {(r.method, r.budget): r for r in rows_of(CELLS)}
    x = rows["x", 0.5]
    assert (x.perplexity, x.perplexity_stdev) == (23.0, pytest.approx(statistics.stdev([20.0, 26.0])))
    assert (x.ratio, x.ratio_stdev, x.seeds) == (2.3, pytest.approx(statistics.stdev([2.0, 2.6])), (0, 1))
    assert x.domains == {"a": 23.0, "b": 46.0}
    assert (x.recall_at_k, x.output_error) == (0.5, 0.4)
    assert (rows["static", 0.5].perplexity_stdev, rows["static", 0.5].recall_at_k) == (None, None)
    assert rows["x, oracle router", 0.5].recall_at_k is None, "an oracle is not judged by itself"
    assert rows["x", 0.25].exported_ratio == pytest.approx(50 / 49)


def test_order() -> None:
    assert [(r.method, r.budget) for r in rows_of(CELLS)] == [
        ("dense", None), ("x, oracle router", 0.5), ("x", 0.5), ("static", 0.5), ("random", 0.5), ("x", 0.25),
    ]  # fmt: skip
    assert [r.ratio for r in rows_of(CELLS[1:2])] == [None], "without the dense model there is no ratio"


def test_markdown_and_json() -> None:
    found = comparison(CELLS)
    page = markdown(found)
    for expected in ("| **x** | 50 % | 50.0 % |  | 23 +-4.2 | 2.3 +-0.42 | 0.50 | 2 | 2 |", "- y/0.5/0", "- z/0.5/0: no",
                     "x, oracle router (simulated: cannot be exported)", "- w", "| x | 25 % | 50 | 100 |"):  # fmt: skip
        assert expected in page
    assert json.loads(json.dumps(found.to_json()))["rows"][1]["method"] == "x, oracle router"


def test_numbers() -> None:
    assert [number(v) for v in (36.58123, 1.0, 999.4, 1204.4, 3.3e6, float("inf"))] == [
        "36.58", "1", "999.4", "1,204", "3.3e+06", "inf",
    ]  # fmt: skip
    assert with_spread(88.123, 0.456) == "88.12 +-0.46"
    assert shape({"num_experts": 24, "top_k": 7, "shared": 416}) == "7 of 24, 416 shared"
    assert shape({"num_experts": 24, "top_k": 7, "top_k_by_layer": [9, 5], "shared": 0}) == "5 to 9 of 24"
    assert shape({"num_experts": 0, "top_k": 0, "shared": 768}) == "768 neurons"


def test_the_picture_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "again").mkdir()
    assert draw(comparison(CELLS), tmp_path) == {"svg": "comparison.svg", "png": "comparison.png"}
    draw(comparison(CELLS), tmp_path / "again")
    for name in ("comparison.svg", "comparison.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    draw(comparison(CELLS[1:2]), tmp_path)  # neither dense nor controls
    simulated = {**CELLS[1], "method": "x, k by layer", "simulated": "simulated: not possible"}
    draw(comparison([simulated, {**simulated, "method": "y, k by layer"}]), tmp_path)  # nothing that can be stored
    with pytest.raises(LlamaMoeError, match="nothing to draw"):
        draw(comparison(CELLS[:1]), tmp_path)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"llamamoe\[plot\]"):
        draw(comparison(CELLS), tmp_path)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15).map(sorted))
def test_labels_are_moved_apart(heights: list[float]) -> None:
    placed = _apart(heights, 12.0, 0.0, 300.0)
    assert all(b - a >= 12.0 - 1e-6 for a, b in itertools.pairwise(placed))
    assert placed[0] >= -1e-6
    assert placed[-1] <= 300 + 1e-6
    if all(b - a >= 12 for a, b in itertools.pairwise(heights)):
        assert placed == pytest.approx(heights)


def test_labels_can_be_read_on_white() -> None:
    for colour in COLOURS:
        dark = _darker(colour)
        assert _contrast([int(dark[i : i + 2], 16) / 255 for i in (1, 3, 5)]) >= 4.4
