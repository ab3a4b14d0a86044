"""Read rotary embedding settings of a GGUF file, with checked access to its metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, RefusedError
from ...lazy import gguf, np
from .header import GgufHeader, GgufTensor

ORIGINAL = "Split the original Hugging Face checkpoint instead of its GGUF file."
"""Hint for GGUF files that cannot be carried over."""
_HINT = "Correct it in the model's config.json."
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Range of float32's normal numbers."""


class Keys:
    """The metadata of the file's architecture, checked as they are read."""

    def __init__(self, header: GgufHeader) -> None:
        self.path, self.metadata = header.path, header.metadata
        self.arch: str = header.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value as stored in the file."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number above zero; a list with one number per layer must hold the same one everywhere."""
        value = self.get(key, default)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise CheckpointError(
                    f"{self.path}: {self.arch}.{key} differs between layers, which Llama cannot hold.", hint=ORIGINAL
                )
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: {self.arch}.{key} = {value!r}, but it must be a whole number above 0.")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a finite number above zero."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.path}: {self.arch}.{key} = {value!r}, but it must be a number above 0.")
        return float(value)


def rope_parameters(header: GgufHeader, keys: Keys, head_dim: int) -> dict[str, Any]:
    """Return rope in the spelling of transformers 5."""
    theta = keys.positive("rope.freq_base", 10000.0)
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.positive("rope.scaling.factor", keys.get("rope.scale_linear") or 1.0)
    if kind == "none" and factor != 1.0:
        kind = "linear"  # llama.cpp's reading of a factor without a type
    for key, neutral in (("attn_factor", (1.0,)), ("yarn_attn_factor", ()), ("yarn_ext_factor", (-1.0, 1.0))):
        if (value := keys.get(f"rope.scaling.{key}")) is not None and value not in neutral:
            raise CheckpointError(
                f"{header.path}: rope.scaling.{key} = {value!r} is ambiguous: converters differ in its meaning.",
                hint=ORIGINAL,
            )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        original = keys.whole("rope.scaling.original_context_length", keys.get("context_length"))
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        betas = {
            "beta_fast": keys.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": keys.get("rope.scaling.yarn_beta_slow"),
        }
        rope |= {name: value for name, value in betas.items() if value is not None}
    elif kind not in ("none", "linear"):
        raise CheckpointError(f"{header.path}: rope scaling of type {kind!r} is not supported.", hint=ORIGINAL)
    freqs = header.tensors.get("rope_freqs.weight")
    if freqs is None:
        return rope
    if rope["rope_type"] != "default":
        raise CheckpointError(
            f"{header.path} has rope factors and {kind} scaling at once, which is not supported.", hint=ORIGINAL
        )
    return rope | _llama3(header, freqs, theta, head_dim)


def _llama3(header: GgufHeader, freqs: GgufTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the llama3 scaling that reproduces the factors in the file, which are what the model computes with.

    Raises:
        CheckpointError: No setting reproduces the factors.
    """
    if freqs.kind != "F32" or freqs.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{header.path}: rope_freqs.weight is {freqs.kind} {freqs.shape}, not F32 ({head_dim // 2},)."
        )
    stored = np.fromfile(header.path, np.float32, freqs.shape[0], offset=freqs.offset)
    if (stored == 1).all():
        return {}
    largest = float(stored.max())
    # The lowest frequencies are divided by the factor itself; with few dimensions none may be that low.
    for factor in dict.fromkeys((largest, 8.0, 32.0, 2.0, 4.0, 16.0, 64.0)):
        for original in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
            if np.allclose(stored, _llama3_factors(theta, head_dim, factor, original), rtol=1e-5, atol=0.0):
                return {
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }  # fmt: skip
    raise CheckpointError(
        f"{header.path}: rope_freqs.weight holds rope factors (1 to {largest:g}) that are not those of llama3 scaling.",
        hint=ORIGINAL,
    )


def _llama3_factors(
    theta: float, head_dim: int, factor: float, original: int, low: float = 1.0, high: float = 4.0
) -> list[float]:
    """Return what llama.cpp's converter stores: the divisor of each frequency."""
    factors = []
    for dim in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (dim / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        inside = 1 / ((1 - smooth) / factor + smooth) if 0 <= smooth <= 1 else 0.0
        factors.append(1.0 if smooth > 1 else factor if smooth < 0 else inside)
    return factors


def write_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any], head_dim: int) -> list[float] | None:
    """Add ``rope_parameters`` to the metadata; return the content of ``rope_freqs.weight``, if it is needed.

    Raises:
        RefusedError: llama.cpp does not support the scaling.
    """
    kind, theta = rope.get("rope_type", "default"), float32(rope, "rope_theta")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    known |= {"llama3": {"low_freq_factor", "high_freq_factor"}, "yarn": {"beta_fast", "beta_slow"}}.get(kind, set())
    # Both compute 0.1 ln(factor) + 1 for yarn's attention; GGUF has no key for anything else (such as mscale).
    usual = 0.1 * math.log(float32(rope, "factor")) + 1 if kind == "yarn" else None
    neutral = {"truncate": True, "attention_factor": usual, "partial_rotary_factor": 1.0}
    other = sorted(k for k, v in rope.items() if k not in known and v is not None and neutral.get(k) != v)
    if kind not in ("default", "linear", "llama3", "yarn") or other:
        what = f"rope scaling of type {kind!r}" + (f" with {', '.join(other)}" if other else "")
        raise RefusedError(f"{what} cannot be expressed in a GGUF file.")
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float32(rope, "factor"))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(uint32(rope, "original_max_position_embeddings"))
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(float32(rope, name))
    if kind != "llama3":
        return None
    sizes = float32(rope, "factor"), uint32(rope, "original_max_position_embeddings")
    low, high = float32(rope, "low_freq_factor"), float32(rope, "high_freq_factor")
    return _llama3_factors(theta, head_dim, *sizes, low, high)


def uint32(values: Mapping[str, Any], key: str) -> int:
    """Return a whole number above zero that a GGUF file can hold.

    Raises:
        CheckpointError: The value is anything else.
    """
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**32:
        raise CheckpointError(
            f"config.json: {key} = {value!r}, but in a GGUF file it must be a whole number above 0 and below 2**32.",
            hint=_HINT,
        )
    return value


def float32(values: Mapping[str, Any], key: str) -> float:
    """Return a number that a GGUF file can hold, which rounds it to float32.

    Raises:
        CheckpointError: The value is anything else, or becomes zero or infinite in float32.
    """
    value: Any = values.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (value == 0 or _LEAST <= abs(value) <= _MOST):
        return float(value)
    raise CheckpointError(
        f"config.json: {key} = {value!r}, but in a GGUF file it must be a finite number that float32 holds "
        f"({_LEAST:.1e} to {_MOST:.1e}).",
        hint=_HINT,
    )
