"""``--profile``: a trace of the steps that were asked for, and the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamamoe import pretrain

from .runs import lines_of, make_world, recipe_of


def test_a_trace_holds_the_steps_and_changes_nothing(tmp_path: Path) -> None:
    recipe = recipe_of(make_world(tmp_path / "world"), "steps=4", "save_every=4", "evaluate_every=4")
    pretrain(recipe, tmp_path / "plain")
    for steps, expected in ((2, 2), (9, 3)):
        out = tmp_path / f"profiled{steps}"
        pretrain(recipe, out, profile=steps)
        [trace] = out.glob("profile-*-step2-rank0.json")
        names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
        assert len([name for name in names if name.startswith("Optimizer.step#")]) == expected
        assert lines_of(out) == lines_of(tmp_path / "plain")


def test_an_interrupted_run_leaves_its_trace_and_no_profiler(tmp_path: Path) -> None:
    recipe = recipe_of(make_world(tmp_path / "world"), "steps=4")

    def stop(progress: object) -> None:
        if getattr(progress, "stage", "") == "train" and getattr(progress, "done", 0) == 3:
            raise KeyboardInterrupt

    for name in ("once", "again"):  # two profilers at a time would be an error
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / name, profile=9, progress=stop)
        assert len(list((tmp_path / name).glob("profile-*.json"))) == 1
