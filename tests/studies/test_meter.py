"""The progress of a study."""

from __future__ import annotations

from llamamoe.progress import Progress
from llamamoe.studies.meter import Meter


def test_a_state_is_reported_once() -> None:
    found: list[Progress] = []
    meter = Meter([3 * Meter.UNIT, Meter.UNIT], found.append)
    for label, flops in (("first", 3 * Meter.UNIT), ("second", Meter.UNIT)):
        advance = meter.cell(label, flops)
        for share in (0.0, 0.5, 1.0, 1.0):
            advance(share)
    assert [(each.done, each.detail) for each in found] == [
        (0, "first"), (1, "first"), (3, "first"), (3, "second"), (4, "second"),
    ]  # fmt: skip
