"""The one writer: whole files, no way through a link, and no other module that opens files for writing."""

from __future__ import annotations

import ast
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llamamoe.checkpoint import files
from llamamoe.errors import RefusedError

ROOT = Path(__file__).parents[2]
WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: files.write_text(path, "new\n"),
    "copy": lambda path: files.copy_file(Path(__file__), path),
    "tensors": lambda path: files.save_tensors(path, {"a": torch.zeros(2)}),
}
OPENERS: dict[str, Callable[[Path], Any]] = {
    "update": lambda path: files.open_update(path).close(),
    "append": lambda path: files.open_append(path).close(),
    "size": lambda path: files.set_size(path, 7),
}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "precious"
    path.write_text("precious\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "handed over").mkdir()
    return tmp_path / "handed over"


@pytest.mark.parametrize("kind", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_takes_the_place_of_a_link(
    write: Callable[[Path], Any], kind: Callable[[Path, Path], None], folder: Path, elsewhere: Path
) -> None:
    kind(folder / "name", elsewhere)
    write(folder / "name")
    assert elsewhere.read_text() == "precious\n"
    assert not (folder / "name").is_symlink()
    assert (folder / "name").read_bytes() != b"precious\n"
    assert os.listdir(folder) == ["name"]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.symlink_to, "a symbolic link"),
        (Path.hardlink_to, "a hard link"),
        (lambda path, _: path.mkdir(), "a folder"),
        (lambda path, _: os.mkfifo(path), "a pipe"),
        (lambda path, there: path.symlink_to(there.with_name("not there")), "a symbolic link"),
    ],
)
@pytest.mark.parametrize("open_file", OPENERS.values(), ids=OPENERS)
def test_a_file_that_is_not_plain_is_not_opened(
    open_file: Callable[[Path], Any], make: Callable[[Path, Path], None], kind: str, folder: Path, elsewhere: Path
) -> None:
    make(folder / "name", elsewhere)
    with pytest.raises(RefusedError, match=f"name is {kind}"):
        open_file(folder / "name")
    assert elsewhere.read_text() == "precious\n"
    assert os.listdir(elsewhere.parent) == ["precious"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(folder / "name", "old\n")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *map(str, args[:1]))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left") as caught:
            files.write_text(folder / "name", "new\n")
    assert os.listdir(folder) == ["name"]
    assert (folder / "name").read_text() == "old\n"
    assert ".llamamoe-" not in str(caught.value)


def half_written(path: Path) -> None:
    with files.replacing(path) as file:
        file.write(b"new\n")
        raise ZeroDivisionError


def test_an_error_of_the_caller_leaves_nothing(folder: Path) -> None:
    files.write_text(folder / "name", "old\n")
    for name in ("name", "other"):
        with pytest.raises(ZeroDivisionError):
            half_written(folder / name)
    assert os.listdir(folder) == ["name"]
    assert (folder / "name").read_text() == "old\n"


def test_files_get_the_mode_that_open_gives(folder: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_text(folder / "name", "x")
        files.open_append(folder / "other").close()
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_name_of_any_length_can_be_written(folder: Path) -> None:
    files.write_text(folder / ("n" * 255), "x")
    assert (folder / ("n" * 255)).read_text() == "x"


def test_appending_and_updating_keep_what_is_there(folder: Path) -> None:
    for text in (b"one\n", b"two\n"):
        with files.open_append(folder / "name") as file:
            file.write(text)
    with files.open_update(folder / "name") as file:
        assert file.read() == b"one\ntwo\n"
        os.pwrite(file.fileno(), b"ONE", 0)
    files.set_size(folder / "name", 8)
    assert (folder / "name").read_bytes() == b"ONE\ntwo\n"
    files.set_size(folder / "name", 3)
    assert (folder / "name").read_bytes() == bytes(3)


def test_what_a_kill_left_is_removed_and_nothing_else(folder: Path, elsewhere: Path) -> None:
    (folder / f".llamamoe-{'0' * 16}.tmp").write_text("half")
    (folder / f".llamamoe-{'1' * 16}.tmp").symlink_to(elsewhere)
    (folder / ".llamamoe-mine.tmp").write_text("mine")
    files.remove_temporaries(folder)
    assert sorted(os.listdir(folder)) == [f".llamamoe-{'1' * 16}.tmp", ".llamamoe-mine.tmp"]


def test_a_folder_with_a_link_is_refused(folder: Path, elsewhere: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("x")
    files.check_plain(folder)
    (folder / "a" / "b" / "link").symlink_to(elsewhere.parent)
    with pytest.raises(RefusedError, match="link is a symbolic link"):
        files.check_plain(folder)
    (folder / "sub").symlink_to(elsewhere.parent)
    with pytest.raises(RefusedError, match="sub is a symbolic link"):
        files.make_folder(folder / "sub")


def test_a_lock_is_seen_by_others_and_falls_with_its_file(folder: Path) -> None:
    assert not files.is_locked(folder / "lock")
    assert not (folder / "lock").exists()
    with files.open_append(folder / "lock") as file:
        assert not files.is_locked(folder / "lock")
        files.lock(file)
        assert files.is_locked(folder / "lock")
        with files.open_append(folder / "lock") as other, pytest.raises(files.InUseError):
            files.lock(other)
    assert not files.is_locked(folder / "lock")


# ---- nobody else opens files for writing ---------------------------------------------------------------------------

WRITING = {
    "write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "copyfile", "copy", "copy2", "copytree", "move",
    "mkstemp", "NamedTemporaryFile", "memmap", "open_memmap", "savez", "save_file", "FileLock", "ftruncate",
}  # fmt: skip
"""Names of functions that write files by name."""
ALLOWED = {
    ("llamamoe/studies/meter.py", "write_text"),  # a file of Linux's /proc
    ("llamamoe/studies/demo.py", "hardlink_to"),  # in a folder that it has just made
    ("llamamoe/data/shards.py", "memmap"),  # read only
    ("cli/__init__.py", "open"),  # /dev/null
    ("cli/main.py", "open"),  # /dev/null
}


def writing_calls(path: Path) -> Iterator[str]:
    """Names of the calls in a module that may open a file for writing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == "files"
        for name in node.names
    }  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            name, method = function.id, False
        elif isinstance(function, ast.Attribute):
            name, method = function.attr, True
        else:
            continue
        if name == "open" and _for_writing(node, method):
            yield name
        if name in WRITING and not (name in ours and not method) and not _of_a_value(function, name):
            yield name


def _of_a_value(function: ast.expr, name: str) -> bool:
    """Return whether it is ``value.copy()``, not ``shutil.copy``."""
    if name != "copy" or not isinstance(function, ast.Attribute):
        return False
    return not (isinstance(function.value, ast.Name) and function.value.id in ("shutil", "copy"))


def _for_writing(call: ast.Call, method: bool) -> bool:
    if method and isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os":
        return any(flag in ast.unparse(call) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg in ("mode", None))]
    modes = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return any(set("wax+") & set(mode) and set(mode) <= set("rwaxbt+") for mode in modes)


def test_the_search_for_writers_finds_them(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from ..checkpoint.files import write_text\n"
        "write_text(p, 't')\np.write_text('t')\nopen(p, 'w')\np.open('ab')\nopen(p, mode='r+b')\nopen(p)\np.open('rb')\n"
        "os.open(p, os.O_WRONLY | os.O_CREAT)\nos.open(p, os.O_RDONLY)\nshutil.copy(a, b)\nvalues.copy()\n"
        "from safetensors.torch import save_file\nsave_file(t, p)\n"
    )
    found = sorted(writing_calls(tmp_path / "a.py"))
    assert found == ["copy", "open", "open", "open", "open", "save_file", "write_text"]


def test_no_other_module_opens_files_for_writing() -> None:
    modules = [path for part in ("llamamoe", "cli") for path in sorted((ROOT / part).rglob("*.py"))]
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in modules
        if path != Path(files.__file__)
        for name in writing_calls(path)
    }
    assert found == ALLOWED
