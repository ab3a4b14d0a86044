"""Content of foreign files reaches the terminal as text: no control characters, at most a screen, no traceback."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import llamamoe_cli
import pytest
from click.testing import CliRunner, Result
from llamamoe_cli.main import root

import llamamoe
from llamamoe.errors import LlamaMoeError, bounded, printable

from .conftest import edit_config, edit_weights, recipe

EVIL = "a\x1b[2Jb\u202ec\x00d\ud800e\x9bf"
SAFE = r"a\x1b[2Jb\u202ec\x00d\ud800e\x9bf"


def run(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(root, [str(each) for each in args], prog_name="llamamoe")
    assert result.exit_code == code, result.output
    return result


def unprintable(text: str) -> list[str]:
    return [each for each in text if not each.isprintable() and each != "\n"]


def test_control_characters_are_escaped() -> None:
    assert printable(EVIL) == SAFE
    assert printable("line\nline") == r"line\nline"
    assert printable("line\nline", lines=True) == "line\nline"
    assert printable("plain 専門家 😀 é") == "plain 専門家 😀 é"


def test_an_error_is_escaped_and_cut_to_a_screen() -> None:
    error = LlamaMoeError(f"it holds {EVIL}", hint=EVIL)
    assert (error.message, error.hint) == (f"it holds {SAFE}", SAFE)
    assert str(error) == f"it holds {SAFE}\n  {SAFE}"
    wide = LlamaMoeError("key = '" + "x" * 10**6 + "', but it must be short.").message
    assert len(wide) < 1000
    assert wide.startswith("key = 'xxx")
    assert wide.endswith("', but it must be short.")
    assert re.search(r"xx \.\.\. \(999,\d\d\d characters\) \.\.\. xx", wide)
    long = bounded("\n".join(f"- {i}" for i in range(1000)))
    assert long.splitlines()[-1] == "  ... and 980 more lines"
    assert len(bounded("\n".join("y" * 500 for _ in range(1000)))) < 2000
    assert bounded("short") == "short"


@pytest.mark.parametrize("flags", [(), ("-v",), ("--json",)])
def test_inspect_prints_no_control_characters(source: Path, flags: tuple[str, ...]) -> None:
    def change(config: dict[str, object]) -> None:
        config["architectures"] = [EVIL.replace("\ud800", "")]
        config["llamamoe"] = {EVIL.replace("\ud800", "") + "key": [EVIL.replace("\ud800", "")]}
        config["quantization_config"] = {"quant_method": EVIL.replace("\ud800", "")}

    edit_config(source, change)
    edit_weights(source, lambda tensors: tensors.update({"x\x1b]0;title\x07": tensors["lm_head.weight"].clone()}))
    evil = source.rename(source.with_name("d\x1b[31m\u202e"))
    result = run("inspect", evil, *flags)
    assert not unprintable(result.stdout + result.stderr)
    if flags == ("--json",):
        data = json.loads(result.stdout)
        assert data["architecture"] == EVIL.replace("\ud800", "")
        assert data["name"] == printable(evil.name), "a name is escaped wherever it is told"
        assert data["path"] == str(evil), "a path is what it is"
    else:
        assert r"a\x1b[2Jb\u202ec" in result.stdout


def test_an_error_prints_no_control_characters(source: Path) -> None:
    edit_weights(source, lambda tensors: tensors.update({"x\x1b]0;title\x07": tensors["lm_head.weight"].clone()}))
    result = run("split", source.rename(source.with_name("d\x1b[31m\nx")), source.parent / "out", "--dry-run", code=3)
    assert not unprintable(result.stdout + result.stderr)
    assert r"x\x1b]0;title\x07" in result.stderr


def test_all_that_the_command_line_prints_passes_the_one_place() -> None:
    folder = Path(llamamoe_cli.__file__).parent
    direct = {
        path.name: len(re.findall(r"click\.s?echo\(|(?<![.\w])print\(", path.read_text(encoding="utf-8")))
        for path in folder.glob("*.py")
    }
    assert {name: count for name, count in direct.items() if count} == {"_text.py": 1, "main.py": 1}


def disk(number: int) -> Callable[[], Exception]:
    return lambda: OSError(number, os.strerror(number), "/some/place")


class SafetensorError(Exception):
    """As the library written in Rust reports the system's errors."""


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (disk(errno.ENOSPC), ("/some/place: No space left on device", "Free some space")),
        (disk(errno.EDQUOT), ("quota", "Free some space")),
        (disk(errno.EACCES), ("Permission denied", "permissions")),
        (disk(errno.EROFS), ("Read-only", "another folder")),
        (disk(errno.EMFILE), ("Too many open files", "ulimit -n")),
        (disk(errno.ENOMEM), ("memory", "smaller")),
        (disk(errno.EIO), ("/some/place",)),
        (lambda: MemoryError(), ("not enough memory", "smaller")),
        (lambda: OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ("2 GiB", "smaller")),
        (lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't"), ("memory", "smaller")),
        (lambda: RecursionError("maximum recursion depth exceeded"), ("nested too deeply",)),
        (lambda: RuntimeError("can't start new thread"), ("thread", "ulimit -u")),
        (
            lambda: SafetensorError("I/O error: No space left (os error 28)"),
            ("No space left on device", "Free some space"),
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line_and_a_way_out(
    make: Callable[[], Exception], words: tuple[str, ...], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise make()

    monkeypatch.setattr("llamamoe.architectures.inspect.inspect", fail)
    result = run("inspect", source, code=1)
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) <= 2
    assert "traceback" not in result.stderr.lower()
    for word in words:
        assert word in result.stderr


def test_the_name_of_a_folder_is_escaped_in_what_is_made_of_it(source: Path, tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b[2J\udcff\n---\nlicense: mit"
    source.rename(evil)
    made = llamamoe.split(evil, tmp_path / "made", recipe(), verify=False).out
    llamamoe.retop(made, tmp_path / "again", 3)
    for folder in (made, tmp_path / "again"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert unprintable(text) == []
        assert "\nlicense: mit" not in text
    assert r"a\x1b[2J\udcff\n---\nlicense: mit" in (made / "README.md").read_text(encoding="utf-8")
