"""The parts of ``make dist`` that a build alone does not show to work."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from .dist import FOLDERS, ROOT, compare, contents, copy_tree, repack, unpack


def make_archive(root: Path, names: list[str], mtime: int, mode: int) -> Path:
    """An sdist as this machine, at this time, would pack it."""
    folder = root / "llamamoe-1.0"
    folder.mkdir(parents=True)
    for name in ("a.py", "b.sh"):
        (folder / name).write_text(name)
        (folder / name).chmod(mode | (0o100 if name == "b.sh" else 0))
        os.utime(folder / name, (mtime, mtime))
    with tarfile.open(root / "made.tar.gz", "w:gz") as archive:
        for name in names:
            archive.add(folder / name, f"llamamoe-1.0/{name}")
    return root / "made.tar.gz"


def test_an_archive_is_packed_to_the_same_bytes_wherever_it_was_made(tmp_path: Path) -> None:
    ours = make_archive(tmp_path / "ours", ["a.py", "b.sh"], 1_700_000_000, 0o600)
    theirs = make_archive(tmp_path / "theirs", ["b.sh", "a.py"], 1_600_000_000, 0o664)
    packed = [repack(each, each.with_name("packed.tar.gz"), 315_532_800) for each in (ours, theirs)]
    assert packed[0].read_bytes() == packed[1].read_bytes()
    folder = unpack(packed[0], tmp_path / "out")
    assert contents(folder) == {"a.py": b"a.py", "b.sh": b"b.sh"}
    assert [(folder / name).stat().st_mode & 0o777 for name in ("a.py", "b.sh")] == [0o644, 0o755]


def test_a_missing_and_a_changed_file_end_the_build() -> None:
    compare("These", {"a": b"1"}, {"a": b"1"})
    with pytest.raises(SystemExit, match="These differ in 2 files: a, b"):
        compare("These", {"a": b"1"}, {"a": b"2", "b": b""})


def test_the_sdist_has_every_folder_of_the_repository(tmp_path: Path) -> None:
    listed = {line.split()[1] for line in (ROOT / "MANIFEST.in").read_text().splitlines() if line.startswith("graft")}
    assert listed == set(FOLDERS)
    copied = contents(copy_tree(tmp_path / "tree"))
    assert {"tests/packaging/test_dist.py", "docs/index.md", "recipes/README.md", "README.md", "CHANGELOG.md"} <= set(
        copied
    )
    assert not [name for name in copied if "__pycache__" in name]
