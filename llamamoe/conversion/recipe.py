"""Recipes: what the user asks for, checked, complete and written next to the result.

A recipe is YAML or keyword arguments. Everything wrong with it is reported at once, with near misses.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..architectures.rescales import RESCALES
from ..architectures.targets import TARGETS
from ..checkpoint.layout import SHARD_SIZE, SHARD_SIZE_RULE
from ..checkpoint.plain_values import MOST_DIGITS, Huge, oddities
from ..data.files import check_regular
from ..errors import UsageError
from ..methods.repairs import REPAIRS
from ..methods.routers import ROUTERS
from ..methods.selectors import SELECTORS
from ..methods.splitters import SPLITTERS
from ..plugins import Plugin, Registry, near_misses

R = TypeVar("R", bound=BaseModel)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of dtypes in recipes, and in safetensors headers."""
AUTO = "auto"
"""The method that the plan chooses; the calibration text that is sampled from the parent."""
NO_REPAIR = "none"
_MOST_BYTES, _MOST_VALUES = 2**20, 100_000


class Choice(BaseModel):
    """A plug-in by name, with its options (defaults filled in)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)


def choose(registry: Registry[Any], *words: str) -> BeforeValidator:
    """Accept ``name``, ``{name: ..., option: value}`` or a `Choice`; check the options with the plug-in's model.

    Args:
        registry: Where the names are looked up.
        words: Names that stand for no plug-in and have no options.
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
            known = [*words, *registry.names()]
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
            raise PydanticCustomError("options", "; ".join(explain(error, plugin.Options))) from None
        return Choice(name=given["name"], options=complete.model_dump(mode="json"))

    return BeforeValidator(check)


def form(pattern: str, rule: str) -> AfterValidator:
    """Make pydantic refuse a text that does not match as a whole, and tell the rule instead of the pattern."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise PydanticCustomError("form", rule)
        return value

    return AfterValidator(check)


Device = Annotated[str, form(r"auto|[a-z]+(:[0-9]+)?", "must be auto or a device such as cpu, cuda or cuda:1")]


def _shared_size(value: Any) -> Any:
    """A share (0 <= x < 1), a count (0, 1, 2, ...) or a number of expert widths (``"2x"``), kept as written."""
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}x?|[0-9]*\.[0-9]+(e-?[0-9]+)?|[0-9]+e-[0-9]+", text):
        shown = repr(value) if text else f"a {type(value).__name__}"
        raise PydanticCustomError(
            "shared", f"{shown} is not a share (0.25), a count (384) or a number of expert widths ('2x')"
        )
    if text.endswith("x"):
        return text
    if "." in text or "e" in text:
        if float(text) >= 1:
            raise PydanticCustomError("shared", f"the share {text} must be below 1; a count has no decimal point")
        return float(text)
    return int(text)


def _paths(value: Any) -> Any:
    """One path or several, as a list."""
    return [value] if isinstance(value, str) else value


class SplitRecipe(BaseModel):
    """Everything that decides what ``llamamoe split`` writes. Options left at null are chosen by the plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_experts: int = Field(8, ge=2, le=4096, description="Routed experts per layer (N).")
    top_k: int = Field(2, ge=1, description="Experts selected per token (k).")
    method: Annotated[Choice, choose(SPLITTERS, AUTO)] = Field(
        Choice(name=AUTO), validate_default=True, description="How neurons are partitioned."
    )
    shared: Annotated[float | int | str | None, BeforeValidator(lambda v: None if v is None else _shared_size(v))] = (
        Field(None, description="Neurons that every token uses: a share, a count, or '2x' expert widths.")
    )
    shared_by: Annotated[Choice | None, choose(SELECTORS)] = Field(
        None, description="How the shared neurons are chosen."
    )
    router: Annotated[Choice | None, choose(ROUTERS)] = Field(None, description="How the router starts.")
    router_scale: Literal["hard", "soft"] = Field(
        "hard", description="hard: rows so small that selected experts weigh the same; soft: rows as they are."
    )
    rescale: Annotated[Choice | None, choose(RESCALES)] = Field(
        None, description="What a selected expert's output is multiplied by."
    )
    repair: Annotated[Choice | None, choose(REPAIRS)] = Field(
        None, description="How weights are fitted to the dense output on calibration text; none leaves them exact."
    )
    repair_passes: int = Field(
        1, ge=1, le=4, description="Number of repair passes; the router is refitted between passes."
    )
    calibration: Annotated[tuple[str, ...], BeforeValidator(_paths)] = Field(
        (), description="Text for methods that need it: files, folders or globs; 'auto' samples it from the source."
    )
    calibration_tokens: int = Field(65536, ge=256, le=2**40, description="Maximum number of calibration tokens.")
    calibration_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        None, min_length=1, description="Share of each domain in the calibration text; null means equal shares."
    )
    calibration_length: int | None = Field(None, ge=2, description="Tokens of one calibration sequence.")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of large products on calibration text; what is fitted and stored is not rounded to it."
    )
    device: Device = Field(
        "auto", description="Where calibration runs: auto (a GPU if there is one), cpu, cuda or cuda:1"
    )
    target: str = Field("auto", description="The transformers architecture to write.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype to store; null keeps the source's."
    )
    pad_to: int | None = Field(
        None,
        ge=8,
        le=4096,
        multiple_of=8,
        description="Expert width is padded to a multiple of this with zero neurons; null takes 32, which quantisers want, "
        "where it costs less than 3 %, else 8.",
    )
    keep_dense: tuple[int, ...] = Field((), description="Layers left dense (negative ones count from the end).")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of everything random.")
    shard_size: Annotated[str, form(SHARD_SIZE, SHARD_SIZE_RULE)] = Field(
        "5GB", description="Largest shard, for example 5GB or 500MB."
    )
    require: Literal["4.57"] | None = Field(None, description="Refuse what this older transformers cannot load.")
    strict: bool = Field(
        False, description="Refuse what would only be warned about, weights that are not finite included."
    )
    card: bool = Field(True, description="Write a model card.")

    @model_validator(mode="after")
    def _consistent(self) -> SplitRecipe:
        if self.top_k > self.num_experts:
            raise PydanticCustomError("top_k", f"top_k = {self.top_k} must not exceed num_experts = {self.num_experts}")
        if AUTO in self.calibration and len(self.calibration) > 1:
            raise PydanticCustomError("calibration", "calibration: 'auto' (sampled text) cannot be mixed with files")
        if AUTO in self.calibration and self.calibration_weights is not None:
            raise PydanticCustomError("calibration_weights", "calibration_weights: sampled text has no domains")
        if self.calibration_weights is not None and not any(self.calibration_weights.values()):
            raise PydanticCustomError("calibration_weights", "calibration_weights: all are zero")
        if self.target != "auto" and self.target not in TARGETS:
            raise PydanticCustomError(
                "target", f"unknown target {self.target!r}. " + near_misses(self.target, ["auto", *TARGETS.names()])
            )
        return self

    def sha256(self) -> str:
        """Hash of the resolved recipe: equal recipes have equal hashes."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The complete recipe as YAML that `load_recipe` reads back."""
        data = self.model_dump(mode="json")
        for key in ("method", "shared_by", "router", "rescale", "repair"):
            if data[key] is not None:
                data[key] = {"name": data[key]["name"], **data[key]["options"]}
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per error: path, rule, value, and for an unknown key the nearest known one."""
    lines = []
    for item in error.errors():
        # pydantic puts the alternatives of a union among the keys: function-before[...], tuple[constrained-int, ...]
        path = ".".join(str(part) for part in item["loc"] if not re.match(r"function-|constrained-|\w+\[", str(part)))
        if item["type"] == "extra_forbidden":
            lines.append(
                f"{path}: unknown key. {near_misses(str(item['loc'][-1]), _known_keys(model, item['loc'][:-1]))}"
            )
            continue
        scalar = isinstance(item.get("input"), str | int | float | bool) and item["type"] not in ("choice", "options")
        shown = f" (got {item['input']!r})" if scalar else ""
        lines.append(f"{path + ': ' if path else ''}{item['msg']}{shown}")
    return list(dict.fromkeys(lines))


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the part of a recipe that ``path`` leads to."""
    for part in path:
        if str(part) in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            parts = [annotation, *get_args(annotation)]
            inner = next((each for each in parts if isinstance(each, type) and issubclass(each, BaseModel)), None)
            model = inner or model
    return list(model.model_fields)


def build_recipe(data: Mapping[str, Any]) -> SplitRecipe:
    """Check a mapping and complete it with defaults.

    Raises:
        UsageError: Something is wrong; every error is named.
    """
    return validated(SplitRecipe, data)


def validated(model: type[R], data: Mapping[str, Any]) -> R:
    """A recipe of any kind from a mapping, completed with defaults.

    Raises:
        UsageError: Something is wrong; every error is named.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = explain(error, model)
        raise UsageError("the recipe is not valid:\n" + "\n".join(f"  - {line}" for line in lines)) from None


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See PyYAML."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """See PyYAML; a number of thousands of digits, which Python does not print, is left to `oddities`."""
        text = str(node.value)
        return super().construct_yaml_int(node) if len(text) <= MOST_DIGITS else Huge(len(text))


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)


def _parse(text: str) -> Any:
    """YAML without code.

    Raises:
        yaml.YAMLError: It is none, or holds values that cannot be passed on; what PyYAML's own parts raise for odd values
            and nesting included.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None
    odd = next(oddities(data, _MOST_VALUES, nul=False), None)
    if odd is not None:
        raise yaml.YAMLError(odd)
    return data


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=c`` to (["a", "b"], value); the value is read as YAML.

    Raises:
        UsageError: There is no ``=`` or no key.
    """
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise UsageError(f"--set {text!r} is not of the form key=value (for example method.max_iter=50).")
    try:
        return path, _parse(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text!r}: the value is not YAML ({error}).") from None


def apply_override(data: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a nested key in place; a plug-in given by name only becomes a mapping when an option of it is set."""
    for part in path[:-1]:
        inner = data.get(part)
        if inner is None:
            raise (
                UsageError(f"--set {'.'.join(path)}: name the {part} first (--set {part}=NAME).")
                if part in ("shared_by", "router", "rescale", "repair")
                else UsageError(f"--set {'.'.join(path)}: there is no {part!r} in the recipe.")
            )
        if not isinstance(inner, str | Mapping):
            raise UsageError(f"--set {'.'.join(path)}: {part} = {inner!r} has no keys; set {part} itself.")
        data[part] = {"name": inner} if isinstance(inner, str) else dict(inner)
        data = data[part]
    data[path[-1]] = value


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, safely.

    Raises:
        UsageError: The file is missing, is not YAML, or holds no mapping.
    """
    try:
        check_regular(Path(path))
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(f"the recipe {str(path)!r} has more than {_MOST_BYTES:,} bytes.")
        data = _parse(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"the recipe {str(path)!r} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {str(path)!r} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"the recipe {str(path)!r} must hold a mapping (key: value), not {type(data).__name__}.")
    return data


def load_plain(model: type[R], path: str | Path | None, given: Mapping[str, Any] | None, overrides: Sequence[str]) -> R:
    """A recipe of ``model`` from a file (None: its defaults), then values that are not None, then ``a.b=c`` texts.

    Raises:
        UsageError: The file or a value is not valid; every error is named.
    """
    data = {} if path is None else read_recipe_file(path)
    data |= {key: value for key, value in (given or {}).items() if value is not None}
    for text in overrides:
        keys, value = parse_override(text)
        apply_override(data, keys, value)
    return validated(model, data)


def load_recipe(
    path: str | Path | None = None, *, given: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> SplitRecipe:
    """A recipe from a file, then keyword arguments, then ``key=value`` overrides; the later wins.

    Args:
        path: A YAML file, or None for the defaults.
        given: Values of single keys; those that are None are left out.
        overrides: ``a.b=c`` texts.

    Raises:
        UsageError: The file or a value is not valid.
    """
    data: dict[str, Any] = {"method": AUTO}
    if path is not None:
        data |= read_recipe_file(path)
    for key, value in (given or {}).items():
        before = data.get(key)
        same = isinstance(before, dict) and before.get("name") == value  # a bare name keeps the file's options
        if value is not None and not same:
            data[key] = value
    for text in overrides:
        keys, value = parse_override(text)
        apply_override(data, keys, value)
    return build_recipe(data)
