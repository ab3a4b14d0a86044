"""Errors, interruption, colour, pipes and progress: what shows in a terminal or a log."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llamamoe_cli import _progress
from llamamoe_cli._format import amount, change, duration, size
from llamamoe_cli._output import Output, _finite

from llamamoe.progress import Progress

from .conftest import Run, process

SLOW = """
import time
from contextlib import contextmanager
from llamamoe_cli import _progress, main

@contextmanager
def slow(*, verbose):
    def report(step):
        if step.done == 2:
            time.sleep(60)
    yield report

_progress.plain_lines = slow
main.main()
"""


@pytest.mark.parametrize(("sent", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_interrupted_split_leaves_what_resume_finishes(
    sent: signal.Signals, word: str, dense: Path, tmp_path: Path, run: Run
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    args = ("split", str(dense), str(out), "--no-verify")
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ledger, deadline = partial / ".ledger.jsonl", time.monotonic() + 60
    while not (ledger.exists() and "layer.0" in ledger.read_text()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(sent)
    stdout, stderr = running.communicate(timeout=30)
    assert running.returncode == 128 + sent
    assert stdout == ""
    assert stderr.strip() == f"{word}; {partial} is kept, --resume continues"
    assert not out.exists()

    error = run(*args, code=3).stderr
    assert "--resume" in error
    assert run(*args, "--resume").exit_code == 0
    assert (out / "config.json").is_file()
    assert not partial.exists()


def test_interrupt_elsewhere_says_nothing_of_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llamamoe.architectures.inspect.inspect", stop)
    assert run("inspect", "x", code=130).output.strip() == "interrupted"


def test_unexpected_error_is_one_line_and_verbose_shows_the_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setattr("llamamoe.architectures.inspect.inspect", fail)
    result = run("inspect", "x", code=1)
    assert result.stdout == ""
    assert result.stderr == "Error: RuntimeError: the first line\n  Use -v for the traceback.\n"
    assert "Traceback" in run("inspect", "x", "-v", code=1).stderr


def test_errors_of_the_system_name_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise PermissionError(13, "Permission denied", "/a/file")

    monkeypatch.setattr("llamamoe.architectures.inspect.inspect", fail)
    assert "Error: /a/file: Permission denied." in run("inspect", "x", code=1).stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    running = process("methods", "-v")
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.wait(timeout=60) == 1
    assert running.stderr.read() == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(closed: str, dense: Path, tmp_path: Path) -> None:
    """Output of libraries does not go into a checkpoint that is opened under the number of a closed stream."""
    shell = f'exec "$@" {closed}'
    args = ["split", str(dense), str(tmp_path / "out"), "--experts", "4", "--method", "random", "--no-verify"]
    for arguments in (args, ["methods"]):
        found = subprocess.run(
            ["sh", "-c", shell, "sh", sys.executable, "-c", NUMBERS, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "config.json").is_file()


NUMBERS = """
import os
from llamamoe_cli import run
from llamamoe.checkpoint import files

real = files._opened

def opened(*args, **keys):
    file = real(*args, **keys)
    assert file.fileno() > 2
    return file

files._opened = opened
run()
"""


@pytest.mark.parametrize("args", [("--version",), ("--help",), ("methods", "--help"), ("methods",)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_stdout_is_one_error(args: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        running = process(*args, stdout=full)
        assert running.stderr is not None
        said = running.stderr.read()
        assert running.wait(timeout=60) == 1
    assert said.startswith("Error: No space left on device.\n"), said
    assert said.count("\n") == 2


def on_a_terminal(*args: str, columns: int = 80, **env: str) -> str:
    """Return the output of a command, or of a script after ``-c``, to a terminal (stdout and stderr)."""
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)} | env
    command = [sys.executable, *(args if args[0] == "-c" else ("-m", "llamamoe_cli", *args))]
    running = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    parts = []
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # what Linux says at the end
            break
        if not part:
            break
        parts.append(part)
    os.close(parent)
    running.wait(timeout=60)
    return b"".join(parts).decode()


def test_colour_on_a_terminal_only_and_never_with_no_color() -> None:
    assert "\x1b[1m" in on_a_terminal("methods")
    assert "\x1b[1m" in on_a_terminal("--help")
    assert "\x1b[" not in on_a_terminal("methods", NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal("split", "--help", NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal("inspect", "/no/such", NO_COLOR="1")


def test_tables_fit_a_narrow_terminal() -> None:
    text = on_a_terminal("methods", "--matrix", NO_COLOR="1")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


BAR = """
from llamamoe.progress import Progress
from llamamoe_cli._output import Output

with Output().progress() as report:
    for done in range(4):
        report(Progress("convert", done, 3, "layer"))
"""


def test_bar_on_a_terminal() -> None:
    text = on_a_terminal("-c", BAR)
    assert "convert" in text
    assert "3 of 3 layers" in text
    assert "\u2501" in text
    assert "\x1b" not in on_a_terminal("-c", BAR, TERM="dumb")


# ---- without a process ---------------------------------------------------------------------------------------------


def test_plain_progress_is_rare_and_tells_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    with Output().progress() as report:
        report(Progress("load", 1, 2, "model", "dense"))
        for done in range(1, 11):
            now[0] += 2
            report(Progress("convert", done, 10, "layer"))
        now[0] += 1
        report(Progress("verify", 1, 1, "layer", "detail"))
    assert capsys.readouterr().err.splitlines() == [
        "load: model 1 of 2, dense",
        "convert: 3 of 10 layers, 0.5 layers/s, 14 s left",
        "convert: 6 of 10 layers, 0.5 layers/s, 8.0 s left",
        "convert: 9 of 10 layers, 0.5 layers/s, 2.0 s left",
        "convert: 10 of 10 layers, 20 s",
        "verify: 1 of 1 layer, 1.0 s",
    ]


def test_the_time_left_is_planned_at_first_and_forgets_a_pause(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    with Output().progress() as report:
        report(Progress("convert", 0, 10, "layer", expected_seconds=240))
        for done in range(1, 7):
            now[0] += 1000 if done == 3 else 20
            report(Progress("convert", done, 10, "layer"))
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "convert: 0 of 10 layers, about 4 min 00 s expected"
    assert shown[1].endswith("0.05 layers/s, 3 min 00 s left")
    assert shown[-1].endswith("0.05 layers/s, 1 min 20 s left")


def test_quiet_has_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(quiet=True).progress() as report:
        report(Progress("convert", 1, 1, "layer"))
    assert capsys.readouterr() == ("", "")


def test_json_holds_no_nan() -> None:
    assert json.dumps(_finite({"a": (float("nan"), 1.5), 2: Path("x")})) == '{"a": [null, 1.5], "2": "x"}'


def test_numbers() -> None:
    assert [amount(n) for n in (0, 999, 1000, 999_960, 12_900_000_000, 46.7e9)] == [
        "0", "999", "1.00 k", "1.00 M", "12.9 B", "46.7 B"
    ]  # fmt: skip
    assert [size(n) for n in (12, 13_480_000_000)] == ["12 B", "13.5 GB"]
    assert [duration(s) for s in (0.04, 9.96, 59.6, 200, 7500)] == [
        "0.0 s",
        "10 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert [change(a, b) for a, b in ((1, 1), (100, 44), (1000, 1012), (0, 5))] == ["same", "-56 %", "+1.2 %", "new"]


EARLY = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Interrupting(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == {at!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.{handler})
import llamamoe_cli
sys.meta_path.insert(0, Interrupting())
llamamoe_cli.run()
"""


@pytest.mark.parametrize("at", ["click", "llamamoe_cli.main", "llamamoe_cli.verify"])
def test_interrupt_before_a_command_began_is_one_line(at: str) -> None:
    code = EARLY.format(at=at, handler="default_int_handler")
    found = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    """As in a shell's background."""
    code = EARLY.format(at="click", handler="SIG_IGN")
    found = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("llamamoe ")
