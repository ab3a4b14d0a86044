"""The files that people look for are there, true and short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import llamamoe

from .test_documents import named

ROOT = Path(__file__).parents[2]


def test_the_citation_names_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(found)
    assert found["version"] == llamamoe.__version__
    assert found["license"] == "Apache-2.0"
    assert all((ROOT / path).exists() for path in re.findall(r"docs/[\w/.-]+\.md", found["message"]))


def test_the_page_for_newcomers_to_the_code_is_short_and_true() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"make ([a-z0-9 -]+)", text) for name in line.split()}
    assert {"venv", "test", "lint", "docs"} <= targets
    for name in re.findall(r"^    make ([a-z0-9-]+(?: [a-z0-9-]+)*)", text, re.MULTILINE):
        for target in name.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for place in named(ROOT / "AGENTS.md"):
        assert (ROOT / place).exists(), place


@pytest.mark.parametrize("page", ["AGENTS.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "RELEASING.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.stem
)
def test_issue_forms_ask_for_something(form: Path) -> None:
    found = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(found)
    assert any(each.get("validations", {}).get("required") for each in found["body"])
    for path in re.findall(r"[\w/-]+\.md", form.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_release_checklist_names_targets_and_files_that_exist() -> None:
    text = (ROOT / "RELEASING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"`make ([a-z0-9 -]+)`", text):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`([\w/]+\.(?:py|md|cff|txt))`", text):
        assert (ROOT / path).exists(), path
