"""The files that start a run: each is run here, on two processes of the CPU, and trains what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.slurm import environment
from tests.training.runs import lines_of, make_world, recipe_of

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    found = recipe_of(make_world(folder), "steps=2", losses=[{"name": "switch"}])
    (folder / "recipe.yaml").write_text(found.to_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    out = recipe.parent / "alone"
    start(["bash", LAUNCH / "one_gpu.sh", recipe, out], recipe.parent)
    return out


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(command: list[str | Path], folder: Path) -> None:
    (folder / "start").mkdir(parents=True)
    env = os.environ | environment(folder / "start") | {"MASTER_PORT": free_port()}
    found = subprocess.run([str(each) for each in command], env=env, capture_output=True, text=True, check=False)
    log = folder / "start" / "slurm.log"
    assert found.returncode == 0, found.stdout + found.stderr + (log.read_text() if log.exists() else "")


def assert_same(ours: Path, theirs: Path) -> None:
    for a, b in zip(lines_of(ours), lines_of(theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=3e-5)
    assert json.loads((ours / "facts.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n#")


@pytest.mark.slow
def test_one_node_starts_a_process_a_device(
    recipe: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUS", "2")
    start(["bash", LAUNCH / "one_node.sh", recipe, tmp_path / "run", "-q"], tmp_path)
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_slurm_starts_torchrun_on_every_node_and_hands_the_cores_on(recipe: Path, alone: Path, tmp_path: Path) -> None:
    start(["sbatch", "--nodes=1", LAUNCH / "slurm.sbatch", recipe, tmp_path / "run", "-q"], tmp_path)
    assert_same(tmp_path / "run", alone)
    [line] = [each for each in (tmp_path / "start" / "slurm.log").read_text().splitlines() if each.startswith("srun")]
    assert line.startswith("srun --cpus-per-task=64 torchrun --nnodes 1 --nproc_per_node 2")


def test_accelerate_reads_its_file() -> None:
    """Of which a CPU can run nothing: its processes are for GPUs."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / "accelerate.yaml"))
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == ("MULTI_GPU", "no", 8)


def test_deepspeeds_file_leaves_to_the_recipe_what_it_decides() -> None:
    config = json.loads((LAUNCH / "deepspeed_zero1.json").read_text())
    assert config["zero_optimization"]["stage"] == 1
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto"
