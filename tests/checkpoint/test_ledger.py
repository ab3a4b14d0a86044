"""A changed line of a ledger is noticed, whatever was changed in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamamoe.checkpoint.ledger import LEDGER, Ledger, fingerprint_of
from llamamoe.errors import RefusedError

UNIT = {"unit": "layer.0", "sha256": {"a.weight": "0f"}, "info": {"share": 0.1, "none": None, "rows": [1, 2]}}


def test_no_bit_of_a_ledger_can_be_flipped_without_a_refusal(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    ledger = Ledger(folder, "x", resume=False, restart=False)
    ledger.append(UNIT)
    ledger.close()
    ledger = Ledger(folder, "x", resume=True, restart=False)
    assert ledger.units == {"layer.0": UNIT}
    assert ledger.seconds_before > 0
    ledger.close()
    whole = (folder / LEDGER).read_bytes()
    for place in range(len(whole) - 1):  # without the last line's end the line is half a line, and is dropped
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (folder / LEDGER).write_bytes(changed)
        with pytest.raises(RefusedError, match="damaged"):
            Ledger(folder, "x", resume=True, restart=False)


def test_a_refusal_names_what_differs(tmp_path: Path) -> None:
    parts = {"version": "1.0", "number of threads": 2, "source": ["a"], "recipe": {"seed": 0}}
    Ledger(tmp_path / "out.partial", fingerprint_of(parts), resume=False, restart=False).close()
    for changed, words in (
        ({"number of threads": 1}, r"started with another number of threads \(2, now 1\), so"),
        (
            {"recipe": {"seed": 1}, "version": "1.1"},
            r"started with another version \(1.0, now 1.1\) and another recipe, so",
        ),
        ({"source": ["b"]}, "started with another source, so"),
    ):
        with pytest.raises(RefusedError, match=words):
            Ledger(tmp_path / "out.partial", fingerprint_of(parts | changed), resume=True, restart=False)
    with pytest.raises(RefusedError, match="another source, recipe, version or number of threads"):
        Ledger(tmp_path / "out.partial", "of another kind", resume=True, restart=False)
    Ledger(tmp_path / "out.partial", fingerprint_of(parts), resume=True, restart=False).close()
