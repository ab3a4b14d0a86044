from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from llamamoe.architectures.rescales import RESCALES
from llamamoe.architectures.sources import SOURCES
from llamamoe.architectures.targets import TARGETS
from llamamoe.catalog import list_methods, matrix
from llamamoe.conversion.recipe import load_recipe
from llamamoe.conversion.split import plan_conversion
from llamamoe.errors import RefusedError
from llamamoe.methods.repairs import REPAIRS
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.selectors import SELECTORS
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.models.experts import EXPERTS, PREFIX
from llamamoe.training.gates import GATES
from llamamoe.training.losses import LOSSES
from llamamoe.training.mixtures.updates import MIXTURES
from tests.dense import make_dense

REGISTRIES = {
    "splitter": SPLITTERS,
    "router": ROUTERS,
    "shared_by": SELECTORS,
    "rescale": RESCALES,
    "repair": REPAIRS,
    "target": TARGETS,
    "family": SOURCES,
    "loss": LOSSES,
    "gate": GATES,
    "update": MIXTURES,
    "experts": EXPERTS,
}


@pytest.fixture(scope="module")
def asked():
    return matrix()


def test_everything_registered_is_listed():
    listed = [(m.kind, m.name) for m in list_methods()]
    expected = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]
    assert listed == [(kind, PREFIX + name if kind == "experts" else name) for kind, name in expected]
    for method in list_methods():
        assert method.summary
        assert method.summary == method.summary.strip()
        assert len(method.summary) <= 120


def test_methods_tell_what_they_need_and_promise():
    by_name = {(m.kind, m.name): m for m in list_methods()}
    random, kmeans = by_name["splitter", "random"], by_name["splitter", "kmeans"]
    assert (random.needs, random.parity, random.options) == ("nothing", "exact", ())
    assert (kmeans.needs, kmeans.facts["default_router"]) == ("weights", "centroid")
    assert by_name["target", "mixtral"].facts["architecture"] == "MixtralForCausalLM"
    assert by_name["family", "llama"].needs == ""


def test_options_are_those_of_the_pydantic_model():
    kmeans = next(m for m in list_methods() if m.name == "kmeans")
    options = {o.name: o for o in kmeans.options}
    fields = SPLITTERS.get("kmeans").Options.model_fields
    assert list(options) == list(fields)
    assert (options["weight"].type, options["weight"].default) == ("gate | up", "gate")
    assert (options["max_iter"].type, options["max_iter"].rules) == ("int", (">= 1",))
    assert all(o.description for o in kmeans.options)
    json.dumps([m.to_json() for m in list_methods()])


def test_the_matrix_is_whole_and_quick():
    started = time.process_time()
    found = matrix()
    assert time.process_time() - started < 3
    assert {family for family, _ in found.rows} == set(SOURCES.names())
    assert found.targets == tuple(name for name in TARGETS.names() if TARGETS.get(name).routed)
    assert len(found.cells) == 2 * len(found.rows) * len(found.targets)
    for cell in found.cells:
        assert bool(cell.reasons) != cell.supported
        assert bool(cell.transformers) == cell.supported
        if cell.reasons:  # a reason that this row would share with a wrong size would be no reason
            assert "num_experts" not in " ".join(cell.reasons)
    json.dumps(found.to_json())


def test_the_matrix_knows_what_was_measured(asked):
    def cell(*args, **more):
        found = asked.cell(*args, **more)
        return found.supported and (found.transformers, found.dtype)

    both, five = (("4.57", "5"), "any"), (("5",), "any")
    assert cell("llama", "mixtral") == both
    assert cell("llama", "mixtral", shared=True) is False
    assert cell("llama", "qwen2_moe", shared=True) == both
    assert cell("llama", "qwen2_moe", variant="own head_dim") == five
    assert cell("llama", "granitemoeshared", variant="attention_bias") == both
    assert cell("llama", "qwen3_moe") is False
    assert not any(c.supported for c in asked.cells if c.variant == "mlp_bias")
    assert cell("qwen3", "qwen3_moe") == both
    assert cell("qwen3", "glm4_moe", shared=True) == both
    assert cell("phi3", "glm4_moe", variant="partial rotary") == both
    assert [t for t in asked.targets if asked.cell("granite", t).supported] == ["granitemoe_swa", "granitemoeshared"]
    windowed = [t for t in asked.targets if asked.cell("mistral", t, variant="window").supported]
    assert windowed == ["granitemoe_swa", "mixtral", "qwen2_moe"]
    assert asked.cell("gemma", "mixtral").dtype == "float32"
    reasons = asked.cell("llama", "mixtral", variant="mlp_bias").reasons
    assert "mlp_bias" in reasons[0]
    with pytest.raises(KeyError):
        asked.cell("llama", "nothing")


@pytest.mark.parametrize(("row", "variant"), [(("llama", "plain"), "llama"), (("qwen3", "plain"), "qwen3")])
def test_the_matrix_says_what_the_plan_says_of_a_real_folder(tmp_path, asked, row, variant):
    dense = make_dense(tmp_path / "dense", variant, head_dim=16)
    for target in asked.targets:
        sizes = {} if target == "jetmoe" else {"num_experts": 4}
        recipe = load_recipe(given={"method": "random", "target": target, **sizes})
        cell = asked.cell(row[0], target, variant=row[1])
        if cell.supported:
            assert plan_conversion(dense, recipe).majors == cell.transformers
        else:
            with pytest.raises(RefusedError) as refused:
                plan_conversion(dense, recipe)
            assert all(reason in str(refused.value) for reason in cell.reasons)


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys; from llamamoe.catalog import list_methods, matrix; list_methods(); matrix(); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
