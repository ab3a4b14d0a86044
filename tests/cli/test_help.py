"""Help: complete, with defaults and examples, quick, and without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from llamamoe_cli._style import SECTIONS, Command, Option
from llamamoe_cli.main import root

import llamamoe
from llamamoe.conversion.recipe import SplitRecipe
from llamamoe.methods.splitters import SPLITTERS

from .conftest import Run

CONTEXT = click.Context(root)
COMMANDS = root.list_commands(CONTEXT)
HEAVY = ("torch", "transformers", "sklearn", "scipy")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_and_gives_examples(name: str, run: Run) -> None:
    text = run(name, "--help").stdout
    assert run(name, "-h").stdout == text
    command = root.get_command(CONTEXT, name)
    assert isinstance(command, Command)
    for param in command.params:
        if isinstance(param, click.Option):
            assert all(re.search(rf"(?m)^  .*{re.escape(o)}\b", text) for o in param.opts), param.opts
    assert "Examples:" in text
    assert "--json" in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.count(f"llamamoe {name}") >= 2, "usage and an example"


def test_root_help_lists_every_command_in_its_section(run: Run) -> None:
    text = run("--help").stdout
    assert run().stdout == text
    for name in COMMANDS:
        assert re.search(rf"(?m)^  {name}  +\S", text)
    found = [line.rstrip(":") for line in text.splitlines() if line.rstrip(":") in SECTIONS]
    assert found == [s for s in SECTIONS if s in found]


def test_commands_in_the_examples_exist(run: Run) -> None:
    for line in run("--help").stdout.splitlines():
        if line.startswith("  llamamoe "):
            assert line.split()[1] in COMMANDS


def test_split_has_a_flag_for_every_key_of_the_recipe(run: Run) -> None:
    command = root.get_command(CONTEXT, "split")
    assert command is not None
    keys = {param.key.partition(".")[0] for param in command.params if isinstance(param, Option)}
    assert keys >= set(SplitRecipe.model_fields)


def test_the_help_states_the_units_of_numbers_of_tokens(run: Run) -> None:
    text = run("split", "--help").stdout
    assert "--calibration-tokens N[k|M]" in text
    assert "64k is 64,000" in text
    assert "64k is 64,000" not in run("merge", "--help").stdout


def test_split_help_shows_defaults_and_where_they_come_from(run: Run) -> None:
    text = " ".join(run("split", "--help").stdout.split())
    for expected in ("[default: 5GB]", "[default: auto]", "[default: the method's]", "[default: the source's]"):
        assert expected in text
    assert "Random seed. [default: 0]" in text


def test_a_new_plugin_shows_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPLITTERS._found, "brand_new", SPLITTERS.get("random"))
    assert "brand_new" in run("split", "--help").stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"llamamoe {llamamoe.__version__}\n"


def test_unknown_command_names_the_near_miss(run: Run) -> None:
    text = run("spilt", code=2).stderr
    assert "Did you mean 'split'" in text


def test_unknown_option_names_the_near_miss(run: Run) -> None:
    assert "--experts" in run("split", "a", "b", "--expert", "4", code=2).stderr


def test_cheap_commands_import_nothing_heavy(dense: Path) -> None:
    lines = [["--help"], ["split", "--help"], ["methods"], ["methods", "--matrix"], ["inspect", str(dense)],
             ["split", str(dense), "--dry-run"]]  # fmt: skip
    script = (
        "import sys\nfrom llamamoe_cli.main import root\n"
        f"for args in {lines!r}:\n"
        "    try: root.main(args, prog_name='llamamoe')\n"
        "    except SystemExit as exit: assert exit.code == 0, (args, exit.code)\n"
        f"    assert not set({HEAVY!r}) & set(sys.modules), args\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    """Processor time, so that a busy machine does not matter; the first run may have to write bytecode."""
    script = (
        "import time\nfrom llamamoe_cli.main import root\n"
        "try: root.main(['--help'], prog_name='llamamoe')\n"
        "except SystemExit: import sys; print(time.process_time(), file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds.append(float(done.stderr))
    assert min(seconds) < 0.5


def test_completion_knows_the_methods() -> None:
    env = os.environ | {"_LLAMAMOE_COMPLETE": "bash_complete", "COMP_WORDS": "llamamoe split a b --method kme",
                        "COMP_CWORD": "5"}  # fmt: skip
    script = "from llamamoe_cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert done.stdout.splitlines() == ["plain,kmeans"]


def test_the_end_of_a_process_does_not_wait_for_the_garbage_collector() -> None:
    script = (
        "import atexit, gc\nfrom llamamoe_cli.main import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\nmain()"  # called after what `main` registers
    )
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) > 1000
