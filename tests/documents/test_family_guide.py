"""The guide to a new family shows the family that it names, and places that exist."""

from __future__ import annotations

import re

from llamamoe.architectures.sources import SOURCES

from .pages import ROOT, blocks

FAMILY = "seed_oss"
GUIDE = (ROOT / "docs" / "how-to" / "family.md").read_text(encoding="utf-8")


def test_the_file_in_the_guide_is_the_file_of_the_family() -> None:
    shown = [block for _, block in blocks(GUIDE, "python")]
    assert shown == [(ROOT / f"llamamoe/architectures/sources/{FAMILY}.py").read_text(encoding="utf-8")]
    assert FAMILY in SOURCES.names()


def test_every_list_that_the_guide_names_has_the_family() -> None:
    named = re.findall(r"`([A-Z_]+)`(?:,? (?:in|of) `([\w/]+\.py)`)", GUIDE)
    assert len(named) >= 7
    for variable, path in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^{variable}\b.* = [\[({{]", text, re.MULTILINE), f"{path} has no list {variable}"
        if variable not in ("FAMILIES", "NARROWER"):  # of families written as another one, and of keys
            assert re.search(r"seed[-_]oss", text), f"{path} lacks the family"


def test_the_tiny_model_of_the_guide_is_the_one_of_the_tests() -> None:
    quoted = re.findall(r'`("[\w-]+": \{"model_type".*?\})`', GUIDE)
    assert len(quoted) == 1
    assert f"    {quoted[0]},\n" in (ROOT / "tests/dense.py").read_text(encoding="utf-8")
