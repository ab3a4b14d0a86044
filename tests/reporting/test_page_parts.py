"""Parts of the page: numbers as text, sentences, maps and the token view."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from llamamoe.reporting.page_grid import heat_paths, level, ticks
from llamamoe.reporting.page_values import Series, clean, count, error_of, number, percent, with_error
from llamamoe.reporting.page_view import preference_order, view_of
from llamamoe.reporting.page_words import depth_sentence, load_sentence

from .sample import SMOLLM, report


def test_numbers_as_people_write_them() -> None:
    assert [number(x) for x in (None, 0.0, 1.5, 23.846, 28268.0, 0.000123, -2.0)] == [
        "–", "0", "1.50", "23.8", "28\u202f268", "0.000123", "−2.00",
    ]  # fmt: skip
    assert percent(0.49512) == "49.5\u00a0%"
    assert with_error(1.2345, 0.0123) == "1.234\u00a0±\u00a00.012"
    assert with_error(1.2345, None) == "1.23"
    assert with_error(-8007.3, 1240.0, sign=True) == "−8\u202f007\u00a0±\u00a01\u202f240"
    assert [count(x) for x in (448, 8192, 134_515_008)] == ["448", "8.192\u00a0k", "134.5\u00a0M"]


def test_standard_errors_under_either_name() -> None:
    assert error_of({"loss_stderr": 0.1}, "loss") == 0.1
    assert error_of({"loss": 1.0}, "loss") is None


def test_clean_keeps_what_is_fine() -> None:
    fine = {"a": [1, 2.5, "tab\tand\nline", None, True]}
    assert clean(fine) == fine


@pytest.mark.parametrize(
    ("ratio", "expected"), [(None, None), (0.0, 0), (0.1, 1), (0.25, 2), (1.0, 5), (1.1, 6), (3.9, 8), (4.0, 9)]
)
def test_level(ratio: float | None, expected: int | None) -> None:
    assert level(ratio) == expected


def test_heat_paths_cover_each_measured_cell_once() -> None:
    rows = [[1.0, 1.0, 5.0, None], [0.0, 0.0, 0.0, 1.0]]
    covered = Counter(
        (int(x) + i, int(y), key)
        for key, path in heat_paths(rows).items()
        for x, y, wide in re.findall(r"M(\d+) (\d+)h(\d+)v1", path)
        for i in range(int(wide))
    )
    assert covered == Counter(
        (x, y, level(v)) for y, row in enumerate(rows) for x, v in enumerate(row) if v is not None
    )


def test_ticks() -> None:
    assert ticks(range(8), 10) == list(range(8))
    assert [range(1, 30)[i] for i in ticks(range(1, 30), 10)] == [5, 10, 15, 20, 25]


def test_experts_of_a_domain_stand_together() -> None:
    rows = [[2.0, 0.5, None, 1.2], [0.1, 3.0, None, 1.4]]
    assert preference_order(rows, 4) == [0, 1, 3, 2]


def test_frequent_experts_get_the_strong_colours() -> None:
    found = clean(report(SMOLLM))
    view = view_of(Series(1, "m", found["models"][0]), found["domains"])
    assert view is not None
    (passage, *_) = view.passages
    counts = Counter(token.expert for token in passage.tokens)
    assert [count for _, count in counts.most_common(12)] == [count for _, _, count in passage.legend]
    strong = {token.expert for token in passage.tokens if token.rank is not None}
    assert strong == {expert for _, expert, _ in passage.legend}
    assert passage.others == len(counts) - 12


@pytest.mark.parametrize(
    ("distances", "words"),
    [
        ([0.03, 0.03, 0.1, 0.2, 0.3, 0.3], "as LLaMA-MoE found"),
        ([0.3, 0.3, 0.2, 0.1, 0.03, 0.03], "opposite of what LLaMA-MoE found"),
        ([0.2, 0.2, 0.2, 0.2, 0.2, 0.2], "differ little"),
        ([0.02, 0.02, 0.02, 0.02, 0.02, 0.02], "do not follow domains"),
        ([None, None, None, None, 0.1, 0.1], "too few layers"),
    ],
)
def test_depth_sentence_follows_the_numbers(distances: list[float | None], words: str) -> None:
    layers = [{"layer": i, "domain_distance": d, "within_distance": 0.02} for i, d in enumerate(distances)]
    assert words in depth_sentence("m", layers)


def test_load_sentence_names_the_dead() -> None:
    layers = [{"layer": i, "max_violation": 0.5 * i, "dead_experts": i, "load_entropy": 0.9} for i in range(3)]
    text = load_sentence("m", layers)
    assert "busiest expert (layer 2) takes 2.00 times" in text
    assert "3 experts got no token of this text (layer 1, 2)" in text
