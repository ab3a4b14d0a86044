"""Folders that are thrown away: also those of killed processes, and nobody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamamoe.checkpoint.scratch import scratch_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from llamamoe.checkpoint.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "large").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """Make the folder that a killed process leaves."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (found,) = tmp_path.iterdir()
    assert (found / "sub" / "large").is_file()
    return found


def test_it_is_deleted_afterwards_and_after_an_error(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        (folder / "file").write_text("x")
    with pytest.raises(FileNotFoundError), scratch_folder(tmp_path) as folder:
        (folder / "none" / "file").write_text("x")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_deleted(left: Path, tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_in_use_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as one:
        (one / "file").write_text("x")
        with scratch_folder(tmp_path):
            pass
        assert (one / "file").read_text() == "x"


@pytest.mark.parametrize("kind", ["no lock", "link", "linked lock", "named lock"])
def test_what_is_not_ours_stays(kind: str, left: Path, tmp_path: Path) -> None:
    lock = next(path for path in left.iterdir() if path.is_file())
    if kind == "link":
        kept = left.rename(tmp_path / "elsewhere")
        left.symlink_to(kept)
    else:
        kept = left
        lock.rename(tmp_path / "lock")
        if kind == "linked lock":
            lock.symlink_to(tmp_path / "lock")
        elif kind == "named lock":
            os.link(tmp_path / "lock", lock)
    with scratch_folder(tmp_path):
        pass
    assert (kept / "sub" / "large").is_file()
    assert left.exists()
