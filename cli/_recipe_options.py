"""Options that are keys of a recipe: their help and defaults are read from the recipe's own model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import click

from llamamoe.errors import MISSING, InvalidRecipeError, UsageError, near_misses

from ._style import COUNT, Name, Option

if TYPE_CHECKING:
    from llamamoe.recipes import Recipe


def _registry(package: str, variable: str) -> Callable[[], list[str]]:
    def names() -> list[str]:
        from importlib import import_module

        found: list[str] = getattr(import_module(f"llamamoe.{package}"), variable).names()
        return found

    return names


def _literals(field: str) -> Callable[[], list[str]]:
    def names() -> list[str]:
        from llamamoe.conversion.recipe import SplitRecipe

        def flat(annotation: Any) -> list[str]:
            return [v for a in get_args(annotation) for v in ([a] if isinstance(a, str) else flat(a))]

        return flat(SplitRecipe.model_fields[field].annotation)

    return names


def _targets() -> list[str]:
    return ["auto", *_registry("architectures.targets", "TARGETS")()]


def _splitters() -> list[str]:
    return ["auto", *_registry("methods.splitters", "SPLITTERS")()]


class Row(NamedTuple):
    """An option of the recipe: its flag and field, and what the recipe itself does not know.

    Attributes:
        names: What there is to choose from, if it is a choice.
        unset: What decides if neither flag nor recipe does.
        text: In the place of the recipe's description and of the names.
        multiple: Whether it may be repeated.
    """

    flag: str
    field: str
    group: str
    metavar: str
    type: Any = str
    names: Callable[[], list[str]] | None = None
    unset: str = ""
    text: str = ""
    multiple: bool = False

    def help(self, recipe: type[Recipe]) -> str:
        """The recipe's description, the names to choose from, the default and where it comes from."""
        info = recipe.model_fields[self.field]
        about = self.text or (info.description or "").rstrip(".")
        if self.names is not None and not self.text:
            about += f": {', '.join(self.names())}"
        default = getattr(info.default, "name", info.default)
        shown = self.unset or ("" if info.is_required() else str(default))
        return f"{about}." + (f"  [default: {shown}]" if shown else "")


class _Layers(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.2
    """``0,1,-1`` and ranges ``0-2``, as a list of numbers."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse it, or say what is wrong."""
        layers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", part)
            if match is None:
                self.fail(f"{part!r} is not a layer (3), layer from the end (-1) or range (0-2).", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"the range {part.strip()!r} ends before it begins.", param, ctx)
            if last - first > 100_000:
                self.fail(f"the range {part.strip()!r} is too long.", param, ctx)
            layers += range(first, last + 1)
        return layers


class _Weights(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.2
    """``arxiv=1,book=2``, as a mapping."""

    name = "weights"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        """Parse it, or say what is wrong."""
        weights: dict[str, float] = {}
        for part in str(value).split(","):
            domain, equals, number = (text.strip() for text in part.rpartition("="))
            try:
                weights[domain] = float(number)
            except ValueError:
                equals = ""
            if not (domain and equals):
                self.fail(f"{part.strip()!r} is not a domain and weight (arxiv=1).", param, ctx)
        return weights


SIZES, METHODS, CALIBRATION, WRITING = "Experts", "Methods", "Calibration", "Output"
SPLIT_ROWS = (
    Row("--experts", "num_experts", SIZES, "N", int, unset="8; with calibration text as --prefer balanced"),
    Row("--top-k", "top_k", SIZES, "K", int, unset="2; with calibration text as --prefer balanced"),
    Row("--active", "active", SIZES, "SHARE", float, unset="what --top-k selects; about half with calibration text",
         text="Share of the FFN's neurons that a token uses, such as 0.7, from which --top-k follows"),
    Row("--shared", "shared", SIZES, "0.25|384|2x", unset="by --prefer with text, else the method's"),
    Row("--pad-to", "pad_to", SIZES, "W", int, unset="32 where it costs less than 3 %, else 8",
         text="Pad experts with zero neurons to a multiple of this width; many quantisation formats need 32"),
    Row("--prefer", "prefer", SIZES, "NAME", names=_literals("prefer"), unset="with calibration text balanced",
         text="Choose the sizes that are not given for quality, balanced or speed, from measurements (speeds are shown by --dry-run)"),
    Row("--keep-dense", "keep_dense", SIZES, "LAYERS", _Layers(), unset="none",
         text="Layers to leave dense, for example 0,1,-1 or 0-2"),
    Row("--method", "method", METHODS, "NAME", names=_splitters),
    Row("--shared-by", "shared_by", METHODS, "NAME", names=_registry("methods.selectors", "SELECTORS"), unset="the method's"),
    Row("--router", "router", METHODS, "NAME", names=_registry("methods.routers", "ROUTERS"), unset="the method's"),
    Row("--router-scale", "router_scale", METHODS, "NAME", names=_literals("router_scale"),
         text="hard: scale the router down so that selected experts get equal weights; soft: keep its scale"),
    Row("--rescale", "rescale", METHODS, "NAME", names=_registry("architectures.rescales", "RESCALES"), unset="the method's"),
    Row("--repair", "repair", METHODS, "NAME", names=_registry("methods.repairs", "REPAIRS"), unset="the method's"),
    Row("--repair-passes", "repair_passes", METHODS, "N", int),
    Row("--seed", "seed", METHODS, "N", int),
    Row("--calibration", "calibration", CALIBRATION, "PATH|auto", unset="none", multiple=True,
         text="Calibration text: a file (txt, jsonl, parquet; also .gz, .zst), folder or glob; may be repeated. auto: text sampled from "
         "SOURCE itself"),
    Row("--calibration-tokens", "calibration_tokens", CALIBRATION, "N", COUNT),
    Row("--calibration-weights", "calibration_weights", CALIBRATION, "A=1,B=2", _Weights(), unset="equal",
         text="Weight of each domain in the calibration text, for example arxiv=1,book=2"),
    Row("--calibration-length", "calibration_length", CALIBRATION, "N", COUNT,
         unset="the model's context length, at most 512"),
    Row("--device", "device", CALIBRATION, "auto|cpu|cuda"),
    Row("--compute-dtype", "compute_dtype", CALIBRATION, "NAME", names=_literals("compute_dtype"),
         unset="bfloat16 for a 16-bit source where it is much faster, else float32",
         text="Dtype of large matrix products during calibration: float32 or bfloat16"),
    Row("--target", "target", WRITING, "NAME", names=_targets),
    Row("--dtype", "dtype", WRITING, "NAME", names=_literals("dtype"), unset="the source's",
         text="Dtype of the stored weights: float32, bfloat16 or float16"),
    Row("--shard-size", "shard_size", WRITING, "SIZE"),
    Row("--require", "require", WRITING, "4.57|megatron|automodel", names=_literals("require"), unset="none",
         text="Refuse conversions that this program does not compute exactly: transformers 4.57, Megatron-Bridge or "
         "NeMo AutoModel"),
)  # fmt: skip


def row_of(field: str, **changes: Any) -> Row:
    """The row of `SPLIT_ROWS` for a key that another recipe has, too, with other values of its attributes."""
    return next(row for row in SPLIT_ROWS if row.field == field)._replace(**changes)


def recipe_options(
    rows: Sequence[Row], recipe: Callable[[], type[Recipe]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some rows; each arrives under the name of its field, None if not given.

    Args:
        rows: The rows, in the order of the help.
        recipe: Returns the recipe's model, when the help is asked for.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for row in reversed(rows):
            function = click.option(
                row.flag,
                row.field,
                cls=Option,
                group=row.group,
                metavar=row.metavar,
                type=row.type if row.names is None else Name(row.names),
                explain=lambda row=row: row.help(recipe()),
                multiple=row.multiple,
                callback=_given if row.multiple else None,
            )(function)
        return function

    return add


def _split_recipe() -> type[Recipe]:
    from llamamoe.conversion.recipe import SplitRecipe

    return SplitRecipe


split_options = recipe_options(SPLIT_ROWS, _split_recipe)
"""Gives a command the options of `SPLIT_ROWS`."""


def _given(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    """Return the values as a list, or None if the option was not given."""
    return list(value) or None


@contextmanager
def recipe_file(text: str | None, kind: str = "split") -> Iterator[Path | None]:
    """The file that ``--recipe`` means; errors about required keys name the options that set them.

    Args:
        text: What the user typed: a path, or the name of a recipe that ships with llamamoe.
        kind: The folder of shipped recipes.

    Raises:
        UsageError: It is neither, or the recipe is not valid.
    """
    with _found(text, kind) as path:
        try:
            yield path
        except InvalidRecipeError as error:
            raise _name_options(error) from None


def _name_options(error: InvalidRecipeError) -> InvalidRecipeError:
    """The same error with a hint on the options of this command that set the keys that are missing."""
    missing = [key for key, rule in error.problems if rule == MISSING]
    options = [param for param in click.get_current_context().command.params if param.name in missing]
    if not options:
        return error
    given = " and ".join(f"{option.opts[0]} {option.metavar or 'VALUE'}" for option in options)
    return InvalidRecipeError(error.problems, hint=f"Give it with {given}, or in the recipe.")


class RecipeName(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.2
    """The value of a ``--recipe`` that must be given; if it is not, the error names the recipes that ship with llamamoe."""

    name = "text"

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        """Name what can be given."""
        return f"Give a YAML file, or a recipe that ships with llamamoe: {', '.join(_shipped(self._kind))}."


def _shipped(kind: str) -> list[str]:
    from importlib.resources import files

    folder = files("llamamoe_recipes") / kind
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def _found(text: str | None, kind: str) -> AbstractContextManager[Path | None]:
    """Return the file of a recipe, unpacked while the context lasts if it ships with llamamoe."""
    if text is None:
        return nullcontext(None)
    path = Path(text).expanduser()
    if path.exists() or "/" in text or path.suffix in (".yaml", ".yml"):
        return nullcontext(path)
    from importlib.resources import as_file, files

    shipped = _shipped(kind)
    if text not in shipped:
        others = (each.name for each in files("llamamoe_recipes").iterdir() if (each / f"{text}.yaml").is_file())
        if other := next(others, None):
            raise UsageError(
                f"--recipe {text!r} is a recipe of llamamoe {other}, not of {kind}.",
                hint=f"Recipes of {kind}: {', '.join(shipped)}.",
            )
        raise UsageError(
            f"--recipe {text!r} is neither a file nor a recipe that ships with llamamoe.",
            hint=near_misses(text, shipped) if shipped else "Give a YAML file.",
        )
    return as_file(files("llamamoe_recipes") / kind / f"{text}.yaml")
