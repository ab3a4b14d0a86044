"""Finished cells are reused only if everything they depend on is unchanged."""

from __future__ import annotations

from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.studies.store import _ALWAYS, _closure


def test_the_code_of_a_cell_is_what_its_numbers_come_from() -> None:
    def modules(*plugins: type) -> set[str]:
        return {name.removeprefix("llamamoe.") for name in _closure(frozenset(p.__module__ for p in plugins))}

    ridge, learned = modules(ROUTERS.get("ridge")), modules(SPLITTERS.get("learned"))
    assert {"methods.routers.ridge", "numerics", "methods.contributions", "methods.layer"} <= ridge
    assert "methods.solvers.transport" in learned - ridge
    always = {name.removeprefix("llamamoe.") for name in _closure(frozenset(f"llamamoe.{n}" for n in _ALWAYS))}
    assert {
        "conversion.layer",
        "conversion.assembly",
        "methods.moe_layer",
        "calibration.walk",
        "evaluation.scoring",
    } <= always
    assert not {"conversion.split", "conversion.plan", "conversion.recipe", "conversion.session"} & (always | learned)
    assert not {"methods.splitters.learned", "methods.repairs.distill"} & always, (
        "one method changes the cells of no other"
    )
