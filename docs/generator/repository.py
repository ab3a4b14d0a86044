"""Pages that are files of the repository, and links from any page to such files."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import PurePosixPath

from .places import PAGES, ROOT, anchor

INCLUDED = ("ARCHITECTURE.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/split/README.md",
            "benchmarks/results/compare-smollm2/comparison.md")  # fmt: skip
"""Shown as they are; what else stands in `PAGES` has a page that was written for the site."""
FILES = "files"
"""Folder of the site with copies of the repository's files that pages link to."""
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def pages() -> dict[str, str | bytes]:
    """Return the included files, their links led to pages of the site, and the files that any page links to."""
    made: dict[str, str | bytes] = {PAGES[source]: shown(source, PAGES[source]) for source in INCLUDED}
    written = {file.relative_to(ROOT / "docs").as_posix(): file.read_text(encoding="utf-8")
               for file in (ROOT / "docs").rglob("*.md")}  # fmt: skip
    for at, text in written.items():
        for target, _ in _LINK.findall(_prose_only(text)):
            path = _in_repository(target, f"docs/{at}")
            if path is not None and not _place(path):
                made[f"{FILES}/{path}"] = (ROOT / path).read_bytes()
    for source in INCLUDED:
        for target, _ in _LINK.findall(_prose_only((ROOT / source).read_text(encoding="utf-8"))):
            path = _in_repository(target, source)
            if path is not None and not _place(path):
                made[f"{FILES}/{path}"] = (ROOT / path).read_bytes()
    return made


def with_links(text: str, page: str) -> str:
    """Return a page of ``docs/`` with links that leave the folder led to what shows these files on the site."""
    return _led(text, f"docs/{page}", page)


def shown(source: str, page: str) -> str:
    """Return a file of the repository as it is shown on a page of the site."""
    return _led((ROOT / source).read_text(encoding="utf-8"), source, page)


def _led(text: str, source: str, page: str) -> str:
    """Lead links that stand in the file ``source`` and are shown on ``page``."""

    def lead(match: re.Match[str]) -> str:
        path = _in_repository(match[1], source)
        if path is None:
            return match[0]
        place = _place(path) or f"{FILES}/{path}"
        place, _, mark = place.partition("#")
        fragment = f"#{mark}" if mark else match[2] or ""
        return os.path.relpath(place, PurePosixPath(page).parent) + fragment

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(lead, part) for part in parts)


def _prose_only(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def _in_repository(target: str, source: str) -> str | None:
    """Return the file of the repository that a link in ``source`` leads to; None if it stays in ``docs/`` or leads out."""
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    stays = path.startswith("docs/") and source.startswith("docs/")
    return None if stays or path.startswith("..") or not (ROOT / path).is_file() else path


def _place(path: str) -> str | None:
    """Return the place on the site where a file of the repository is shown."""
    if path.startswith("recipes/") and path.endswith(".yaml") and "/launch/" not in path:
        return f"reference/shipped-recipes.md#{anchor(path.removeprefix('recipes/'))}"
    return path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)
