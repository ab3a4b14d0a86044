"""List every method, target and family, and which families each target supports.

No list is kept here: methods come from the registries, and the matrix is the result of planning small
synthetic models of every family.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .architectures.dense_checkpoint import DenseModel, understand
from .architectures.rescales import RESCALES
from .architectures.sources import SOURCES, Source
from .architectures.sources.fields import completed
from .architectures.sources.refused import REFUSED
from .architectures.targets import TARGETS
from .architectures.targets.clients import CLIENTS
from .checkpoint.base import TensorInfo
from .conversion.plan import plan_split
from .conversion.recipe import build_recipe
from .errors import LlamaMoeError, RefusedError
from .lazy import torch
from .methods.repairs import REPAIRS
from .methods.routers import ROUTERS
from .methods.selectors import SELECTORS
from .methods.splitters import SPLITTERS
from .models.experts import EXPERTS, PREFIX
from .training.gates import GATES
from .training.losses import LOSSES
from .training.mixtures.updates import MIXTURES

Kind = Literal[
    "splitter", "router", "shared_by", "rescale", "repair", "target", "family", "loss", "gate", "update", "experts"
]


@dataclass(frozen=True)
class Option:
    """One option of a method; ``type`` and ``default`` are text, ``rules`` are limits such as ``">= 1"``."""

    name: str
    type: str
    default: Any
    description: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A plug-in, as ``llamamoe methods`` shows it.

    Attributes:
        kind: Its kind; for methods the key in the recipe.
        name: Its name in recipes and options; for targets and families the ``model_type``.
        summary: One line.
        reference: Its paper or source; may be empty.
        needs: ``"nothing"``, ``"weights"``, ``"activations"`` or ``"gradients"``; empty for targets and families.
        parity: Splitters: ``"exact"`` or ``"none"``; else empty.
        options: Its options.
        facts: Defaults of splitters, supported features of targets.
    """

    kind: Kind
    name: str
    summary: str
    reference: str
    needs: str = ""
    parity: str = ""
    options: tuple[Option, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plug-in as JSON-compatible data."""
        return asdict(self) | {"options": [asdict(option) for option in self.options]}


def list_methods() -> list[Method]:
    """List every registered plug-in, third parties' included, sorted by kind and name."""
    found = []
    for cls in SPLITTERS:
        facts = {
            "default_shared": cls.default_shared,
            "default_router": cls.default_router,
            "default_rescale": cls.default_rescale,
        }
        found.append(_method("splitter", cls, parity=cls.parity, facts=facts))
    found += _methods(("router", ROUTERS), ("shared_by", SELECTORS), ("rescale", RESCALES), ("repair", REPAIRS))
    for target in TARGETS:
        facts = {"architecture": target.architecture, "shared": target.shared, "dense_layers": target.dense_layers}
        found.append(Method("target", target.name, target.summary, target.reference, facts=facts))
    found += [Method("family", cls.name, cls.summary, cls.reference) for cls in SOURCES]
    found += _methods(("loss", LOSSES), ("gate", GATES), ("update", MIXTURES))
    found += [Method("experts", f"{PREFIX}{cls.name}", cls.summary, cls.reference) for cls in EXPERTS]
    return found


def _methods(*registries: tuple[Kind, Iterable[Any]]) -> list[Method]:
    return [_method(kind, cls) for kind, registry in registries for cls in registry]


def _method(kind: Kind, cls: Any, *, parity: str = "", facts: dict[str, Any] | None = None) -> Method:
    options = tuple(_options(cls.Options))
    return Method(kind, cls.name, cls.summary, cls.reference, cls.needs, parity, options, facts or {})


def _options(model: type[BaseModel]) -> Iterator[Option]:
    for name, info in model.model_fields.items():
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        yield Option(name, _type_name(info.annotation), default, info.description or "", tuple(_rules(info)))


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if isinstance(annotation, type):
        return annotation.__name__
    return " | ".join(_type_name(part) for part in typing.get_args(annotation)) or str(annotation)


def _rules(info: FieldInfo) -> Iterator[str]:
    for part in info.metadata:
        for sign, key in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
            if getattr(part, key, None) is not None:
                yield f"{sign} {getattr(part, key)}"


# ---- which family goes to which target ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Support of one variant of a family by one target.

    Attributes:
        family: Its dense family.
        variant: ``"plain"``, or the special feature of the model.
        target: The architecture to write.
        shared: Whether neurons are shared.
        supported: Whether the plan accepts it.
        dtype: ``"any"``, or the only dtype that is exact.
        transformers: The versions that load the result; empty if not supported.
        reasons: Reasons for a refusal.
    """

    family: str
    variant: str
    target: str
    shared: bool
    supported: bool
    dtype: str
    transformers: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """All cells; ``rows`` are (family, variant), ``targets`` the columns; ``refused`` are families that none holds, and why."""

    rows: tuple[tuple[str, str], ...]
    targets: tuple[str, ...]
    cells: tuple[Cell, ...]
    refused: Mapping[str, str] = field(default_factory=lambda: dict(REFUSED))

    def cell(self, family: str, target: str, *, variant: str = "plain", shared: bool = False) -> Cell:
        """Return the cell of a family, a target and a variant.

        Raises:
            KeyError: There is no such cell.
        """
        wanted = (family, variant, target, shared)
        for cell in self.cells:
            if (cell.family, cell.variant, cell.target, cell.shared) == wanted:
                return cell
        raise KeyError(wanted)

    def to_json(self) -> dict[str, Any]:
        """Return the matrix as JSON-compatible data."""
        return {
            "rows": [{"family": family, "variant": variant} for family, variant in self.rows],
            "targets": list(self.targets),
            "cells": [asdict(cell) for cell in self.cells],
            "refused": dict(self.refused),
            "clients": [client.to_json() for client in CLIENTS],
        }


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32, "rope_theta": 5e5}  # fmt: skip
_VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llama": {
        "llama3 rope": {"rope_parameters": _LLAMA3},
        "tied": {"tie_word_embeddings": True},
        "own head_dim": {"head_dim": 32},
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
    },
    "mistral": {"window": {"sliding_window": 8}, "own head_dim": {"head_dim": 32}},
    "qwen2": {"windows in some layers": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}},
    "qwen3": {"own head_dim": {"head_dim": 32}, "attention_bias": {"attention_bias": True}},
    "phi3": {"window": {"sliding_window": 8}, "partial rotary": {"partial_rotary_factor": 0.5}},
    "granite": {
        "plain": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078},
        "multipliers of 1": {"attention_multiplier": 0.25},
    },
    "gemma": {"own head_dim": {"head_dim": 32}},
    "ministral": {
        "plain": {"sliding_window": 8},
        "windows in some layers": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    },
    "cohere": {"use_qk_norm": {"use_qk_norm": True}, "attention_bias": {"attention_bias": True}},
    "cohere2": {
        "plain": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "attention_bias": {"sliding_window": 8, "attention_bias": True},
    },
    "hunyuan_v1_dense": {"attention_bias": {"attention_bias": True}},
    "qwen3_5_text": {
        "plain": {"layer_types": ["linear_attention", "full_attention"]},
        "attention_bias": {"layer_types": ["linear_attention", "full_attention"], "attention_bias": True},
    },
    "olmo2": {"attention_bias": {"attention_bias": True}},
    "smollm3": {
        "plain": {"no_rope_layers": [1, 0]},
        "windows in some layers": {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 8},
        "rotary positions in all layers": {"no_rope_layers": [1, 1]},
    },
    "ernie4_5": {"own head_dim": {"head_dim": 32}, "use_bias": {"use_bias": True}},
    "seed_oss": {
        "own head_dim": {"head_dim": 32},
        "no biases": {"attention_bias": False},
        "attention_out_bias": {"attention_out_bias": True},
    },
}
"""Variants of each family beside the plain model, as found in real models; Granite always has multipliers.

A new family needs no entry.
"""
_PLAIN: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": None,
    "max_position_embeddings": 64,
    "sliding_window": None,
}


def matrix() -> Matrix:
    """Plan every family, variant and target, without and with shared neurons. Takes well under 1 s."""
    rows, cells = [], []
    targets = tuple(name for name in TARGETS.names() if TARGETS.get(name).routed)
    for source in SOURCES:
        for variant, keys in {"plain": {}, **_VARIANTS.get(source.name, {})}.items():
            rows.append((source.name, variant))
            config = {**_PLAIN, **keys, "model_type": source.name}
            models = {dtype: understand(_MadeUp(source, config, dtype)) for dtype in ("BF16", "F32")}
            for target in targets:
                for shared in (False, True):
                    cells.append(_cell(source.name, variant, target, shared, models))
    return Matrix(tuple(rows), targets, tuple(cells))


def _cell(family: str, variant: str, target: str, shared: bool, models: Mapping[str, DenseModel]) -> Cell:
    # This FFN width suits experts and shared widths of every target, so that only the family decides.
    sizes = {} if TARGETS.get(target).attention_experts else {"num_experts": 4, "top_k": 2}
    recipe = build_recipe({**sizes, "target": target, "shared": "4x" if shared else 0})
    refusals = []
    for dtype, model in models.items():
        try:
            plan = plan_split(model, recipe)
        except RefusedError as error:
            refusals.append(error)
            continue
        only = "any" if dtype == "BF16" else "float32"
        return Cell(family, variant, target, shared, True, only, plan.majors, ())
    reasons = tuple(line.strip()[2:] for line in refusals[-1].message.splitlines() if line.startswith("  - "))
    return Cell(family, variant, target, shared, False, "", (), reasons or (refusals[-1].message,))


class _MadeUp:
    """A synthetic checkpoint of headers only (see `llamamoe.checkpoint.base.Checkpoint`)."""

    def __init__(self, source: type[Source], config: dict[str, Any], dtype: str) -> None:
        family = source()
        self.path = Path(source.name)
        self.config = config
        self.notes: list[str] = []
        shapes = family.raw_shapes(family.spec(completed(config, source.fields)))
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype, shape, self.path) for name, shape in shapes.items()
        }

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        raise LlamaMoeError(f"{name}: this checkpoint has no tensors.")

    def save_tokenizer(self, out: Path) -> list[str]:
        return []

    def fingerprint(self) -> str:
        return ""

    def check_unchanged(self) -> None:
        pass
