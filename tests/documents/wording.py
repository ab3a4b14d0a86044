"""Lint of the wording that ruff has no rule for: ``python tests/documents/wording.py [FOLDER]`` (``make lint`` runs it).

Refuses docstrings that open with a question word ("Whether the model fits.") instead of a verb or a noun ("Return whether
the model fits."), and "is no ..." where "is not a ..." is meant.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

OPENING = re.compile(r"\W*(What|Whether|How|Why|Where|Which|Who)\b")
IS_NO = re.compile(r"(?<!here )\bis no (?!longer\b|more\b|better\b|worse\b|\w+er than\b)", re.IGNORECASE)
"""Not "there is no", "is no longer" and comparisons."""

PROSE = {".py", ".pyi", ".md", ".yaml", ".yml", ".j2", ".cfg", ".toml"}
SKIPPED = re.compile(r"(^|/)\.|^(site|build|dist|demo-output)/|/(test_)?wording\.py$")
ALLOWED: tuple[str, ...] = ()
"""Beginnings of the paths that are not checked."""


def openings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and message of each docstring, attributes' included, that opens with a question word."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else []:
            match each:
                case ast.Expr(value=ast.Constant(value=str(text))) if found := OPENING.match(text):
                    yield each.lineno, f'docstring opens with "{found.group(1)}": say what it does or is'


def faults(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and message of each fault in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".py", ".pyi"}:
        yield from openings(text)
    for number, line in enumerate(text.splitlines(), start=1):
        if IS_NO.search(line):
            yield number, '"is no": write "is not a"'


def check(root: Path, allowed: tuple[str, ...] = ALLOWED) -> list[str]:
    """Return ``path:line: message`` for each fault below a folder, and an entry of ``allowed`` that nothing needs."""
    found, needed = [], set()
    for path in sorted(each for each in root.rglob("*") if each.suffix in PROSE and each.is_file()):
        name = path.relative_to(root).as_posix()
        if SKIPPED.search(name):
            continue
        of_file = [f"{name}:{line}: {message}" for line, message in faults(path)]
        exempt = [each for each in allowed if name.startswith(each)]
        needed.update(exempt if of_file else ())
        found += [] if exempt else of_file
    return found + [f"{each}: nothing to allow here any more" for each in allowed if each not in needed]


if __name__ == "__main__":
    messages = check(Path(sys.argv[1]), ()) if len(sys.argv) > 1 else check(Path(__file__).resolve().parents[2])
    sys.exit("\n".join(messages) or 0)
