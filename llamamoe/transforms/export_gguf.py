"""``llamamoe.export_gguf``: write a converted or dense checkpoint as one GGUF file, for llama.cpp and its relatives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from .._version import __version__
from ..architectures.config_values import check_rope
from ..architectures.dense_checkpoint import DenseModel, understand
from ..architectures.moe_checkpoint import ConvertedModel, check_shapes
from ..checkpoint.gguf.header import require_gguf
from ..checkpoint.gguf.rope import float32, uint32, write_rope
from ..checkpoint.gguf.vocabulary import GgufVocabulary, read_vocabulary
from ..checkpoint.gguf.writer import DTYPES, FILE_TYPES, Q8_BLOCK, GgufOut, write_tensors
from ..checkpoint.out_folder import check_room, normal_path
from ..checkpoint.reader import SafetensorsCheckpoint
from ..errors import LlamaMoeError, RefusedError, UsageError, near_misses
from ..lazy import gguf
from ..models.loadable import check_model
from ..progress import ProgressCallback, ignore_progress
from .gguf_tensors import gguf_tensors
from .llama_cpp import DENSE, Architecture, dense_architecture, llama_cpp_architecture
from .rewrite import opened


@dataclass(frozen=True)
class GgufExport:
    """The result of `export_gguf`.

    Attributes:
        out: The output file.
        architecture: Its name in llama.cpp.
        dtype: The type of most weights: ``F32``, ``F16``, ``BF16`` or ``Q8_0``.
        num_tensors: Number of tensors.
        nbytes: Size of the file in bytes.
        warnings: Sentences for the user.
    """

    out: Path
    architecture: str
    dtype: str
    num_tensors: int
    nbytes: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
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
    """Write a checkpoint as one GGUF file, with one projection of a layer's experts in memory at a time.

    Rows of queries and keys are put into the order that llama.cpp rotates; experts of a layer are stacked; norms,
    biases and routers are stored in float32, as llama.cpp's own converter does. The file appears whole or not at all.

    Args:
        model: A checkpoint with the target ``mixtral``, ``granitemoeshared``, or ``qwen2_moe`` with the rescale `unit`;
            or a dense ``llama`` or ``mistral``, such as a parent, or the result of ``--method static``.
        out: The file to create; its name ends in ``.gguf``.
        dtype: ``"auto"`` (matrices as they are stored), ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"`` (8 bits, a scale
            for every 32 numbers; rows whose width is not a multiple of 32 get 16 bits). llama.cpp can make smaller ones
            from it.
        pre: llama.cpp's name of a byte-level tokenizer's pre-tokenizer, if it is not recognised.
        force: Replace ``out``.
        progress: Called after every tensor.

    Raises:
        RefusedError: llama.cpp does not compute this model exactly, OUT already exists, or the disk has too little
            room.
        CheckpointError: The checkpoint is broken, or llama.cpp would split text differently.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    require_gguf()
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown.", hint=near_misses(dtype, list(DTYPES)))
    place = normal_path(out)
    _check_place(place, force=force)
    location, checkpoint = opened(model)
    if place.parent.resolve().is_relative_to(location.path.resolve()):
        raise RefusedError(f"OUT ({out}) is in the model's own folder.", hint="Choose a place outside of it.")
    read, architecture = _understood(checkpoint)
    check_model(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    vocabulary = read_vocabulary(checkpoint.path, read.spec.vocab_size, pre=pre)

    writer = gguf.GGUFWriter(None, architecture.name)
    freqs = _write_metadata(writer, read, location.name, vocabulary)
    tensors = list(gguf_tensors(read, architecture, dtype, freqs))
    kind = max(tensors, key=lambda each: prod(each.shape)).kind
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    nbytes = sum(each.nbytes for each in tensors)
    check_room(place, nbytes, reuse=False, what="the file takes", less=("a smaller --dtype",))
    write_tensors(writer, tensors, place, progress, checkpoint.check_unchanged)
    warnings = tuple(_warnings(read, vocabulary, tensors, dtype, kind))
    return GgufExport(place, architecture.name, kind, len(tensors), place.stat().st_size, warnings)


def runs_in_llama_cpp(model: Path) -> bool:
    """Return whether a model is a GGUF file, or `export_gguf` accepts its architecture; only headers are read."""
    if model.is_file() and model.suffix == ".gguf":
        return True
    try:
        _understood(SafetensorsCheckpoint(model))
    except LlamaMoeError:
        return False
    return True


def _understood(checkpoint: SafetensorsCheckpoint) -> tuple[ConvertedModel | DenseModel, Architecture]:
    """Return the checkpoint, checked against its own configuration, and its architecture in llama.cpp."""
    if checkpoint.config.get("model_type") in DENSE:
        dense = understand(checkpoint)
        return dense, dense_architecture(dense)
    converted = ConvertedModel(checkpoint)
    architecture = llama_cpp_architecture(converted)
    check_rope(converted.spec)
    check_shapes(converted)
    return converted, architecture


# ---- what is refused -----------------------------------------------------------------------------------------------


def _check_place(out: Path, *, force: bool) -> None:
    if out.suffix != ".gguf":
        raise UsageError(f"OUT ({out}) must end in .gguf.", hint=f"For example {out.name}.gguf.")
    try:
        there = out.is_symlink() or out.exists()
        parent = next(each for each in out.parents if each.exists())
    except OSError as error:
        raise RefusedError(f"OUT ({out}) cannot be used: {error.strerror}.", hint="Choose another name.") from error
    if not parent.is_dir():
        raise RefusedError(f"OUT ({out}) cannot be created: {parent} is not a folder.", hint="Choose another name.")
    if there and (out.is_symlink() or not out.is_file()):
        raise RefusedError(f"OUT ({out}) exists and is not a plain file.", hint="Choose another name.")
    if there and not force:
        raise RefusedError(f"OUT ({out}) exists.", hint="Choose another name, or --force to replace it.")


def _warnings(
    model: ConvertedModel | DenseModel, vocabulary: GgufVocabulary, tensors: list[GgufOut], dtype: str, kind: str
) -> Iterator[str]:
    window = model.spec.window
    if window and window < model.spec.max_position_embeddings:
        yield f"llama.cpp has no sliding window for this architecture: the context length is set to the window, {window}"
    yield from vocabulary.notes
    if isinstance(model, ConvertedModel) and model.block.get("router_scale") == "hard":
        yield (
            "the router is hard: its logits nearly tie, so that rounding may select another expert in llama.cpp than in "
            "transformers"
        )
    if isinstance(model, ConvertedModel) and model.mixing.top_k < model.mixing.num_experts and kind != "F32":
        yield (
            f"llama.cpp computes products with {kind} weights at that precision: where the scores of two experts are close, it may "
            "select another one than transformers in float32, and continue a text otherwise (to compare the two: --dtype f32, and in "
            "llama.cpp -ctk f32 -ctv f32 -fa off)"
        )
    if vocabulary.model == "none":
        yield "the checkpoint has no tokenizer: the file has none, and accepts token ids only"
    wide = [each.name for each in tensors if dtype == "q8_0" and each.kind == "F16"]
    if wide:
        yield f"{len(wide)} tensors have rows whose width is not a multiple of {Q8_BLOCK} and are stored in 16 bits: {wide[0]}"
    if dtype == "q8_0":
        yield "8-bit weights round the model's weights: measure it again"


# ---- metadata ------------------------------------------------------------------------------------------------------


def _write_metadata(
    writer: gguf.GGUFWriter, model: ConvertedModel | DenseModel, name: str, vocabulary: GgufVocabulary
) -> list[float] | None:
    """Write the metadata before the tensors; return llama3's rope factors, if any."""
    spec, block = model.spec, model.checkpoint.config.get("llamamoe")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_string("llamamoe.version", __version__)
    if block:
        writer.add_string("llamamoe.conversion", json.dumps(block, sort_keys=True))
    writer.add_vocab_size(spec.vocab_size)
    writer.add_block_count(spec.num_layers)
    longest = uint32(vars(spec), "max_position_embeddings")
    writer.add_context_length(min(spec.window or longest, longest))
    writer.add_embedding_length(spec.hidden_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(float32(vars(spec), "rms_norm_eps"))
    if isinstance(model, ConvertedModel):
        _write_experts(writer, model)
    else:
        writer.add_feed_forward_length(spec.intermediate_size)
    vocabulary.write(writer)
    return write_rope(writer, spec.rope, spec.head_dim)


def _write_experts(writer: gguf.GGUFWriter, model: ConvertedModel) -> None:
    """Write the metadata of experts, and of granite's multipliers."""
    spec, layout = model.spec, model.layout
    if model.target.name == "qwen2_moe":
        writer.add_feed_forward_length(spec.intermediate_size)
        writer.add_expert_feed_forward_length(layout.expert_width)
    else:
        writer.add_feed_forward_length(layout.expert_width)
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
