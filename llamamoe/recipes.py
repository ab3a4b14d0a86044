"""The basis of all recipes: YAML without code, overrides, and all errors at once, with suggestions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from .checkpoint.paths import check_regular
from .checkpoint.yaml_text import parse_yaml
from .errors import MISSING, InvalidRecipeError, UsageError, near_misses, problem_lines
from .plugins import Plugin, Registry

R = TypeVar("R", bound=BaseModel)
_MOST_BYTES = 2**20


Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""One or several paths, as a tuple."""


_COUNT = re.compile(r"(\d{1,18})(?:\.(\d{1,18}))?(?:(k|M|B|T|Ki|Mi|Gi)|[eE]\+?(\d{1,2}))?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
COUNT_RULE = "a whole number such as 65536, 64k (64,000), 1.5M (1,500,000), 64Ki (65,536) or 6.4e4 (64,000)"


def count_of(value: Any) -> Any:
    """Return the whole number that a text such as ``64k`` or ``1.5M`` means; anything else unchanged.

    The units are powers of 1000 (k, M, B, T), of 1024 (Ki, Mi, Gi) and of ten (e4). ``64K`` is not read, because it is used for both.
    """
    match = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    whole, part = match[1], match[2] or ""
    unit = _UNITS[match[3] or ""] * 10 ** int(match[4] or 0)
    number, rest = divmod(int(whole + part) * unit, 10 ** len(part))
    return value if rest else number


def _checked_count(value: Any) -> Any:
    number = count_of(value)
    if isinstance(number, str):
        raise PydanticCustomError("count", "must be {rule}", {"rule": COUNT_RULE})
    return number


Count = BeforeValidator(_checked_count)
"""Lets a whole number be written with a unit, such as ``64k``."""
Tokens = Annotated[float, BeforeValidator(count_of)]
"""A number of tokens of a training run, which may be as large as ``1.4T`` or be written as a number with a fraction."""


class Choice(BaseModel):
    """A plug-in by name, with its options (defaults filled in)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)


def plugin(registry: Registry[Any], choice: Choice | None) -> Any:
    """Return the chosen plug-in with its options."""
    assert choice is not None, "the plan names every method"
    cls = registry.get(choice.name)
    return cls(cls.Options.model_validate(choice.options))


def choose(registry: Registry[Any], *words: str, named: Callable[[], Sequence[str]] | None = None) -> BeforeValidator:
    """Accept ``name``, ``{name: ..., option: value}`` or a `Choice`; check the options with the plug-in's model.

    Args:
        registry: Registry of the names.
        words: Names that are not plug-ins and have no options.
        named: Returns the names that the error about an unknown one lists; None: all.
    """

    def check(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Choice):
            value = {"name": value.name, **value.options}
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            raise PydanticCustomError("choice", "must be a name or a mapping with a 'name'")
        if given["name"] not in registry and given["name"] not in words:
            known = [*words, *(registry.names() if named is None else named())]
            raise PydanticCustomError(
                "choice", f"unknown {registry.kind} {given['name']!r}. " + near_misses(given["name"], known)
            )
        plugin: type[Plugin] = Plugin if given["name"] in words else registry.get(given["name"])
        options: dict[str, Any] = {str(k): v for k, v in given.items() if k not in ("name", "options")}
        nested: Any = given.get("options") or {}
        if not isinstance(nested, Mapping):
            raise PydanticCustomError("choice", "'options' must be a mapping")
        options |= dict(nested)
        try:
            complete = plugin.Options.model_validate(options)
        except ValidationError as error:
            raise PydanticCustomError("options", "; ".join(problem_lines(explain(error, plugin.Options)))) from None
        return Choice(name=given["name"], options=complete.model_dump(mode="json"))

    return BeforeValidator(check)


_LIST, _MAPPING = "must be a list", "must be a mapping (key: value)"
_WORDS = {
    **dict.fromkeys(("tuple_type", "list_type", "set_type"), _LIST),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), _MAPPING),
    "missing": MISSING,
}
"""Messages that replace pydantic's, by the type of the error."""


def breaks(key: str, rule: str) -> PydanticCustomError:
    """Return the error of a validator of the whole recipe about one of its keys."""
    return PydanticCustomError("breaks", rule, {"key": key})


def explain(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """Return for every error the path of the key, and the rule and value, or for an unknown key the nearest known one."""
    found = []
    for item in error.errors():
        # pydantic puts the alternatives of a union among the keys: function-before[...], tuple[constrained-int, ...]
        path = ".".join(str(part) for part in item["loc"] if not re.match(r"function-|constrained-|\w+\[", str(part)))
        if item["type"] == "extra_forbidden":
            near = near_misses(str(item["loc"][-1]), _known_keys(model, item["loc"][:-1]))
            found.append((path, f"unknown key. {near}"))
            continue
        if item["type"] == "breaks":
            path = ".".join(part for part in (path, item["ctx"]["key"]) if part)
        scalar = isinstance(item.get("input"), str | int | float | bool) and item["type"] not in ("choice", "options")
        shown = f" (got {item['input']!r})" if scalar else ""
        rule = re.sub(r"^[A-Z][a-z]+ should ", "must ", item["msg"]).replace(" after validation", "")
        found.append((path, f"{_WORDS.get(item['type'], rule)}{shown}"))
    return list(dict.fromkeys(found))


def _part_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a part of a recipe, or None if a field holds plain values."""
    parts = [field.annotation, *get_args(field.annotation)]
    return next((each for each in parts if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the part of a recipe at ``path``."""
    for part in path:
        if str(part) in model.model_fields:
            model = _part_of(model.model_fields[str(part)]) or model
    return list(model.model_fields)


def validated(model: type[R], data: Mapping[str, Any]) -> R:
    """Return a recipe of any kind from a mapping, completed with defaults.

    Raises:
        InvalidRecipeError: The recipe is invalid; the message names every error.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise InvalidRecipeError(explain(error, model)) from None


class Recipe(BaseModel):
    """The base of all recipes, which can be loaded, hashed and written as YAML. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(
        cls, path: str | Path | None = None, *, given: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
    ) -> Self:
        """Read a recipe from a file, then keyword arguments, then ``key=value`` overrides; later ones take precedence.

        Args:
            path: A YAML file, or None for the defaults.
            given: Values of single keys; those that are None are left out. If a plug-in is given by the name that the
                file has, the file's options are kept.
            overrides: Texts ``a.b=c``; parts that the file omits start from their defaults.

        Raises:
            UsageError: The file or a value is invalid; the message names every error.
        """
        data = {} if path is None else read_recipe_file(path)
        for key, value in (given or {}).items():
            before = data.get(key)
            named = isinstance(before, dict) and before.get("name") == value
            if value is not None and not named:
                data[key] = value
        for text in overrides:
            keys, value = parse_override(text)
            _apply_override(cls, data, keys, value)
        return validated(cls, data)

    def deciding(self) -> dict[str, Any]:
        """Return the keys that decide the result, as JSON-compatible data."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Hash what decides the result: equal recipes have equal hashes."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the complete recipe as YAML that `load` reads back."""
        return yaml.safe_dump(_as_written(self.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _as_written(value: Any) -> Any:
    """Return plug-ins as users write them: options beside the name."""
    if isinstance(value, dict):
        if set(value) == {"name", "options"} and isinstance(value["options"], dict):
            return {"name": value["name"], **value["options"]}
        return {key: _as_written(each) for key, each in value.items()}
    return [_as_written(each) for each in value] if isinstance(value, list | tuple) else value


def parse_override(text: str) -> tuple[list[str], Any]:
    """Return ``(["a", "b"], value)`` for ``a.b=c``, with the value read as YAML.

    Raises:
        UsageError: The text has no ``=`` or no key.
    """
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise UsageError(f"--set {text!r} is not of the form key=value (for example method.max_iter=50).")
    try:
        return path, parse_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text!r}: the value is not YAML ({error}).") from None


def _apply_override(model: type[BaseModel], data: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a nested key in place; a plug-in given by name only becomes a mapping when an option of it is set."""
    within: type[BaseModel] | None = model
    for part in path[:-1]:
        inner = data.get(part)
        if inner is None:
            inner = _beginning(within, part, path)
        if not isinstance(inner, str | Mapping):
            raise UsageError(f"--set {'.'.join(path)}: {part} = {inner!r} has no keys; set {part} itself.")
        data[part] = {"name": inner} if isinstance(inner, str) else dict(inner)
        data = data[part]
        within = _part_of(within.model_fields[part]) if within and part in within.model_fields else None
    data[path[-1]] = value


def _beginning(model: type[BaseModel] | None, part: str, path: Sequence[str]) -> Any:
    """Return the start of a part that the recipe omits: its default plug-in's name, or an empty mapping."""
    if model is None:  # plain values, such as keys that are passed through
        return {}
    field = model.model_fields.get(part)
    if field is None:
        raise UsageError(f"--set {'.'.join(path)}: there is no {part!r} in the recipe.")
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, Choice):
        return default.name
    if _part_of(field) is Choice:
        raise UsageError(f"--set {'.'.join(path)}: name the {part} first (--set {part}=NAME).")
    return {}


def read_recipe_file(path: str | Path, kind: str = "recipe") -> dict[str, Any]:
    """Read a YAML mapping, safely; messages call the file ``kind``.

    Raises:
        UsageError: The file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        check_regular(Path(path))
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(f"the {kind} {str(path)!r} has more than {_MOST_BYTES:,} bytes.")
        data = parse_yaml(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"the {kind} {str(path)!r} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"the {kind} {str(path)!r} is not YAML: {error}") from None
    if not isinstance(data, dict):
        held = "nothing" if data is None else type(data).__name__
        raise UsageError(f"the {kind} {str(path)!r} must hold a mapping (key: value), not {held}.")
    return data


def form(pattern: str, rule: str) -> AfterValidator:
    """Make pydantic refuse a text that does not match completely, and report the rule instead of the pattern."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise PydanticCustomError("form", rule)
        return value

    return AfterValidator(check)
