"""The pages about the tree name files that exist, and the page of a folder names all of its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(page.parent for page in (ROOT / "llamamoe").glob("*/README.md"))
EXAMPLE = "dealt.py"
"""The splitter that CONTRIBUTING.md writes as an example."""


def named(page: Path) -> set[str]:
    """Files and folders in code marks."""
    return set(re.findall(r"`([\w./]+(?:\.py|/))(?:: \w+)?`", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_page_of_a_folder_names_its_files(folder: Path) -> None:
    there = {file.name for file in folder.glob("*.py")} - {"__init__.py"}
    there |= {f"{each.name}/" for each in folder.iterdir() if (each / "__init__.py").exists()}
    assert not there - named(folder / "README.md")


@pytest.mark.parametrize(
    "page", ["ARCHITECTURE.md", "CONTRIBUTING.md", *(f"{f.relative_to(ROOT)}/README.md" for f in FOLDERS)]
)
def test_named_files_exist(page: str) -> None:
    folders = [
        ROOT,
        ROOT / "tests",
        ROOT / "llamamoe",
        *(each for each in (ROOT / "llamamoe").rglob("*") if each.is_dir()),
    ]
    for name in named(ROOT / page):
        if not name.endswith(EXAMPLE) and not name.startswith("OUT.partial"):
            assert any((folder / name).exists() for folder in folders), name
