"""What finished cells depend on."""

from __future__ import annotations

from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.studies.store import _ALWAYS, _closure


def test_the_code_of_a_cell_is_what_its_numbers_come_from() -> None:
    def modules(*plugins: type) -> set[str]:
        return {name.removeprefix("llamamoe.") for name in _closure(frozenset(p.__module__ for p in plugins))}

    ridge, learned = modules(ROUTERS.get("ridge")), modules(SPLITTERS.get("learned"))
    assert {"routers.ridge", "regression", "diagnostics", "calibration.inputs"} <= ridge
    assert "transport" in learned - ridge
    always = {name.removeprefix("llamamoe.") for name in _closure(frozenset(f"llamamoe.{n}" for n in _ALWAYS))}
    assert {"layer_conversion", "assembly", "converted_ffn", "calibration.walk", "scoring"} <= always
    assert not {"conversion", "plan", "recipe", "calibration.session"} & (always | learned)
    assert not {"splitters.learned", "repairs.distill"} & always, "one method changes the cells of no other"
