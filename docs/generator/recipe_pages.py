"""The keys of all recipes, read from their pydantic models, and the recipes that ship with the package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import llamamoe
from llamamoe.recipes import Choice

from .markdown import code, fenced, prose, table
from .places import ROOT, anchor
from .repository import shown

KINDS = {
    "split": (llamamoe.SplitRecipe, "llamamoe split"),
    "mix": (llamamoe.MixRecipe, "llamamoe mix"),
    "resplit": (llamamoe.ResplitRecipe, "llamamoe resplit"),
    "tokenize": (llamamoe.TokenizeRecipe, "llamamoe tokenize"),
    "heal": (llamamoe.HealRecipe, "llamamoe heal"),
    "pretrain": (llamamoe.PretrainRecipe, "llamamoe pretrain"),
    "compare": (llamamoe.CompareRecipe, "llamamoe compare"),
    "eval": (llamamoe.TaskRecipe, "llamamoe evaluate --tasks"),
}
"""Folder of the shipped recipes, model, command."""
PLUGINS = ("method", "shared_by", "router", "rescale", "repair", "gate", "losses", "update", "static_by")
HEAD = """# Recipes

A recipe is a YAML file that holds every decision of a run. Values come from the recipe, then from flags, then from
`--set key=value`; the later wins. `--set` reaches nested keys with dots: `--set method.max_iter=50`. Every mistake in a
recipe is reported at once, before anything is read. The complete recipe is written beside the result, and running it again
on the same source reproduces the result byte for byte.

Where a key names a plug-in (a method, a router, a loss), write its name, or its name with options:
`repair: {name: distill, epochs: 5}`. [Methods](methods.md) lists names and options, [Shipped recipes](shipped-recipes.md)
has commented files to start from.
"""


def pages() -> dict[str, str]:
    """Return both pages."""
    keys = [HEAD]
    for model, command in KINDS.values():
        keys.append(f"## {command}\n\n{prose(model.__doc__ or '')}\n")
        keys += _model(model, "")
    shipped = [shown("recipes/README.md", "reference/shipped-recipes.md").replace("# Recipes", "# Shipped recipes", 1)]
    ours = [(kind, command) for kind, (_, command) in KINDS.items()]
    for kind, command in [*ours, ("sft", "trl sft"), ("dpo", "trl dpo")]:
        shipped.append(f"## {command}\n")
        for file in sorted((ROOT / "recipes" / kind).glob("*.yaml")):
            name = f"{kind}/{file.name}"
            shipped.append(f"### {name} {{ #{anchor(name)} }}\n\n" + fenced(file.read_text(encoding="utf-8"), "yaml"))
    return {"reference/recipes.md": "\n".join(keys), "reference/shipped-recipes.md": "\n".join(shipped)}


def _model(model: type[BaseModel], prefix: str) -> Iterator[str]:
    rows, parts = [], []
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no description"
        text = prose(field.description)
        if name in PLUGINS and any(each is Choice or get_origin(each) is dict for each in _flat(field.annotation)):
            text += " See [Methods](methods.md)."
        part = _part(field)
        if part is not None:
            parts.append((f"{prefix}{name}", part))
            text += f" Keys below, under `{prefix}{name}`."
        rows.append((code(f"{prefix}{name}"), _type(field), _shown(field), text))
    yield table(("key", "type", "default", "what it decides"), rows)
    for name, part in parts:
        yield f"**`{name}`**: {prose((part.__doc__ or '').splitlines()[0])}\n"
        yield from _model(part, f"{name}.")


def _part(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a nested part; plug-ins, which have a page of their own, are none."""
    for each in _flat(field.annotation):
        if isinstance(each, type) and issubclass(each, BaseModel) and each.__name__ != "Choice":
            return each
    return None


def _flat(annotation: Any) -> Iterator[Any]:
    yield annotation
    for each in get_args(annotation):
        yield from _flat(each)


def _type(field: FieldInfo) -> str:
    """Return the type as users write it, with its limits."""
    names = dict.fromkeys(_names(field.annotation))
    limits = [f"{sign} {_number(getattr(rule, key))}" for rule in (*field.metadata, *_inner_rules(field.annotation))
              for key, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
              if getattr(rule, key, None) is not None]  # fmt: skip
    return " or ".join(names) + (f" ({', '.join(limits)})" if limits else "")


def _inner_rules(annotation: Any) -> Iterator[Any]:
    """Yield the limits of a number that may also be null, which stand with the number."""
    for each in _flat(annotation):
        for rule in getattr(each, "__metadata__", ()):
            yield from getattr(rule, "metadata", ())


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) or value < 10**6 else f"{value:,}"


def _names(annotation: Any) -> Iterator[str]:
    origin, inside = get_origin(annotation), get_args(annotation)
    if str(origin) == "typing.Literal" or getattr(origin, "_name", None) == "Literal":
        yield from (code(value) for value in inside)
    elif origin in (tuple, list):
        kinds = " or ".join(dict.fromkeys(each for one in inside if one is not ... for each in _names(one)))
        yield f"list of {kinds}"
    elif origin is dict:
        yield f"mapping of {' to '.join(next(_names(each)) for each in inside)}"
    elif annotation is type(None):
        yield "null"
    elif hasattr(annotation, "__metadata__"):
        yield from _names(inside[0] if inside else annotation.__origin__)
    elif inside:
        for each in inside:
            yield from _names(each)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "plug-in" if annotation.__name__ == "Choice" else "mapping"
    else:
        yield {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
            getattr(annotation, "__name__", ""), "any"
        )


def _shown(field: FieldInfo) -> str:
    """Return the default."""
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return code(value.name) if hasattr(value, "name") else "below"
    text = json.dumps(value, default=list)
    return code(re.sub(r'^"(.*)"$', r"\1", text))
