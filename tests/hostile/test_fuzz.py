"""Three hundred damaged files through the commands; see `tests.hostile.fuzz` for what must hold, and to run more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import fuzz_subjects
from .fuzz import attempt, must, results
from .fuzz_world import World

SEED = 0


def test_damaged_files_are_refused_or_harmless(tmp_path: Path) -> None:
    found = list(results(tmp_path, SEED, range(300)))
    failures = [
        f"#{each['number']} {each['subject']}: {each['damage']}\n{each['failure']}" for each in found if each["failure"]
    ]
    assert not failures, (
        "\n\n".join(failures[:5]) + f"\nRepeat with: python tests/hostile/fuzz.py --seed {SEED} --only N"
    )
    assert sum(each["code"] == 0 for each in found) > 30, "some damage is harmless, and what comes of it was loaded"
    assert sum(each["code"] != 0 for each in found) > 100


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), must)


@pytest.mark.parametrize("subject", fuzz_subjects.SUBJECTS)
def test_without_damage_every_command_is_accepted(subject: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(content: Any, *_: Any, **__: Any) -> tuple[Any, str]:
        return content.encode() if isinstance(content, str) else content, ""

    for name in ("damaged", "damaged_bytes", "damaged_json", "_odd_row"):
        monkeypatch.setattr(fuzz_subjects, name, nothing)
    for number in range(10):
        found = attempt(world, SEED, number, subject)
        if (
            "delete" in found["damage"]
            or found["kind"] in ("added_tokens.json", ".parquet")
            or (subject, found["code"]) == ("output", 2)
        ):
            continue
        assert (found["code"], found["failure"]) == (0, ""), found
