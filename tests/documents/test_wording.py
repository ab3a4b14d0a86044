"""The lint of the wording names file and line of every kind of fault, and the project passes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("wording.py")


def lint(*folder: Path) -> tuple[int, str]:
    """Exit code and output of the script for a folder, or for the project."""
    done = subprocess.run([sys.executable, SCRIPT, *folder], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("module.py", '"""What there is."""\n', 1),
        ("klass.py", 'class A:\n    """How it is told."""\n', 2),
        ("function.py", 'def f():\n    """Whether it fits.\n\n    More.\n    """\n', 2),
        ("attribute.py", 'A = 1\n"""Where it lies."""\n', 2),
        ("method.pyi", 'class A:\n    def f(self) -> None:\n        """``What`` it does."""\n', 3),
        ("argument.py", 'def f(x):\n    """Return x.\n\n    Args:\n        x: It is no file.\n    """\n', 5),
        ("message.py", 'def f(x):\n    return f"{x!r} is no {x}"\n', 2),
        ("comment.py", "x = 1\n# This is no file.\n", 2),
        ("page.md", "# Page\n\nThat is no file.\n", 3),
        ("folder/recipe.yaml", "# That is no file.\nx: 1\n", 1),
    ],
)
def test_each_kind_of_fault_is_named_with_its_line(tmp_path: Path, name: str, text: str, line: int) -> None:
    """A folder with one faulty file fails, and the message says where."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    code, output = lint(tmp_path)
    assert code == 1
    assert output.startswith(f"{name}:{line}: ")


def test_good_wording_passes(tmp_path: Path) -> None:
    """Sentences that only resemble a fault are not refused."""
    (tmp_path / "good.py").write_text(
        '"""Return whether there is no file; it is no longer needed, is no larger than that, and is not a link."""\n'
        'WHAT = "What is it?"\n'
    )
    assert lint(tmp_path) == (0, "")


def test_the_project_passes() -> None:
    """The project itself has no fault beyond the folders that are still allowed some."""
    assert lint() == (0, "")
