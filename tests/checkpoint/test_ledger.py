"""A changed line of a ledger is noticed, whatever was changed in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamamoe.checkpoint.ledger import LEDGER, Ledger
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
