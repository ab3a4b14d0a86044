"""The tables of sources, targets and other programs are the data that the code has."""

from __future__ import annotations

from llamamoe.architectures.targets import TARGETS, clients
from llamamoe.catalog import Cell, matrix

from .pages import ROOT

PAGE = (ROOT / "docs" / "reference" / "targets.md").read_text(encoding="utf-8")


def cell_text(plain: Cell, shared: Cell) -> str:
    if not plain.supported and not shared.supported:
        return "–"
    first = plain if plain.supported else shared
    return ("✓" if "4.57" in first.transformers else "5") + " s" * shared.supported + " *" * (first.dtype == "float32")


def matrix_table() -> str:
    found = matrix()
    rows = [["source", *found.targets], ["---"] * (1 + len(found.targets))]
    for family, variant in found.rows:
        name = family if variant == "plain" else f"{family}, {variant}"
        plain = [found.cell(family, target, variant=variant) for target in found.targets]
        shared = [found.cell(family, target, variant=variant, shared=True) for target in found.targets]
        rows.append([name, *map(cell_text, plain, shared)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_of_targets_is_the_matrix() -> None:
    assert "| llama | – | ✓ s | – | ✓ s | 5 s | ✓ s | – | ✓ | ✓ | ✓ s | – | – |" in PAGE
    assert matrix_table() in PAGE


def test_the_table_of_other_programs_is_the_data() -> None:
    header, *rows = zip(*clients.table(), strict=True)
    titles = [header[0], *(f"`{kind}`" for kind in header[1:])]
    assert "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)) in PAGE
    assert clients.versions() in PAGE.replace("\n", " ")
    for client in clients.CLIENTS:
        assert {kind.split()[0] for kind in client.results} == set(TARGETS.names()), client.name


def test_the_table_of_what_a_target_holds_is_the_data() -> None:
    words = {"any": "any", "none": "none", "leading": "leading", "ends": "leading and trailing"}
    routed = [target for target in TARGETS if target.routed]
    assert routed
    for target in routed:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{target.name}` |"))
        _, _, shared, dense, *_ = (cell.strip() for cell in row.split("|"))
        assert shared == ("no" if target.shared == "none" else "yes")
        assert dense == words[target.dense_layers]


def test_the_table_of_refused_families_is_the_data() -> None:
    rows = [f"| `{family}` | {reason} |" for family, reason in sorted(matrix().refused.items())]
    assert rows
    assert "\n".join(rows) in PAGE
