"""A wheel built from this tree installs the right files."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from .dist import PACKAGES, ROOT, copy_tree

INSTALLED_AS = {"llamamoe": "llamamoe", "cli": "llamamoe_cli", "recipes": "llamamoe_recipes"}


def files_below(folder: str, *suffixes: str) -> set[str]:
    """The tree's files with these suffixes, by the path that they should have in site-packages."""
    return {
        str(Path(INSTALLED_AS[folder]) / path.relative_to(ROOT / folder))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that leftovers of earlier builds cannot leak in and none are left behind."""
    source = copy_tree(tmp_path_factory.mktemp("source") / "tree", PACKAGES)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages with the wheel installed and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def run_installed(site: Path, *command: str | Path) -> str:
    """Return the output of the command, run outside the tree with ``site`` before everything else on the path."""
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_top_level_names_cannot_collide(site: Path) -> None:
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert names == {*INSTALLED_AS.values(), "bin"}


def test_every_module_and_recipe_is_in_the_wheel(wheel: Path) -> None:
    expected = {"llamamoe/py.typed"}
    expected |= files_below("llamamoe", ".py", ".pyi", ".j2", ".css", ".js", ".json") | files_below("cli", ".py")
    expected |= files_below("recipes", ".py", ".yaml", ".md", ".sh", ".sbatch", ".json")
    with ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert installed == expected


def test_licence_text_is_in_the_wheel(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())


def test_installed_packages_import_from_the_wheel(site: Path) -> None:
    code = "import llamamoe, llamamoe_cli.main, llamamoe_recipes as r; print(llamamoe.__file__, r.__file__, sep='\\n')"
    for line in run_installed(site, "-c", code).splitlines():
        assert Path(line).is_relative_to(site)


def test_console_script_answers(site: Path) -> None:
    assert "Usage" in run_installed(site, site / "bin" / "llamamoe", "--help")


def test_constraints_pin_every_declared_dependency() -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    extras = dict(config["options.extras_require"])
    clients = extras.pop("clients")  # an environment of its own, without llamamoe
    blocks = [config["options"]["install_requires"], *extras.values()]
    for given, constraints in ((blocks, "constraints.txt"), ([clients], "constraints-clients.txt")):
        declared = {name_of(line) for block in given for line in block.split() if not line.startswith("%")}
        lines = (ROOT / constraints).read_text().splitlines()
        pinned = {name_of(line) for line in lines if "==" in line and not line.startswith("#")}
        assert declared <= pinned


def name_of(requirement: str) -> str:
    """The normalised package name of ``name>=1.0``."""
    for mark in "<>=!~[;":
        requirement = requirement.split(mark)[0]
    return requirement.lower().replace("_", "-")
