"""Recognise a dense checkpoint and check it against its own configuration before anything else happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.base import FLOAT_DTYPES, Checkpoint
from ..checkpoint.reader import refuse_tokenizer_code
from ..checkpoint.text_part import CONVERTED, TextPart, whole_hint
from ..errors import CheckpointError, known_names
from ..lazy import torch
from .config_values import SIZE_KEYS, check_rope, check_special, check_values
from .expert_weighting import EXPERT_KEYS, routes_attention
from .sources import SOURCES, DenseSpec, Read, Source
from .sources.base import canonical_shapes
from .sources.fields import completed
from .sources.refused import REFUSED

_IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
_QUANTISED = (
    ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_packed", ".weight_scale",
    ".weight_scale_inv",
)  # fmt: skip
"""Name endings of tensors in GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints."""


@dataclass(frozen=True)
class DenseModel:
    """A recognised dense checkpoint: its family, its sizes, and the location of each canonical tensor."""

    checkpoint: Checkpoint
    source: Source
    spec: DenseSpec
    reads: Mapping[str, Read]

    @property
    def part(self) -> TextPart | None:
        """The checkpoint if the model is the text model of a larger one."""
        return self.checkpoint if isinstance(self.checkpoint, TextPart) else None

    def has(self, name: str) -> bool:
        """Return whether there is a canonical tensor (see `llamamoe.architectures.sources`) of this name."""
        return name in self.reads

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a canonical tensor."""
        return canonical_shapes(self.spec)[name]

    def dtype_of(self, name: str) -> str:
        """Return the stored dtype (safetensors name) of a canonical tensor."""
        return self.checkpoint.tensors[self.reads[name].name].dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a canonical tensor in its stored dtype (float32 if reading changes values), or one of the rest."""
        from ..checkpoint.tensors import to_halves

        read = self.reads.get(name) or Read(name)
        tensor = self.checkpoint.read(read.name, read.rows)
        for op, value in read.ops:
            tensor = tensor.float() + value if op == "add" else tensor.float() * value
        return to_halves(tensor, read.paired, read.turned) if read.paired else tensor


def understand(checkpoint: Checkpoint) -> DenseModel:
    """Check that the checkpoint is a dense model of a known family whose files agree with its configuration.

    O(number of tensors); no tensor is read.

    Raises:
        CheckpointError: A check fails; the message names the key or tensor and the rule.
    """
    config = checkpoint.config
    refuse_foreign(checkpoint)
    _refuse_family(config)
    _refuse_mixture(config)
    name = config.get("model_type")
    if not isinstance(name, str) or name not in SOURCES:
        raise CheckpointError(
            f"config.json: model_type {name!r} is not a dense family that can be converted exactly.",
            hint=known_names(SOURCES.names()),
        )
    source = SOURCES.get(name)()
    check_values(config, source.fields)
    config = completed(config, source.fields)
    layers = config.get("num_hidden_layers") or 0
    if layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json: num_hidden_layers = {layers}, but the files hold only {len(checkpoint.tensors)} tensors: "
            "config and weights disagree."
        )
    spec = source.spec(config)
    check_rope(spec)
    check_special(spec)
    if isinstance(checkpoint, TextPart):
        _refuse_scaled_table(spec)
        spec = replace(spec, whole=str(checkpoint.whole["model_type"]))
    if spec.tie_word_embeddings and "lm_head.weight" in checkpoint.tensors:
        spec = replace(spec, tie_word_embeddings=False)  # transformers 5 does not tie tensors that differ
    try:
        _check_tensors(checkpoint, source.raw_shapes(spec))
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=_left_out(checkpoint.config, config) or error.hint) from None
    return DenseModel(checkpoint, source, spec, source.canonical(spec))


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that brings its own code or holds quantised weights.

    Raises:
        CheckpointError: It has either.
    """
    config = checkpoint.config
    if config.get("auto_map"):
        raise CheckpointError(
            f"{checkpoint.path}: config.json has an 'auto_map': the checkpoint brings its own code, which is never run.",
            hint="Save it as one of transformers' own architectures first.",
        )
    refuse_tokenizer_code(checkpoint.path)  # a GGUF file has none; its --tokenizer was checked at opening
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        kind = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"the weights are quantised ({kind}): a conversion of them would not be exact.",
            hint="Use the unquantised checkpoint, or a GGUF file, which is dequantised on reading.",
        )
    name = next((n for n in checkpoint.tensors if n.endswith(_QUANTISED)), None)
    if name:
        raise CheckpointError(
            f"the weights are quantised (there is a tensor {name!r}): a conversion of them would not be exact.",
            hint="Use the unquantised checkpoint, or a GGUF file, which is dequantised on reading.",
        )


def _refuse_family(config: Mapping[str, Any]) -> None:
    """Refuse families that no target computes, and models of more than text, with the reason."""
    name, text = config.get("model_type"), config.get("text_config")
    if isinstance(name, str) and name in REFUSED:
        raise CheckpointError(
            f"config.json: no target computes model_type {name!r} exactly: {REFUSED[name]}.",
            hint=known_names(SOURCES.names()),
        )
    if not isinstance(text, Mapping):
        return
    inner = str(text.get("model_type"))
    places = whole_hint(config, f"split converts the text model inside {', '.join(CONVERTED)}.")
    message = f"config.json: model_type {name!r} is a model of more than text; its text part is {inner!r}"
    if inner in REFUSED:
        raise CheckpointError(
            f"{message}, which no target computes exactly: {REFUSED[inner]}.", hint=known_names(SOURCES.names())
        )
    raise CheckpointError(
        f"{message}.",
        hint=f"{places} Else save it as a causal language model of its own, with its head."
        if inner in SOURCES
        else known_names(SOURCES.names()),
    )


def _refuse_scaled_table(spec: DenseSpec) -> None:
    if spec.family == "gemma":
        raise CheckpointError(
            "the text part is 'gemma', which multiplies embeddings of tokens, but not those of images: mixtures multiply both "
            "or none.",
            hint="Save the text part as a causal language model of its own, with its head, and convert that.",
        )


def mixture_key(config: Mapping[str, Any]) -> str | None:
    """Return the key of ``config.json`` that makes a model a mixture of experts; None for a dense one."""
    keys = (*EXPERT_KEYS, "num_experts_per_tok")
    return next((key for key in keys if isinstance(config.get(key), int) and config[key] > 1), None)


def _refuse_mixture(config: Mapping[str, Any]) -> None:
    if experts := mixture_key(config):
        routed = routes_attention(config.get("model_type"))
        other = (
            "make a dense model of it with `llamamoe densify`"
            if routed
            else "split its experts with `llamamoe resplit`"
        )
        raise CheckpointError(
            f"config.json: {experts} = {config[experts]}, so this is already a mixture of experts.",
            hint=f"Give the dense model that it was made from, or {other}.",
        )


def _left_out(given: Mapping[str, Any], completed: Mapping[str, Any]) -> str | None:
    """Name the sizes that took a default, because the weights may disagree with these."""
    told = [f"{key} ({completed[key]})" for key in SIZE_KEYS if key not in given and completed.get(key) is not None]
    return (
        f"config.json leaves out {', '.join(told)}, which {'has' if len(told) == 1 else 'have'} the family's default."
        if told
        else None
    )


def _check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors that config.json implies are missing, the first is {missing[0]!r}: config and weights disagree.",
            hint="The folder was saved from the model without its head: save it from AutoModelForCausalLM."
            if missing == ["lm_head.weight"]
            else None,
        )
    for name, shape in expected.items():
        info = checkpoint.tensors[name]
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{name} is stored as {info.dtype}: only {', '.join(FLOAT_DTYPES)} can be split exactly.",
                hint="Use the unquantised checkpoint.",
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(info.shape)}, but config.json implies {list(shape)}: config and weights disagree."
            )
    known = expected.keys() | (checkpoint.rest.keys() if isinstance(checkpoint, TextPart) else set())
    unknown = [n for n in checkpoint.tensors if n not in known and not n.endswith(_IGNORED)]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors do not belong to the architecture in config.json, the first is {unknown[0]!r}: "
            "dropping them would not be exact."
        )


def stored_dtype(model: DenseModel) -> str:
    """Return the dtype of most weights; float64 becomes float32, which transformers computes in."""
    tally: dict[str, int] = {}
    for name, shape in canonical_shapes(model.spec).items():
        dtype = model.dtype_of(name)
        tally[dtype] = tally.get(dtype, 0) + math.prod(shape)
    most = max(tally, key=lambda d: (tally[d], d))
    return "F32" if most == "F64" else most
