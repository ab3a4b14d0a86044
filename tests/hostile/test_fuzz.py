"""Three hundred damaged files through the commands; see `tests.hostile.fuzz` for what must hold, and to run more."""

from __future__ import annotations

from pathlib import Path

from .fuzz import results

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
