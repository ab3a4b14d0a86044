"""Packages that are imported on first use: the version of transformers is checked then."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from llamamoe.errors import LlamaMoeError
from llamamoe.lazy import OLDEST_TRANSFORMERS, check_transformers
from tests.dense import make_dense


def test_the_oldest_transformers_is_that_of_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    assert f"transformers>={OLDEST_TRANSFORMERS},<6" in config["options"]["install_requires"].split()


@pytest.mark.parametrize(
    ("installed", "refused"),
    [
        ("4.57.6", True),
        ("5.21.3", True),
        ("5.0.0rc1", True),
        ("5.22.0", False),
        ("5.22.0.dev0", False),
        ("5.100", False),
    ],
)
def test_an_old_transformers_is_refused(installed: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    if not refused:
        check_transformers()
        return
    with pytest.raises(LlamaMoeError, match=f"transformers {installed} is installed") as caught:
        check_transformers()
    assert "pip install --upgrade 'transformers>=5.22,<6'" in str(caught.value)


@pytest.mark.parametrize("command", ["split", "evaluate"])
def test_a_command_names_the_update(command: str, tmp_path: Path) -> None:
    """Another package replaced transformers by 4.57: nothing is written, and nothing fails later for an odd reason."""
    old = tmp_path / "site" / "transformers-4.57.6.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.6\n")
    dense = make_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("Some text. " * 40)
    more = {"split": ["out", "--method", "random"], "evaluate": ["--text", "text.txt"]}[command]
    code = "import sys; sys.path.insert(0, 'site'); from llamamoe_cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(dense), *more],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Error: transformers 4.57.6 is installed, but llamamoe needs 5.22 or newer." in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "site", "text.txt"]
