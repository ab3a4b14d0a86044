"""The hook of mkdocs.yml: adds the generated pages, and leads links to files of the repository to their pages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]

from generator import api, command_line, json_output, methods, recipe_pages, repository  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add every generated page."""
    made: dict[str, str | bytes] = {}
    for module in (api, command_line, json_output, methods, recipe_pages, repository):
        made |= module.pages()
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files of the repository to what shows them here."""
    return repository.with_links(markdown, page.file.src_uri)
