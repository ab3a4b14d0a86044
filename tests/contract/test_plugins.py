"""Every plug-in of every kind: what it says of itself, its options, and that it needs no pickle."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import llamamoe
from llamamoe.architectures.rescales import RESCALES
from llamamoe.methods.repairs import REPAIRS
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.selectors import SELECTORS
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.plugins import Plugin, PluginOptions, Registry
from llamamoe.recipes import plugin
from llamamoe.studies.budget.sensitivities import SENSITIVITIES
from llamamoe.training.gates import GATES
from llamamoe.training.losses import LOSSES
from llamamoe.training.mixtures.updates import MIXTURES
from llamamoe.training.recipe import PretrainRecipe, load_pretrain_recipe

from .world import variants

KINDS: dict[str, Registry[Any]] = {
    "method": SPLITTERS, "shared_by": SELECTORS, "router": ROUTERS, "rescale": RESCALES, "repair": REPAIRS,
    "losses": LOSSES, "gate": GATES, "data.update": MIXTURES, "measure": SENSITIVITIES,
}  # fmt: skip
"""Registries, by the key of the recipe that names their plug-ins; a measure is an argument of `llamamoe.budget`."""
ALL = [(key, name) for key, registry in KINDS.items() for name in registry.names()]
CASES = [(key, name, options) for key, name in ALL for options in variants(KINDS[key].get(name))]
IN_RECIPES = [case for case in CASES if case[0] != "measure"]
OWN = re.compile(r"\b([Oo]riginal to this project|[Ff]olklore|[Cc]ontrol)\b")
"""The words in a docstring for a rule without a paper or source."""
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_no_kind_is_left_out() -> None:
    found = set()
    for module in pkgutil.walk_packages(llamamoe.__path__, "llamamoe."):
        for each in vars(importlib.import_module(module.name)).values():
            if isinstance(each, Registry) and issubclass(each.base, Plugin):
                found.add(each.package)
    assert found == {registry.package for registry in KINDS.values()}


# ---- what it says of itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), ALL)
def test_name_summary_and_reference(key: str, name: str) -> None:
    """The name is the file's where a file holds one plug-in; a rule without a reference says that it is original, folklore or a control."""
    cls = KINDS[key].get(name)
    same_file = Counter(each.__module__ for each in KINDS[key])
    assert cls.name == name
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert same_file[cls.__module__] > 1 or cls.__module__.rpartition(".")[2] == name
    assert 10 <= len(cls.summary) <= 120
    assert not cls.summary.endswith(".")
    assert "\n" not in cls.summary
    assert cls.summary not in [other.summary for other in KINDS[key] if other is not cls]
    assert cls.needs in ("nothing", "weights", "activations", "gradients")
    doc = vars(cls).get("__doc__") or ""
    assert len(doc) > 20
    assert cls.reference or OWN.search(doc), (
        "name the paper or source, or say in the docstring that it is original to this project"
    )


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name", "options"), CASES)
def test_options_survive_json(key: str, name: str, options: dict[str, Any]) -> None:
    model = KINDS[key].get(name).Options
    assert issubclass(model, PluginOptions)
    whole = model(**options)
    plain = whole.model_dump(mode="json")
    assert model.model_validate(json.loads(json.dumps(plain))) == whole
    assert plain == json.loads(json.dumps(plain))


@pytest.mark.parametrize(("key", "name"), ALL)
def test_options_are_described_and_never_change(key: str, name: str) -> None:
    model = KINDS[key].get(name).Options
    assert all(field.description and not field.is_required() for field in model.model_fields.values())
    for field in model.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model(), field, 1)


@pytest.mark.parametrize(("key", "name"), ALL)
def test_an_unknown_option_is_refused_by_name(key: str, name: str) -> None:
    with pytest.raises(ValidationError, match="no_such_option"):
        KINDS[key].get(name).Options(no_such_option=1)
    if key == "measure":
        return
    with pytest.raises(llamamoe.UsageError, match="no_such_option"):
        recipe_with(key, {"name": name, "no_such_option": 1})


def recipe_with(key: str, choice: Any, path: Path | None = None) -> Any:
    """A recipe in which this choice stands under the key; by way of a file if there is a path."""
    if key in ("method", "shared_by", "router", "rescale", "repair"):
        recipe = llamamoe.load_recipe(given={"method": "random", key: choice})
    else:
        data: dict[str, Any] = {"train": "tokens"} | ({"update": choice} if key == "data.update" else {})
        if key == "data.update":
            data["reference_losses"] = {"a": 1.0}
        given = {"model": "m", "parent": "p", "steps": 10, "evaluate_every": 5, "data": data}
        recipe = load_pretrain_recipe(given=given | ({} if key == "data.update" else {key: [choice] if key == "losses" else choice}))  # fmt: skip
    if path is None:
        return recipe
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return load_pretrain_recipe(path) if isinstance(recipe, PretrainRecipe) else llamamoe.load_recipe(path)


@pytest.mark.parametrize(("key", "name", "options"), IN_RECIPES)
def test_a_recipe_resolves_to_the_plug_in_and_its_options(
    key: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """By name and options, read back from the YAML that it is written as."""
    cls = KINDS[key].get(name)
    for given in ({"name": name, **options}, *([] if options else [name])):
        once, again = recipe_with(key, given), recipe_with(key, given, tmp_path / "recipe.yaml")
        assert once == again
        choice = again
        for part in key.split("."):
            choice = getattr(choice, part)
        found = plugin(KINDS[key], choice[0] if key == "losses" else choice)
        assert type(found) is cls
        assert found.options == cls.Options(**options)


# ---- no pickle ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), ALL)
def test_its_module_neither_pickles_nor_unpickles(key: str, name: str) -> None:
    """Nor does any class that it derives from: no such module, and neither `torch.load`, `torch.save` nor `np.load`."""
    for cls in KINDS[key].get(name).__mro__:
        if not cls.__module__.startswith("llamamoe"):
            continue
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(cls)))):  # type: ignore[arg-type]
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {each.partition(".")[0] for each in names} & PICKLES
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "np.load", "np.save", "eval", "exec")
