"""Yield the tensors of a checkpoint by llama.cpp's names, in its order and shapes, each made when written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.moe_checkpoint import ConvertedModel
from ..architectures.moe_layout import NEARLY_ZERO, Constant, Neurons, OutTensor, Router
from ..checkpoint.gguf.config import NORMS, PROJECTIONS
from ..checkpoint.gguf.writer import GgufOut, kind_of
from ..checkpoint.tensors import interleave
from ..lazy import torch
from .llama_cpp import Architecture

_CLOSED = 1e-7
"""A closed gate's rows. GPUs may multiply in float16, where NEARLY_ZERO is 0; this is not and moves a gate by ~1e-6."""


def gguf_tensors(
    model: ConvertedModel | DenseModel, architecture: Architecture, dtype: str, freqs: list[float] | None
) -> Iterator[GgufOut]:
    """Yield the tensors of the file, in order."""
    spec = model.spec

    def outer(ours: str, theirs: str, heads: int = 0) -> GgufOut:
        shape = model.shape_of(ours)
        kind = kind_of(dtype, model.dtype_of(ours), shape)
        if heads:
            return GgufOut(theirs, shape, kind, lambda: interleave(model.read(ours), heads))
        return GgufOut(theirs, shape, kind, partial(model.read, ours))

    yield outer("model.embed_tokens.weight", "token_embd.weight")
    if freqs is not None:
        yield GgufOut("rope_freqs.weight", (len(freqs),), "F32", lambda: torch.tensor(freqs, dtype=torch.float32))
    for layer in range(spec.num_layers):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in NORMS.items():
            yield outer(f"{prefix}{ours}.weight", f"{block}{theirs}.weight")
        for theirs, ours in PROJECTIONS.items():
            if not theirs.startswith("attn") and isinstance(model, ConvertedModel):
                continue
            heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads}.get(theirs, 0) if architecture.pairs else 0
            for part in ("weight", "bias"):
                if model.has(f"{prefix}{ours}.{part}"):
                    yield outer(f"{prefix}{ours}.{part}", f"{block}{theirs}.{part}", heads)
        if isinstance(model, ConvertedModel):
            yield from _moe_tensors(model, dtype, layer, block)
    yield outer("model.norm.weight", "output_norm.weight")
    if not spec.tie_word_embeddings:
        yield outer("lm_head.weight", "output.weight")
    elif not architecture.any_head:
        yield outer("model.embed_tokens.weight", "output.weight")


def _moe_tensors(model: ConvertedModel, dtype: str, layer: int, block: str) -> Iterator[GgufOut]:
    """Yield router, shared expert and stacked experts of one layer, in the units in which they are stored."""
    layout, hidden = model.layout, model.spec.hidden_size
    parts: dict[tuple[bool, str], list[OutTensor]] = {}
    for tensor in model.target.moe_tensors(model.spec, layout, layer):
        origin = tensor.origin
        if isinstance(origin, Router):
            read = partial(model.checkpoint.read, tensor.name)
            yield GgufOut(f"{block}ffn_gate_inp.weight", tensor.shape, "F32", read)
        elif isinstance(origin, Constant):
            read = partial(_shared_gate, model, tensor.name)
            yield GgufOut(f"{block}ffn_gate_inp_shexp.weight", tensor.shape[1:], "F32", read)
        elif isinstance(origin, Neurons):
            for part in ("gate", "up") if origin.part == "gate_up" else (origin.part,):
                parts.setdefault((origin.expert == "shared", part), []).append(tensor)
    for (shared, part), tensors in parts.items():
        width = layout.shared_width if shared else layout.expert_width
        matrix = (hidden, width) if part == "down" else (width, hidden)
        shape = matrix if shared else (layout.num_experts, *matrix)
        kind = kind_of(dtype, model.checkpoint.tensors[tensors[0].name].dtype, shape)
        name = f"{block}ffn_{part}_{'shexp' if shared else 'exps'}.weight"
        yield GgufOut(name, shape, kind, partial(_gathered, model, tensors, part))


def _gathered(model: ConvertedModel, tensors: list[OutTensor], part: str) -> torch.Tensor:
    """Return all experts' rows of one projection."""
    found = []
    for tensor in tensors:
        value = model.checkpoint.read(tensor.name)
        if isinstance(tensor.origin, Neurons) and tensor.origin.part == "gate_up":
            value = value.chunk(2, dim=-2)[part == "up"]
        found.append(value)
    return found[0] if len(found) == 1 else torch.stack(found)


def _shared_gate(model: ConvertedModel, name: str) -> torch.Tensor:
    """Return the row of the shared expert's gate; a closed one becomes `_CLOSED` (see ``moe_layout.NEARLY_ZERO``)."""
    row_H = model.checkpoint.read(name)[0].to(torch.float32)
    return torch.where(row_H.abs() <= 2 * NEARLY_ZERO, _CLOSED, row_H)
