"""The pages of the Python API: every public name, rendered from its docstring by mkdocstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

from pydantic import BaseModel

from .places import ROOT

GROUPS = {
    "convert": ("Convert", "Split a dense checkpoint, plan, verify, and see what is inside one.",
                ("conversion", "architectures", "catalog")),
    "train": ("Train", "Text to tokens, layers healed one by one, and training from end to end.",
              ("healing", "training", "data", "models")),
    "measure": ("Measure", "Perplexity, tasks, speed, reports and studies.", ("evaluation", "reporting", "studies")),
    "transform": ("Transform", "From one checkpoint to another, and to the Hub.", ("transforms", "checkpoint")),
    "other": ("Errors and other names", "What can go wrong, as exceptions that name the way out.", ("errors", "_version")),
}  # fmt: skip
"""Page: title, what it is about, and the modules whose public names it shows."""
EXTENSION = {
    "Methods": ("llamamoe.plugins.Plugin", "llamamoe.plugins.PluginOptions", "llamamoe.methods.splitters.base.Splitter",
                "llamamoe.methods.routers.base.Router", "llamamoe.methods.selectors.base.Selector",
                "llamamoe.methods.repairs.base.Repair", "llamamoe.architectures.rescales.Rescale"),
    "What methods are given and return": ("llamamoe.methods.layer.FfnWeights", "llamamoe.methods.layer.LayerContext",
                                          "llamamoe.methods.layer.LayerInputs", "llamamoe.methods.layer.Partition"),
    "Architectures": ("llamamoe.architectures.sources.base.Source", "llamamoe.architectures.targets.base.Target"),
    "Training": ("llamamoe.training.losses.base.RoutingLoss", "llamamoe.training.gates.base.Gate",
                 "llamamoe.training.mixtures.updates.base.MixtureUpdate",
                 "llamamoe.models.experts.base.ExpertsImplementation"),
    "Budgets": ("llamamoe.studies.budget.sensitivities.base.Sensitivity",),
    "Progress": ("llamamoe.progress.Progress",),
}  # fmt: skip
"""Base classes for plug-ins in other packages."""


def pages() -> dict[str, str]:
    """Return the pages.

    Raises:
        ValueError: A public name, or a public part of one, has no docstring, or a name has no page.
    """
    names, texts = public_names(), {}
    placed = [name for *_, modules in GROUPS.values() for name, module in names.items() if _top(module) in modules]
    if set(placed) != set(names):
        raise ValueError(f"public names without a page: {sorted(set(names) - set(placed))}")
    undocumented = [each for name, module in names.items() for each in missing(module, name)]
    undocumented += [each for paths in EXTENSION.values() for path in paths for each in missing(*path.rsplit(".", 1))]
    if undocumented:
        raise ValueError(f"public names without a docstring: {', '.join(undocumented)}")
    for page, (title, about, modules) in GROUPS.items():
        parts = [f"# {title}\n\n{about} All names here are imported from `llamamoe`.\n"]
        parts += [_entry(module, name) for name, module in names.items() if _top(module) in modules]
        texts[f"reference/api/{page}.md"] = "\n".join(parts)
    parts = [
        "# Extension points\n\nBase classes of plug-ins; [Write a splitter](../../how-to/splitter.md) shows a whole one.\n"
    ]
    for title, paths in EXTENSION.items():
        parts += [f"## {title}\n", *(_shown(path, path.rsplit(".", 1)[1], 3) for path in paths)]
    return texts | {"reference/api/extend.md": "\n".join(parts)}


def public_names() -> dict[str, str]:
    """Return the public names and the modules that define them, as ``llamamoe/__init__.pyi`` has them."""
    tree = ast.parse((ROOT / "llamamoe" / "__init__.pyi").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name: f"llamamoe.{node.module}" for node in found for alias in node.names}
    return {name: module for name, module in names.items() if name != "__version__"}


def missing(module: str, name: str) -> list[str]:
    """Return the name and its public methods and properties, as far as they have no docstring."""
    value = getattr(importlib.import_module(module), name)
    found = [] if _documented(module, name, value) else [f"{module}.{name}"]
    if inspect.isclass(value):
        for member, each in vars(value).items():
            called = isinstance(each, property | classmethod | staticmethod) or inspect.isfunction(each)
            if called and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                found.append(f"{module}.{name}.{member}")
    return found


def _documented(module: str, name: str, value: Any) -> bool:
    return bool(inspect.getdoc(value)) if inspect.isclass(value) or inspect.isroutine(value) else True


def _top(module: str) -> str:
    return module.split(".")[1]


def _entry(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    if inspect.ismethod(value):  # load_recipe = SplitRecipe.load: an attribute, whose docstring is that of the method
        recipe = value.__self__.__name__
        return (f"## llamamoe.{name} {{ #{module}.{name} }}\n\n`{name}(path=None, *, given=None, overrides=())` returns a "
                f"`{recipe}`: {inspect.getdoc(value)}\n".replace("Args:", "\n**Parameters**\n").replace("Raises:", "\n**Raises**\n"))  # fmt: skip
    members = not (inspect.isclass(value) and issubclass(value, BaseModel))
    note = "" if members else "\nIts keys: [Recipes](../recipes.md).\n"
    return _shown(f"{module}.{name}", f"llamamoe.{name}", 2, members=members) + note


def _shown(path: str, heading: str, level: int, *, members: bool = True) -> str:
    options = f"      heading: {heading}\n      heading_level: {level}\n      members: {'null' if members else '[]'}\n"
    return f"::: {path}\n    options:\n{options}"
