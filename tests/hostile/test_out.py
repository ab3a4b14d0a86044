"""OUT: what must never be harmed, what must never be left, and a disk that is too small or breaks."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llamamoe
from llamamoe.checkpoint.ledger import LEDGER, partial_path
from llamamoe.errors import LlamaMoeError, RefusedError, VerificationError

from .conftest import Refused, digests, edit_weights, recipe

Usage = namedtuple("Usage", "total used free")


def test_out_is_source(source: Path, refused: Refused) -> None:
    refused(source, "must not contain each other", "Choose an OUT elsewhere", out=source, force=True)
    refused(source, "must not contain each other", out=source / ".." / "dense", force=True)


def test_out_inside_source(source: Path, refused: Refused) -> None:
    refused(source, "must not contain each other", out=source / "a" / "b")


def test_source_inside_out(source: Path, refused: Refused) -> None:
    refused(source, "must not contain each other", out=source.parent, force=True)


@pytest.mark.parametrize("keys", [{}, {"force": True}, {"resume": True}])
def test_source_where_out_is_put_together(
    source: Path, tmp_path: Path, refused: Refused, keys: dict[str, bool]
) -> None:
    source = source.rename(tmp_path / "out.partial")
    refused(source, "must not contain each other", "out.partial", **keys)


def test_out_is_a_link_to_the_source(source: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "link").symlink_to(source)
    refused(source, "must not contain each other", out=tmp_path / "link", force=True)


def test_out_is_a_link(source: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused(source, "link", "is a symbolic link", out=tmp_path / "link", force=True)
    (tmp_path / "elsewhere").rmdir()
    refused(source, "link", "broken symbolic link", out=tmp_path / "link", force=True)


def test_out_is_a_file(source: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    refused(source, "is not a folder", "Choose another name", out=tmp_path / "file", force=True)
    refused(source, "is not a folder", out=tmp_path / "file" / "below", force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_out_is_not_empty(source: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    refused(source, "is not empty", "llamamoe did not write what it holds")
    assert (tmp_path / "out" / "notes").read_text() == "mine"


@pytest.mark.parametrize("held", [["notes"], ["config.json"], ["model.safetensors"], ["config.json", "weights.bin"]])
def test_force_never_removes_what_is_no_checkpoint(
    source: Path, tmp_path: Path, refused: Refused, held: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    for name in held:
        (tmp_path / "out" / name).write_text("mine")
    before = digests(tmp_path / "out")
    refused(source, "not written by llamamoe", "Choose another name", force=True)
    assert digests(tmp_path / "out") == before


def test_force_never_removes_a_dense_checkpoint(source: Path, tmp_path: Path, refused: Refused) -> None:
    other = Path(shutil.copytree(source, tmp_path / "out"))
    before = digests(other)
    refused(source, "not written by llamamoe", "Choose another name", force=True)
    assert digests(other) == before


@pytest.mark.parametrize("name", ["notes.txt", "my-runs", ".git", "mine.safetensors"])
def test_force_never_removes_what_lies_beside_a_conversion(
    source: Path, tmp_path: Path, refused: Refused, name: str
) -> None:
    out = llamamoe.split(source, tmp_path / "out", recipe(), verify=False).out
    if "." in name[1:]:
        (out / name).write_text("mine")
    else:
        (out / name).mkdir()
    refused(source, f"also holds '{name}'", "Move it away", force=True)
    assert (out / name).exists()


VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "split": lambda made, source, out: llamamoe.split(source, out, recipe(), force=True, verify=False),
    "retop": lambda made, source, out: llamamoe.retop(made, out, 3, force=True),
    "resplit": lambda made, source, out: llamamoe.resplit(made, out, 2, force=True),
    "mix": lambda made, source, out: llamamoe.mix(
        source, out, llamamoe.load_mix_recipe(given={"experts": [str(source)] * 2}), force=True
    ),
}


@pytest.mark.parametrize("write", VERBS.values(), ids=list(VERBS))
@pytest.mark.parametrize("there", [True, False], ids=["OUT is there", "OUT is not there"])
def test_what_is_called_as_a_replaced_out_and_is_not_ours_is_left_alone(
    source: Path, tmp_path: Path, write: Callable[[Path, Path, Path], object], there: bool
) -> None:
    out = tmp_path / "out"
    made = llamamoe.split(source, tmp_path / ("out" if there else "made"), recipe(), verify=False).out
    foreign = tmp_path / ".out.llamamoe-replaced"
    foreign.mkdir()
    (foreign / "notes").write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(RefusedError, match="holds something else"):
        write(made, source, out)
    assert digests(tmp_path) == before


def test_force_replaces_a_conversion(source: Path, tmp_path: Path) -> None:
    old = llamamoe.split(source, tmp_path / "out", recipe(), verify=False).out
    before = digests(old)
    result = llamamoe.split(source, old, recipe(seed=1), force=True, verify=False)
    assert digests(result.out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def test_the_old_conversion_comes_back_when_the_new_one_cannot_take_its_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = llamamoe.split(source, tmp_path / "out", recipe(), verify=False).out
    before = digests(old)
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(LlamaMoeError, match="Input/output error"):
        llamamoe.split(source, old, recipe(seed=1), force=True, verify=False)
    assert digests(old) == before


def test_force_keeps_the_old_checkpoint_until_the_new_one_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = llamamoe.split(source, tmp_path / "out", recipe(), verify=False).out
    before = digests(old)
    break_call(monkeypatch, "pwrite", 10)
    with pytest.raises(LlamaMoeError):
        llamamoe.split(source, old, recipe(), force=True, verify=False)
    assert digests(old) == before


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("resume", [True, False])
def test_foreign_folder_where_out_is_put_together(
    source: Path, tmp_path: Path, refused: Refused, force: bool, resume: bool
) -> None:
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    (foreign / "folder").mkdir()
    before = digests(foreign)
    refused(source, "out.partial", force=force, resume=resume)
    assert digests(foreign) == before


@pytest.mark.parametrize("kind", ["file", "link"])
def test_no_folder_where_out_is_put_together(source: Path, tmp_path: Path, refused: Refused, kind: str) -> None:
    if kind == "file":
        (tmp_path / "out.partial").write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    refused(source, "out.partial", "holds something else", "Choose another OUT", force=True)
    refused(source, "out.partial", "holds something else", resume=True)


def test_empty_folder_and_missing_parents_are_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert llamamoe.split(source, tmp_path / "out", recipe(), verify=False).out == tmp_path / "out"
    llamamoe.split(source, tmp_path / "a" / "b" / "out", recipe(), verify=False)
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_out_is_the_current_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, out: str
) -> None:
    """A folder that is replaced under a shell's feet would look empty to it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(source, "the current folder" if out != ".." else "", out=out)


@pytest.mark.parametrize("place", [r"C:\models\x", "C:/models/x", r"models\x", r".\x"])
def test_a_windows_path_is_refused(source: Path, refused: Refused, place: str) -> None:
    refused(source, f"OUT ({place}) is a Windows path", "folders are separated by /", out=Path(place))


def test_places_of_other_commands_are_refused_alike(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Some text. " * 50)
    study = llamamoe.load_compare_recipe(given={"methods": ["kmeans"], "evaluation": [str(text)]})
    before = sorted(tmp_path.iterdir())
    for call in (
        lambda: llamamoe.demo(r"C:\demo"),
        lambda: llamamoe.report([source], [text], out=r"C:\page.html"),
        lambda: llamamoe.report([source], [text], json_out=r"C:\page.json"),
        lambda: llamamoe.compare(source, r"C:\study", study),
        lambda: llamamoe.plan_comparison(source, study, out=r"C:\study"),
    ):
        with pytest.raises(RefusedError, match="is a Windows path"):
            call()
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_that_is_not_utf8_is_refused_first(source: Path, tmp_path: Path, refused: Refused) -> None:
    refused(source, r"out\udcff) is not UTF-8", "Choose another name", out=tmp_path / os.fsdecode(b"out\xff"))


def test_a_source_whose_name_is_not_utf8_is_read(source: Path, tmp_path: Path) -> None:
    renamed = source.rename(tmp_path / os.fsdecode(b"dense\xff"))
    out = llamamoe.split(renamed, tmp_path / "out", recipe()).out
    assert llamamoe.verify(out, renamed).passed


def test_dots_in_out_are_resolved(source: Path, tmp_path: Path) -> None:
    result = llamamoe.split(source, tmp_path / "new" / "below" / "..", recipe(), verify=False)
    assert result.out == tmp_path / "new"
    assert (tmp_path / "new" / "config.json").is_file()


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_disk_too_small(source: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**5, 10**5))
    refused(source, "takes 0.07 GB", "has 0.00 GB free", "Free some space")


def test_disk_that_just_suffices(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = llamamoe.plan_conversion(source, recipe()).cost.nbytes + 64 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, need - 1))
    with pytest.raises(RefusedError, match="free"):
        llamamoe.split(source, tmp_path / "out", recipe(), verify=False)
    with pytest.raises(RefusedError, match="free"):
        llamamoe.plan_conversion(source, recipe(), out=tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, need))
    llamamoe.split(source, tmp_path / "out", recipe(), verify=False)


@pytest.mark.parametrize("way", ["resume", "force"])
def test_the_work_of_a_stopped_call_makes_room(
    source: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--resume`` continues it, and ``--force`` discards it."""
    need = llamamoe.plan_conversion(source, recipe()).cost.nbytes + 64 * 2**20
    with monkeypatch.context() as patch:
        break_call(patch, "fsync", 3)
        with pytest.raises(LlamaMoeError, match="No space"):
            llamamoe.split(source, tmp_path / "out", recipe(), verify=False)
    written = sum(each.stat().st_blocks * 512 for each in partial_path(tmp_path / "out").iterdir() if each.is_file())
    assert written > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, need - written))
    llamamoe.split(source, tmp_path / "out", recipe(), verify=False, **{way: True})


def break_call(monkeypatch: pytest.MonkeyPatch, name: str, count: int, code: int = errno.ENOSPC) -> None:
    """Let the ``count``-th call of a function of ``os`` fail."""
    real, left = getattr(os, name), [count]

    def broken(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, name, broken)


@pytest.mark.parametrize(
    ("name", "count"),
    [("pwrite", 1), ("pwrite", 2), ("pwrite", 20), ("pwrite", 40), ("fdatasync", 1), ("fdatasync", 3), ("fsync", 1),
     ("fsync", 2), ("fsync", 4), ("fsync", 5), ("fsync", 8)],
)  # fmt: skip
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_write_errors_half_way(source: Path, tmp_path: Path, name: str, count: int, code: int) -> None:
    before, whole = digests(source), llamamoe.split(source, tmp_path / "whole", recipe(), verify=False).out
    with pytest.MonkeyPatch.context() as patch:
        break_call(patch, name, count, code)
        with pytest.raises(LlamaMoeError, match=os.strerror(code)) as caught:
            llamamoe.split(source, tmp_path / "out", recipe(), verify=False)
    assert caught.value.exit_code == 1
    assert "out.partial" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert digests(source) == before
    llamamoe.split(source, tmp_path / "out", recipe(), verify=False, resume=True)
    assert without_receipt(tmp_path / "out") == without_receipt(whole)


def without_receipt(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name != "llamamoe_receipt.json"}


@pytest.mark.parametrize("file", ["config.json", "llamamoe_recipe.yaml", "README.md", "tokenizer.json"])
def test_write_errors_of_small_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    real = os.replace

    def failing(old: Path, new: Path) -> None:
        if new == tmp_path / "out.partial" / file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(old))
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(LlamaMoeError, match="No space left") as caught:
            llamamoe.split(source, tmp_path / "out", recipe(), verify=False)
    assert caught.value.exit_code == 1
    assert file in str(caught.value)
    assert not (tmp_path / "out").exists()
    llamamoe.split(source, tmp_path / "out", recipe(), verify=False, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def test_failed_verification_keeps_out_from_appearing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamamoe.checkpoint.writer import CheckpointWriter

    def lie(self: CheckpointWriter) -> str:
        edit_weights(self.path, lambda t: t["model.norm.weight"].mul_(2))
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "weights_sha256", lie)
        with pytest.raises(VerificationError) as caught:
            llamamoe.split(source, tmp_path / "out", recipe())
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / LEDGER).exists()


def test_failing_progress_callback_leaves_what_resume_finishes(source: Path, tmp_path: Path) -> None:
    def fail(step: llamamoe.progress.Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llamamoe.split(source, tmp_path / "out", recipe(), progress=fail)
    assert not (tmp_path / "out").exists()
    llamamoe.split(source, tmp_path / "out", recipe(), verify=False, resume=True)


# ---- links in a folder that was handed over ------------------------------------------------------------------------

LINKS = ["model.safetensors", "config.json", "config.json.tmp", "llamamoe_recipe.yaml.tmp", "tokenizer.json", LEDGER]


def stop(source: Path, out: Path) -> Path:
    """Leave a run that stopped after its first layers."""
    with pytest.MonkeyPatch.context() as patch:
        break_call(patch, "fdatasync", 3)
        with pytest.raises(LlamaMoeError):
            llamamoe.split(source, out, recipe(), verify=False)
    return out.with_name("out.partial")


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("kind", [Path.symlink_to, Path.hardlink_to])
def test_resume_refuses_a_folder_with_a_link(source: Path, tmp_path: Path, name: str, kind: Any) -> None:
    partial, precious = stop(source, tmp_path / "out"), tmp_path / "precious"
    precious.write_bytes((partial / name).read_bytes() if (partial / name).exists() else b"mine")
    content = precious.read_bytes()
    (partial / name).unlink(missing_ok=True)
    kind(partial / name, precious)
    before = digests(partial)
    with pytest.raises(RefusedError, match="link") as caught:
        llamamoe.split(source, tmp_path / "out", recipe(), resume=True, verify=False)
    assert name in str(caught.value)
    assert precious.read_bytes() == content
    assert digests(partial) == before
    (partial / name).unlink()
    if name != LEDGER:  # without it nothing tells whose the folder is
        llamamoe.split(source, tmp_path / "out", recipe(), resume=True, verify=False)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_force_removes_links_and_not_what_they_point_to(source: Path, tmp_path: Path, name: str) -> None:
    partial, precious = stop(source, tmp_path / "out"), tmp_path / "precious"
    precious.write_text("mine")
    (partial / name).unlink(missing_ok=True)
    (partial / name).symlink_to(precious)
    llamamoe.split(source, tmp_path / "out", recipe(), force=True, verify=False)
    assert precious.read_text() == "mine"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name",
    ["notes", "notes/thesis.tex", "thesis.tex", "weights.safetensors", "config.json.tmp"],
)
def test_force_removes_nothing_that_is_not_ours(source: Path, tmp_path: Path, name: str) -> None:
    partial = stop(source, tmp_path / "out")
    path, first = partial / name, name.split("/")[0]
    path.parent.mkdir(exist_ok=True)
    _ = path.mkdir() if name == "notes" else path.write_text("mine")
    before = digests(partial)
    with pytest.raises(RefusedError, match=f"also holds '{first}'(?s:.*)Move it away"):
        llamamoe.split(source, tmp_path / "out", recipe(), force=True, verify=False)
    assert digests(partial) == before
    (partial / first).rename(tmp_path / "away")
    llamamoe.split(source, tmp_path / "out", recipe(), force=True, verify=False)


def test_what_a_kill_left_of_a_small_file_is_not_published(source: Path, tmp_path: Path) -> None:
    partial = stop(source, tmp_path / "out")
    (partial / f".llamamoe-{'0' * 16}.tmp").write_text("half")
    llamamoe.split(source, tmp_path / "out", recipe(), resume=True, verify=False)
    assert not list((tmp_path / "out").glob(".*"))
