"""The checks of `benchmarks/gpu.py` at tiny sizes: on the CPU that they run, on a GPU (``pytest -m gpu``) that they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_bench import TINY, Bench

SLOW_ON_CPU = {"memory"}  # minutes in torch's profiler; test_memory.py and training_memory.py measure it there


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("cpu", TINY, tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("name", sorted(set(gpu.CHECKS) - SLOW_ON_CPU))
def test_a_check_runs_and_holds_on_the_cpu(cpu: Bench, name: str) -> None:
    result = gpu.run(cpu, [name], None, 12)
    assert result["checks"][name]["ok"], result["checks"][name]
    json.dumps(result)


def test_a_check_that_fails_is_told_and_the_others_go_on(
    cpu: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: Bench) -> dict[str, object]:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setitem(gpu.CHECKS, "broken", broken)
    monkeypatch.setitem(gpu.CHECKS, "fine", lambda bench: {"ok": True})
    result = gpu.run(cpu, ["broken", "fine"], tmp_path / "gpu.json", 12)
    assert result["checks"]["broken"]["error"] == "ZeroDivisionError: no such thing"
    assert not result["checks"]["broken"]["ok"]
    assert result["checks"]["fine"]["ok"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == result


def test_no_check_begins_when_the_time_is_up(cpu: Bench) -> None:
    result = gpu.run(cpu, ["losses", "ffn"], None, -1)
    assert result["left_out"] == ["losses", "ffn"]
    assert not result["checks"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", sorted(gpu.CHECKS))
def test_a_check_holds_on_the_gpu(tmp_path: Path, name: str) -> None:
    result = gpu.run(Bench("cuda", TINY, tmp_path), [name], None, 12)
    assert result["checks"][name]["ok"], result["checks"][name]
