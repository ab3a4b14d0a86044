"""Map tensors to the names in transformers' own files, whoever saved the folder.

Four other naming schemes are read as transformers reads them: files that the model without its head saved (no
``model.``), a tied table that `safetensors.torch.save_model` stored under the head's name, and experts under the
names that transformers 5 uses in memory (``save_original_format=False``, mergekit): one tensor for all experts, which
is taken apart without copying. Names that transformers would not recognise are refused with a hint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError
from .base import TensorInfo

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WITHOUT_HEAD = re.compile(r"(layers\.\d+\.|embed_tokens\.|norm\.weight$)")
_MOST_EXPERTS = 1 << 16  # a header that claims more would only waste time
FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
"""Names of all experts of a layer in the memory of transformers 5; in the files of a known architecture they are read as its own."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_TIED_BY_DEFAULT = ("gemma", "ernie4_5", "smollm3", "cohere", "cohere2")
"""Families whose class in transformers ties the head if ``config.json`` does not say."""
_OF_A_WHOLE = ("qwen3_5_text", "qwen3_5_moe_text")
"""Text models that transformers loads from the files of a model of images and text, and saves under the names there."""
COMPILED = "_orig_mod."
_WRAPPERS = {
    COMPILED: (
        "a model that torch.compile had wrapped",
        "Save the model inside: model._orig_mod.save_pretrained(NEW).",
    ),
    "module.": (
        "a model that DataParallel or DistributedDataParallel had wrapped",
        "Save the model inside: model.module.save_pretrained(NEW).",
    ),
    "base_model.model.": (
        "a PEFT model, base and adapter side by side",
        "Merge the adapter first: model.merge_and_unload().save_pretrained(NEW).",
    ),
}


@dataclass(frozen=True)
class InMemory:
    """Names of transformers 5 for tensors of one architecture in memory that differ from those in files.

    Attributes:
        experts: Name of ``experts`` in files, below the layer's module.
        parts: Gate, up and down of one expert; None if files also hold all experts of a layer in one tensor.
        whole: The two tensors in that case.
        renamed: Endings of names in memory and in files.
    """

    experts: tuple[str, str] = (".mlp.experts", ".mlp.experts")
    parts: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    whole: tuple[str, str] = ("", "")
    renamed: tuple[tuple[str, str], ...] = ()


IN_MEMORY: dict[str, InMemory] = {
    "mixtral": InMemory(
        (".mlp.experts", ".block_sparse_moe.experts"),
        ("w1", "w3", "w2"),
        renamed=((".mlp.gate.weight", ".block_sparse_moe.gate.weight"),),
    ),
    "granitemoeshared": InMemory(
        (".block_sparse_moe.experts", ".block_sparse_moe"),
        None,
        ("input_linear.weight", "output_linear.weight"),
        renamed=((".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),),
    ),
    "granitemoe_swa": InMemory(
        (".block_sparse_moe.experts", ".block_sparse_moe.experts"), None, ("gate_up_proj", "down_proj")
    ),
    "ernie4_5_moe": InMemory(
        renamed=((".mlp.gate.moe_statics.e_score_correction_bias", ".mlp.moe_statics.e_score_correction_bias"),)
    ),
    **dict.fromkeys(
        (
            "qwen2_moe",
            "qwen3_moe",
            "glm4_moe",
            "flex_olmo",
            "hunyuan_v1_moe",
            "jetmoe",
            "cohere2_moe",
            "qwen3_5_moe_text",
        ),
        InMemory(),
    ),
}


def layer_of(name: str) -> int | None:
    """Return the decoder layer that a tensor or module belongs to, by its name; None: none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def named_as_in_files(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Return the tensors under their usual names, in the same order. O(tensors); nothing is read.

    Args:
        tensors: Tensors by their names in the headers.
        config: The folder's ``config.json``.

    Raises:
        CheckpointError: Transformers would not recognise the names, or two tensors have one name.
    """
    _refuse_wrappers(tensors)
    model_type = str(config.get("model_type"))
    found: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        for name, piece in _renamed(stored, info, model_type):
            if name in found:
                raise CheckpointError(f"the tensor {name!r} is stored twice, under two names ({stored!r}).")
            found[name] = piece
    tied = config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)
    if EMBEDDING not in found and HEAD in found and tied is True:
        found = {EMBEDDING if name == HEAD else name: info for name, info in found.items()}
    return found


def _refuse_wrappers(tensors: Mapping[str, TensorInfo]) -> None:
    for prefix, (what, hint) in _WRAPPERS.items():
        name = next((n for n in tensors if n.startswith(prefix) or (prefix == COMPILED and prefix in n)), None)
        if name is not None:
            raise CheckpointError(
                f"the tensor {name!r} was saved from {what}: transformers would not find it and use random numbers "
                "in its place.",
                hint=hint,
            )


def _renamed(name: str, info: TensorInfo, model_type: str) -> Iterator[tuple[str, TensorInfo]]:
    """Yield a stored tensor under its usual name, or the experts that it holds."""
    if _WITHOUT_HEAD.match(name):
        name = f"model.{name}"
    if model_type in _OF_A_WHOLE:
        name = name.replace("model.language_model.", "model.", 1)
    table = IN_MEMORY.get(model_type)
    fused = FUSED.match(name) if len(info.shape) == 3 and 0 < info.shape[0] <= _MOST_EXPERTS and info.numel else None
    if table is None:
        yield name, info
    elif fused is None:
        yield next((name.removesuffix(a) + b for a, b in table.renamed if name.endswith(a)), name), info
    else:
        start = fused[1].removesuffix(table.experts[0]) + table.experts[1]
        yield from _experts(start, fused[2] == "down_proj", info, table)


def _experts(start: str, down: bool, info: TensorInfo, table: InMemory) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the matrices of all experts that are concatenated in one stored tensor."""
    if table.parts is None:
        yield f"{start}.{table.whole[down]}", info
        return
    count, rows, columns = info.shape
    parts = table.parts[2:] if down else table.parts[:2]
    if rows % len(parts):
        raise CheckpointError(f"{start}.gate_up_proj has {rows} rows, which cannot be gate and up of equal size.")
    first = replace(info, shape=(rows // len(parts), columns))
    names = (f"{start}.{expert}.{part}.weight" for expert in range(count) for part in parts)
    for at, name in enumerate(names):
        yield name, replace(first, offset=info.offset + at * first.nbytes)
