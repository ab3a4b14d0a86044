"""Build dist/ and prove what is in it: ``make dist``.

    python tests/packaging/dist.py

The sdist is packed so that the same tree gives the same bytes, the wheel is built from the sdist and has, byte for byte, the files of a
wheel that is built from the tree. Then the wheel is installed in an environment that has its dependencies but does not see the repository,
and converts a random model there.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("llamamoe", "cli", "recipes")
FOLDERS = (*PACKAGES, "benchmarks", "docs", "examples", "tests")
FILES = (
    "*.md", "*.txt", "*.cff", "LICENSE", "MANIFEST.in", "Makefile", "mkdocs.yml", "pyproject.toml", "setup.cfg", "setup.py",
)  # fmt: skip
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.py[cod]", "work", ".ipynb_checkpoints", "quickstart-output")
IMPORTED = """
import sys
from pathlib import Path
import llamamoe, llamamoe_cli, llamamoe_recipes
where = Path(sys.prefix).resolve()
for module in (llamamoe, llamamoe_cli, llamamoe_recipes):
    assert Path(module.__file__).resolve().is_relative_to(where), module.__file__
"""
"""Imported modules are those that the wheel installed."""
MAKE_DENSE = """
import sys
from pathlib import Path
from tests.dense import make_byte_level, make_dense
make_byte_level(make_dense(Path(sys.argv[1]), vocab_size=300))
"""


def copy_tree(to: Path, folders: tuple[str, ...] = FOLDERS) -> Path:
    """Copy what an sdist is made of, so that leftovers of earlier builds cannot leak in and none are left behind."""
    to.mkdir()
    for name in folders:
        shutil.copytree(ROOT / name, to / name, ignore=LEFTOVERS)
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            shutil.copy(path, to / path.name)
    return to


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` of the tree ``source``, with the setuptools that is installed, into the empty folder ``out``."""
    call(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source)
    (built,) = out.iterdir()
    return built


def call(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command; return what it printed, or end with all that it said."""
    run = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}exit code {run.returncode}")
    return run.stdout


def repack(sdist: Path, to: Path, epoch: int) -> Path:
    """Write the archive anew: sorted, and without the times, owners and permissions of this checkout."""
    with (
        tarfile.open(sdist) as old,
        to.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted((m for m in old if m.isfile()), key=lambda m: m.name):
            info = tarfile.TarInfo(member.name)
            info.size, info.mtime, info.mode = member.size, epoch, 0o755 if member.mode & 0o100 else 0o644
            new.addfile(info, old.extractfile(member))
    return to


def unpack(sdist: Path, to: Path) -> Path:
    """Unpack the archive; return its one folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(to, filter="data")
    (folder,) = to.iterdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Path to bytes of all files below, without what setuptools adds."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].endswith((".egg-info", "PKG-INFO", "setup.cfg"))
    }


def members(wheel: Path) -> dict[str, bytes]:
    """Path to bytes of all files in the wheel."""
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def compare(what: str, ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> None:
    """End with the names that differ."""
    wrong = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if wrong:
        raise SystemExit(f"{what} differ in {len(wrong)} files: {', '.join(wrong[:10])}")


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel in a new environment; return its folder of commands.

    Dependencies are those of this interpreter. They are named by a path in a ``.pth`` file, in which other ``.pth`` files are not read: an
    editable installation of the repository, which hangs on one, is not there.
    """
    venv.create(folder, symlinks=True)
    bin = folder / "bin"
    call(sys.executable, "-m", "pip", "--python", bin / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(p for p in sys.path if Path(p).name == packages.name) + "\n")
    return bin


def prove(bin: Path, scratch: Path, version: str) -> None:
    """Use the installed commands on a random model, outside the repository."""
    dense = scratch / "dense"
    call(sys.executable, "-c", MAKE_DENSE, dense, cwd=ROOT)
    (scratch / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> str:
        return call(bin / command[0], *command[1:], cwd=scratch, env=env)

    run("python", "-c", IMPORTED)
    assert run("llamamoe", "--version").split()[-1] == version
    assert "token_clusters" in run("llamamoe", "methods")
    run("llamamoe", "split", "dense", "moe", "--experts", "4", "--top-k", "2", "--calibration", "text.txt",
        "--calibration-tokens", "256", "--calibration-length", "32")  # fmt: skip
    assert json.loads((scratch / "moe" / "config.json").read_text())["architectures"]
    run("llamamoe", "report", "moe", "--against", "dense", "--text", "text.txt", "--max-tokens", "256", "--context-length", "64",
        "--oracle-tokens", "64", "--out", "page.html")  # fmt: skip
    assert "<style>" in (scratch / "page.html").read_text(encoding="utf-8")


def main() -> None:
    """Build, compare, install, use, and only then put the files into dist/."""
    epoch = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800"))
    with TemporaryDirectory() as name:
        scratch = Path(name)
        tree = copy_tree(scratch / "tree")
        made = build("sdist", tree, scratch / "made")
        (scratch / "out").mkdir()
        sdist = repack(made, scratch / "out" / made.name, epoch)
        source = unpack(sdist, scratch / "unpacked")
        compare("The sdist and the tree", contents(source), contents(copy_tree(scratch / "again")))
        wheel = build("wheel", source, scratch / "wheel")
        compare("The wheels of sdist and tree", members(wheel), members(build("wheel", tree, scratch / "other")))
        version = wheel.name.split("-")[1]
        prove(install(wheel, scratch / "environment"), scratch, version)
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        (ROOT / "dist").mkdir()
        for path in (sdist, wheel):
            shutil.copy(path, ROOT / "dist")
            print(f"dist/{path.name}: {path.stat().st_size:,} bytes, sha256 {sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
