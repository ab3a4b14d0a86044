"""Store finished cells, one small file each, with their dependencies."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.files import make_folder, write_text
from ..conversion.plan import SplitPlan
from ..errors import LlamaMoeError
from ..lazy import np
from .cells import Cell

FOLDER = "cells"
_SEAL = "sha256"
"""Key of a file that holds the hash of the rest of it."""
_PACKAGE = __name__.split(".")[0]
_METHODS = ("methods", "calibration", "architectures.rescales", "checkpoint.tensors", "conversion.assembly",
            "conversion.layer", "numerics")  # fmt: skip
"""Packages and modules that determine a conversion: imports of them are followed."""
_ALIGNED = ("alignment.align", "alignment", "conversion.aligning")
"""The same for layers that are learned together."""
_BY_LAYER = ("studies.by_layer", "studies.budget")
"""The same for a k of each layer."""
_ALWAYS = ("conversion.layer", "methods.moe_layer", "methods.layer", "evaluation.perplexity", "evaluation.scoring",
           "models.loading", "models.streaming", "data.encoding", "studies.in_memory", "studies.measure")  # fmt: skip
"""Modules that affect every cell."""
_OF_TEXT = frozenset(
    {"calibration_tokens", "calibration_weights", "calibration_length", "compute_dtype", "repair_passes"}
)
"""Keys that matter only if calibration text is read."""
_NOT_NUMBERS = frozenset({"card", "shard_size", "strict", "device", "calibration", "require", "prefer"})
"""Keys of a split's recipe that do not affect results; the text counts by its tokens."""


@dataclass(frozen=True)
class Dependencies:
    """The dependencies of a cell's result; the key is a hash of all of them.

    Attributes:
        cell: Method, sizes, seed and options.
        study: Settings of the measurement.
        code: Hash of the sources of its methods.
        source: Fingerprint of the dense checkpoint.
        calibration: Hash of the calibration tokens; None for a cell without calibration.
        evaluation: Hash of the evaluation tokens; None if not known yet.
    """

    cell: Mapping[str, Any]
    study: Mapping[str, Any]
    code: str
    source: str
    calibration: str | None = None
    evaluation: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the dependencies as JSON-compatible data."""
        return {
            "llamamoe": __version__,
            "cell": dict(self.cell),
            "study": dict(self.study),
            "code": self.code,
            "source": self.source,
            "calibration": self.calibration,
            "evaluation": self.evaluation,
        }

    def key(self) -> str:
        """Return the SHA-256 of all dependencies."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def matches_but_text(self, stored: Mapping[str, Any]) -> bool:
        """Return whether stored dependencies equal these, except for the text."""
        texts = {"calibration": None, "evaluation": None}
        mine = json.loads(json.dumps(self.to_json() | texts))
        return bool({**stored, **texts} == mine)


def cell_facts(cell: Cell) -> dict[str, Any]:
    """Return the facts that distinguish a cell from others, as JSON-compatible data."""
    if cell.plan is None:
        return {"dense": True}
    by_layer = {"by_layer": cell.by_layer} if cell.by_layer else {}
    return {"oracle": cell.oracle, **by_layer, "recipe": recipe_facts(cell.plan)}


def recipe_facts(plan: SplitPlan) -> dict[str, Any]:
    """Return the keys of a plan's recipe that affect results, as JSON-compatible data."""
    left_out = _NOT_NUMBERS if plan.calibration else _NOT_NUMBERS | _OF_TEXT
    return {k: v for k, v in plan.recipe.model_dump(mode="json").items() if k not in left_out}


class CellStore:
    """The folder of finished cells.

    Args:
        out: The study's folder.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER

    def path(self, cell: Cell, key: str) -> Path:
        """Return the path of a cell's result."""
        return self.folder / f"{_file_name(cell)}.{key[:12]}.json"

    def load(self, cell: Cell, key: str) -> dict[str, Any] | None:
        """Return the result of a cell, or None if there is none with this key."""
        found = read_result(self.path(cell, key))
        return found if found is not None and found.get("key") == key else None

    def save(self, cell: Cell, key: str, depends: Dependencies, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result, whole or not at all; return it as it will be read."""
        return write_result(self.path(cell, key), {"key": key, "depends": depends.to_json(), **result})

    def finished_but_text(self, cell: Cell, depends: Dependencies) -> dict[str, Any] | None:
        """Return a result whose dependencies agree except for the text (for a plan, which reads no text)."""
        for path in sorted(self.folder.glob(f"{_file_name(cell)}.*.json")):
            found = read_result(path)
            if found is not None and depends.matches_but_text(found.get("depends", {})):
                return found
        return None


def write_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all, its folder too.

    Raises:
        LlamaMoeError: The file cannot be written.
    """
    try:
        make_folder(path.parent)
        write_text(path, text)
    except OSError as error:
        raise LlamaMoeError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Finished cells are kept: the same command continues.",
        ) from error


def _file_name(cell: Cell) -> str:
    return re.sub(r"[^\w+.-]+", "_", cell.label)


def write_result(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write an object with its hash, whole or not at all; return it as `read_result` will.

    Raises:
        LlamaMoeError: The file cannot be written.
    """
    plain: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    write_file(path, json.dumps({**plain, _SEAL: _hash(plain)}, indent=1) + "\n")
    return plain


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the object in a small file; None if it is missing, broken or changed, so that it is computed again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    seal = data.pop(_SEAL, None)  # older files have no hash
    return data if seal in (None, _hash(data)) else None


def _hash(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def code_version(plugins: Iterable[type], *, aligned: bool = False, by_layer: bool = False) -> str:
    """Return a hash of the sources of these plug-ins, the method modules they import, and modules of every cell.

    Comments, docstrings and formatting are ignored. Adding a method does not change the hash of others.

    Args:
        plugins: Classes of the plug-ins.
        aligned: Whether to include alignment.
        by_layer: Whether to include the choice of a k for each layer.
    """
    more = _ALIGNED * aligned + _BY_LAYER * by_layer
    modules = {f"{_PACKAGE}.{name}" for name in _ALWAYS + more}
    modules |= {plugin.__module__ for plugin in plugins}
    within = _METHODS + more
    digests = sorted((name, digest) for name, digest in _closure(frozenset(modules), within).items())
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _closure(modules: frozenset[str], within: tuple[str, ...] = _METHODS) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = set(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            digest, imported = _source(name)
            found[name] = digest
            waiting |= {each for each in imported if _within(each, within)}
    return found


def _within(module: str, within: tuple[str, ...]) -> bool:
    """Return whether a module is one of those that determine a conversion, or inside one."""
    return any(f"{module}.".startswith(f"{_PACKAGE}.{name}.") for name in within)


@functools.lru_cache(maxsize=256)
def _source(name: str) -> tuple[str, tuple[str, ...]]:
    """Return a hash of a module's syntax tree without docstrings, and the package's modules that it imports."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return name, ()
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    imported = []
    package = name if spec.submodule_search_locations else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            imported.append(f"{base}.{node.module}" if node.module else base)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    modules = tuple(each for each in imported if each.startswith(_PACKAGE) and importlib.util.find_spec(each))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), modules


def sha256_of(*arrays: Any) -> str:
    """Return a hash of numpy arrays: shapes, types and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
