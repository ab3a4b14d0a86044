"""``llamamoe.export_gguf``: a converted checkpoint as one GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from .._version import __version__
from ..architectures.config_values import check_rope
from ..architectures.moe_checkpoint import ConvertedModel, check_shapes
from ..architectures.moe_layout import NEARLY_ZERO, Constant, Neurons, OutTensor, Router, Weighting
from ..checkpoint.gguf.config import NORMS, PROJECTIONS
from ..checkpoint.gguf.header import require_gguf
from ..checkpoint.gguf.rope import float32, uint32, write_rope
from ..checkpoint.gguf.vocabulary import GgufVocabulary, read_vocabulary
from ..checkpoint.gguf.writer import DTYPES, FILE_TYPES, Q8_BLOCK, GgufOut, kind_of, write_tensors
from ..checkpoint.out_folder import free_bytes, normal_path
from ..errors import RefusedError, UsageError, near_misses
from ..lazy import gguf, torch
from ..models.loadable import check_model
from ..progress import ProgressCallback, ignore_progress
from .rewrite import opened


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of one target.

    Attributes:
        name: Its name for it.
        pairs: Whether it rotates neighbouring rows of queries and keys, so that they must be put into that order.
        llama3: Whether it reads the factors of llama3's rope scaling.
        any_head: Whether a head may be wider than hidden size over heads, and the output head be the embedding.
        weighting: What it makes of the router's scores.
    """

    name: str
    pairs: bool = True
    llama3: bool = True
    any_head: bool = True
    weighting: Weighting = "renormalised"


ARCHITECTURES = {
    "mixtral": Architecture("llama"),
    "granitemoeshared": Architecture("granitemoe"),
    "qwen2_moe": Architecture("qwen2moe", pairs=False, llama3=False, any_head=False, weighting="softmax"),
}
"""Targets that llama.cpp computes as transformers does, if nothing in `_architecture` says otherwise."""
_CLOSED = 1e-7
"""A closed gate's rows. GPUs may multiply in float16, where NEARLY_ZERO is 0; this is not, and moves a gate by 1e-6 or so."""
_ROOM = 16 * 2**20


@dataclass(frozen=True)
class GgufExport:
    """What `export_gguf` wrote.

    Attributes:
        out: The file.
        architecture: llama.cpp's name for it.
        dtype: The type that most numbers have: ``F32``, ``F16``, ``BF16`` or ``Q8_0``.
        num_tensors: Tensors in it.
        nbytes: Bytes of the file.
        warnings: What a user should know.
    """

    out: Path
    architecture: str
    dtype: str
    num_tensors: int
    nbytes: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "out": str(self.out), "warnings": list(self.warnings)}


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    pre: str | None = None,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> GgufExport:
    """Write a converted checkpoint as one GGUF file, with one projection of a layer's experts in memory at a time.

    Rows of queries and keys are put into the order that llama.cpp rotates; experts of a layer are stacked; norms, biases
    and routers are stored in float32, as llama.cpp's own converter does. The file appears whole or not at all.

    Args:
        model: A checkpoint with the target ``mixtral``, ``granitemoeshared``, or ``qwen2_moe`` as the rescale `unit` makes it.
        out: The file to make; its name ends in ``.gguf``.
        dtype: ``"auto"`` (matrices as they are stored), ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"`` (8 bits, a scale
            for every 32 numbers; rows that are no multiple of 32 wide get 16 bits). llama.cpp makes smaller ones of it.
        pre: llama.cpp's name of the way that a byte-level tokenizer cuts text, if it is not recognised.
        force: Replace ``out``.
        progress: Told after every tensor.

    Raises:
        RefusedError: llama.cpp does not compute this model exactly, OUT is there already, or the disk is too small.
        CheckpointError: The checkpoint is broken, or llama.cpp would cut text in another way.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    require_gguf()
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown.", hint=near_misses(dtype, list(DTYPES)))
    place = normal_path(out)
    _check_place(place, force=force)
    location, checkpoint = opened(model)
    if place.parent.resolve().is_relative_to(location.path.resolve()):
        raise RefusedError(f"OUT ({out}) lies in the model's own folder.", hint="Choose a place outside of it.")
    converted = ConvertedModel(checkpoint)
    architecture = _architecture(converted)
    check_rope(converted.spec)
    check_shapes(converted)
    check_model(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    vocabulary = read_vocabulary(checkpoint.path, converted.spec.vocab_size, pre=pre)

    writer = gguf.GGUFWriter(None, architecture.name)
    freqs = _write_metadata(writer, converted, location.name, vocabulary)
    tensors = list(_tensors(converted, architecture, dtype, freqs))
    kind = max(tensors, key=lambda each: prod(each.shape)).kind
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _check_room(place, sum(each.nbytes for each in tensors))
    write_tensors(writer, tensors, place, progress, checkpoint.check_unchanged)
    warnings = tuple(_warnings(converted, vocabulary, tensors, dtype))
    return GgufExport(place, architecture.name, kind, len(tensors), place.stat().st_size, warnings)


# ---- what is refused -----------------------------------------------------------------------------------------------


def _check_place(out: Path, *, force: bool) -> None:
    if out.suffix != ".gguf":
        raise UsageError(f"OUT ({out}) must end in .gguf.", hint=f"For example {out.name}.gguf.")
    try:
        there = out.is_symlink() or out.exists()
        parent = next(each for each in out.parents if each.exists())
    except OSError as error:
        raise RefusedError(f"OUT ({out}) cannot be: {error.strerror}.", hint="Choose another name.") from error
    if not parent.is_dir():
        raise RefusedError(f"OUT ({out}) cannot be made: {parent} is not a folder.", hint="Choose another name.")
    if there and (out.is_symlink() or not out.is_file()):
        raise RefusedError(f"OUT ({out}) exists and is not a plain file.", hint="Choose another name.")
    if there and not force:
        raise RefusedError(f"OUT ({out}) exists.", hint="Choose another name, or --force to replace it.")


def _architecture(model: ConvertedModel) -> Architecture:
    """llama.cpp's architecture for a model.

    Raises:
        RefusedError: It has none, or computes something else; all reasons are named.
    """
    found, spec = ARCHITECTURES.get(model.target.name), model.spec
    if found is None:
        raise RefusedError(
            f"a GGUF file can be written for {', '.join(ARCHITECTURES)}, but this model is {model.target.name}.",
            hint="Split the parent again with --target granitemoeshared (shared experts) or --target mixtral (none).",
        )
    reasons = []
    if spec.hidden_act not in ("silu", "swish"):
        reasons.append(f"it computes experts with SiLU, and theirs is {spec.hidden_act!r}")
    if model.experts.dense_layers:
        reasons.append(f"it has no dense layers there, and {', '.join(map(str, model.experts.dense_layers))} are")
    if model.mixing.weighting != found.weighting:
        what = "sum to one" if found.weighting == "renormalised" else "do not sum to one (norm_topk_prob is false)"
        reasons.append(f"its router's weights {what}")
    if spec.rope.get("rope_type") == "llama3" and not found.llama3:
        reasons.append("it drops llama3's rope scaling there")
    if not spec.plain_head_dim and not found.any_head:
        reasons.append("its heads are as wide as hidden size over heads there")
    if any(spec.sliding) and not found.pairs:
        reasons.append("it has no sliding windows there")
    if reasons:
        raise RefusedError(
            f"llama.cpp computes {found.name} otherwise than this model: {'; '.join(reasons)}.",
            hint="granitemoeshared (shared experts) and mixtral (none) hold most models; no dense layers, and SiLU only.",
        )
    return found


def _check_room(out: Path, need: int) -> None:
    have = free_bytes(out, resume=False)
    if have < need + _ROOM:
        raise RefusedError(
            f"the file takes {need / 1e9:.2f} GB, but the disk of {out} has {have / 1e9:.2f} GB free.",
            hint="Make room, choose another disk, or a smaller --dtype.",
        )


def _warnings(model: ConvertedModel, vocabulary: GgufVocabulary, tensors: list[GgufOut], dtype: str) -> Iterator[str]:
    window = model.spec.window
    if window and window < model.spec.max_position_embeddings:
        yield f"llama.cpp has no sliding window for this architecture: the context length is set to the window, {window}"
    yield from vocabulary.notes
    if model.block.get("router_scale") == "hard":
        yield (
            "the router is hard: its logits nearly tie, so that rounding may select another expert in llama.cpp than in "
            "transformers"
        )
    if vocabulary.model == "none":
        yield "the checkpoint has no tokenizer: the file holds none, and takes token ids only"
    wide = [each.name for each in tensors if dtype == "q8_0" and each.kind == "F16"]
    if wide:
        yield f"{len(wide)} tensors have rows that are no multiple of {Q8_BLOCK} wide and are stored in 16 bits: {wide[0]}"
    if dtype == "q8_0":
        yield "8-bit weights round the model's weights: measure it again"


# ---- metadata ------------------------------------------------------------------------------------------------------


def _write_metadata(
    writer: gguf.GGUFWriter, model: ConvertedModel, name: str, vocabulary: GgufVocabulary
) -> list[float] | None:
    """All that the file says before its tensors; returns llama3's rope factors, if there are any."""
    spec, layout = model.spec, model.layout
    writer.add_type("model")
    writer.add_name(name)
    writer.add_string("llamamoe.version", __version__)
    if model.block:
        writer.add_string("llamamoe.conversion", json.dumps(model.block, sort_keys=True))
    writer.add_vocab_size(spec.vocab_size)
    writer.add_block_count(spec.num_layers)
    longest = uint32(vars(spec), "max_position_embeddings")
    writer.add_context_length(min(spec.window or longest, longest))
    writer.add_embedding_length(spec.hidden_size)
    if model.target.name == "qwen2_moe":
        writer.add_feed_forward_length(spec.intermediate_size)
        writer.add_expert_feed_forward_length(layout.expert_width)
    else:
        writer.add_feed_forward_length(layout.expert_width)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(float32(vars(spec), "rms_norm_eps"))
    writer.add_expert_count(layout.num_experts)
    writer.add_expert_used_count(layout.top_k)
    if layout.shared_width:
        writer.add_expert_shared_feed_forward_length(layout.shared_width)
    if model.target.name == "granitemoeshared":
        usual = spec.attention_multiplier is None
        writer.add_attention_scale(spec.head_dim**-0.5 if usual else float32(vars(spec), "attention_multiplier"))
        writer.add_embedding_scale(float32(vars(spec), "embedding_multiplier"))
        writer.add_residual_scale(float32(vars(spec), "residual_multiplier"))
        writer.add_logit_scale(float32(vars(spec), "logits_scaling"))
    vocabulary.write(writer)
    return write_rope(writer, spec.rope, spec.head_dim)


# ---- tensors -------------------------------------------------------------------------------------------------------


def _tensors(
    model: ConvertedModel, architecture: Architecture, dtype: str, freqs: list[float] | None
) -> Iterator[GgufOut]:
    """The tensors of the file, in order."""
    from ..checkpoint.tensors import interleave

    spec = model.spec

    def outer(ours: str, theirs: str, heads: int = 0) -> GgufOut:
        shape = model.checkpoint.tensors[model.stored_name(ours)].shape
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
            if not theirs.startswith("attn"):
                continue
            heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads}.get(theirs, 0) if architecture.pairs else 0
            for part in ("weight", "bias"):
                if model.has(f"{prefix}{ours}.{part}"):
                    yield outer(f"{prefix}{ours}.{part}", f"{block}{theirs}.{part}", heads)
        yield from _moe_tensors(model, dtype, layer, block)
    yield outer("model.norm.weight", "output_norm.weight")
    if not spec.tie_word_embeddings:
        yield outer("lm_head.weight", "output.weight")
    elif not architecture.any_head:
        yield outer("model.embed_tokens.weight", "output.weight")


def _moe_tensors(model: ConvertedModel, dtype: str, layer: int, block: str) -> Iterator[GgufOut]:
    """Router, shared expert and stacked experts of one layer, in the units in which they are stored."""
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
    """All experts' rows of one projection."""
    found = []
    for tensor in tensors:
        value = model.checkpoint.read(tensor.name)
        if isinstance(tensor.origin, Neurons) and tensor.origin.part == "gate_up":
            value = value.chunk(2, dim=-2)[part == "up"]
        found.append(value)
    return found[0] if len(found) == 1 else torch.stack(found)


def _shared_gate(model: ConvertedModel, name: str) -> torch.Tensor:
    """The row of the shared expert's gate; a closed one becomes `_CLOSED`, see `llamamoe.architectures.moe_layout.NEARLY_ZERO`."""
    row_H = model.checkpoint.read(name)[0].to(torch.float32)
    return torch.where(row_H.abs() <= 2 * NEARLY_ZERO, _CLOSED, row_H)
