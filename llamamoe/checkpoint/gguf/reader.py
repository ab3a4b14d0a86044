"""Read GGUF files as dense checkpoints: headers when opened, tensors dequantised one at a time.

transformers reads GGUF files, too (5.23, `modeling_gguf_pytorch_utils`), and the package gguf dequantises for both.
This module adds what transformers lacks:

- one tensor, or some of its rows, at a time: transformers dequantises every tensor to float32 into one dictionary, then
  fills the model (SmolLM2-135M as Q4_1: 517 MiB beyond its imports, here 126);
- shapes and types without data, from a bounded parser (`header`): transformers lets gguf map an untrusted file;
- F16 and BF16 as they are stored: transformers converts them to float32;
- granite and gemma 1, which its table of architectures lacks;
- refusing metadata that change the output and cannot be expressed in ``config.json``: transformers drops unknown keys
  with a line in its log (`config`, `rope`);
- the pre-tokenizer that the file names (SmolLM2's single digits, the patterns of Qwen2 and Llama 3), and special tokens
  as in the file (`tokenizer`, `vocabulary`): transformers uses one per architecture.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UsageError
from ...lazy import np, torch
from ...progress import Progress, ProgressCallback, ignore_progress
from ..base import DTYPE_BYTES, TensorInfo
from ..files import replacing, write_text
from ..layout import shard_header
from ..plain_values import beyond
from ..source_files import SourceFiles
from . import tokenizer as gguf_tokenizer
from .config import build_config, layout_of, tensor_table
from .header import GgufTensor, read_header, require_gguf

__all__ = ["GgufCheckpoint", "export_dense"]

_PLAIN = ("F32", "F16", "BF16")
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DEQUANTISE_AT_ONCE = 1 << 22  # elements: 16 MiB of float32


class GgufCheckpoint:
    """A dense model in a GGUF file; implements `llamamoe.checkpoint.base.Checkpoint`.

    Args:
        path: The .gguf file.
        tokenizer: A folder whose tokenizer files are used instead of the vocabulary in the file.
        weights_only: Leave the tokenizer to `check_tokenizer`, for callers that only need the weights.

    Attributes:
        general: The file's ``general.*`` metadata without the prefix: name, license, ...

    Raises:
        CheckpointError: The file is broken, or cannot be carried over exactly.
        MissingExtraError: The package ``gguf`` is not installed.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: list[str]

    def __init__(self, path: str | Path, *, tokenizer: str | Path | None = None, weights_only: bool = False) -> None:
        self.path = Path(path)
        self._files = SourceFiles()
        self._files.watch(self.path)
        self._header = header = read_header(self.path)
        self._layout = layout_of(header)
        self.config, notes = build_config(header, self._layout)
        if (wrong := beyond(self.config)) is not None:
            raise CheckpointError(f"{self.path}: {wrong}.", hint="Download the file again, or convert it again.")
        self._table = tensor_table(header, self._layout, self.config)
        for tensor in self._table.values():
            _check_readable(self.path, tensor)
        self.tensors = {
            name: TensorInfo(t.kind if t.kind in _PLAIN else "F32", t.shape, self.path)
            for name, t in self._table.items()
        }
        self.general = {k.removeprefix("general."): v for k, v in header.metadata.items() if k.startswith("general.")}
        self._tokenizer = None if tokenizer is None else Path(tokenizer)
        self._files.watch(*(gguf_tokenizer.files(self._tokenizer) if self._tokenizer else ()))
        # Checked now, so that a plan can refuse before anything is written.
        self.notes = self._quantisation_notes() + notes + ([] if weights_only else self.check_tokenizer())

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """See `Checkpoint.read`: F16, BF16 and F32 as they are stored, everything else dequantised to float32.

        Raises:
            CheckpointError: The tensor does not exist.
            LlamaMoeError: The file has changed since it was opened, or cannot be read.
        """
        tensor = self._table.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.")
        values = torch.from_numpy(_values(self._files, self.path, tensor))
        if tensor.kind == "BF16":
            values = values.view(torch.bfloat16)
        if self._layout.permuted and ".self_attn.q_proj." in name:
            values = _unpermuted(values, self.config["num_attention_heads"])
        elif self._layout.permuted and ".self_attn.k_proj." in name:
            values = _unpermuted(values, self.config["num_key_value_heads"])
        if self._layout.norm_offset and name.endswith("norm.weight"):
            values = values - self._layout.norm_offset
        return values if rows is None else values[rows[0] : rows[1]]

    def check_tokenizer(self) -> list[str]:
        """Return notes about the tokenizer.

        Raises:
            CheckpointError: The tokenizer could not be saved; see `llamamoe.checkpoint.gguf.tokenizer.check`.
        """
        return gguf_tokenizer.check(self._header, self._tokenizer, self.config["vocab_size"])

    def save_tokenizer(self, out: Path) -> list[str]:
        """Write tokenizer, its configuration with the chat template, and the generation configuration into ``out``.

        Returns:
            The names of the files; only ``generation_config.json`` if the GGUF file holds no vocabulary.
        """
        return gguf_tokenizer.save(self._header, self._tokenizer, out)

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, stored types, the file's size and time, and the tokenizer's files."""
        rows = [[name, list(t.shape), t.kind, t.offset] for name, t in sorted(self._table.items())]
        given = gguf_tokenizer.files(self._tokenizer) if self._tokenizer else []
        tokenizer = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in given]
        file = [self._header.file_size, self._files.facts([self.path])[0][-1]]
        text = json.dumps([file, self.config, rows, tokenizer], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_unchanged(self) -> None:
        """See `Checkpoint.check_unchanged`."""
        self._files.check_unchanged()

    def _quantisation_notes(self) -> list[str]:
        kinds = Counter(t.kind for t in self._table.values() if t.kind not in _PLAIN)
        if not kinds:
            return []
        counted = ", ".join(f"{kind} ({count} tensor{'s' * (count > 1)})" for kind, count in kinds.most_common())
        return [f"dequantised from {counted} to F32 on reading; parity is against the dequantised parent"]


def _check_readable(path: Path, tensor: GgufTensor) -> None:
    """Refuse types that the installed gguf cannot turn into numbers, and integers, which are not weights."""
    gguf = require_gguf()
    kind = gguf.constants.GGMLQuantizationType(tensor.type_id)
    if tensor.kind not in _PLAIN and kind not in gguf.quants._type_traits:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} is of type {tensor.kind}, which the package gguf cannot dequantise.",
            hint="Use a file quantised to a common type (Q4_K, Q8_0, F16, ...), or upgrade the package gguf.",
        )


def _values(files: SourceFiles, path: Path, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """Return the tensor's numbers: as stored if not quantised (BF16 as int16), else float32."""
    plain = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}.get(tensor.kind)
    if plain is not None:
        return files.read(path, tensor.offset, tensor.nbytes).view(plain).reshape(tensor.shape)
    rows, columns = prod(tensor.shape[:-1]), tensor.shape[-1]
    width = tensor.nbytes // rows
    gguf = require_gguf()
    kind = gguf.constants.GGMLQuantizationType(tensor.type_id)
    out = np.empty((rows, columns), np.float32)
    step = max(1, _DEQUANTISE_AT_ONCE // columns)
    with np.errstate(all="ignore"):  # a scale may be zero or denormal
        for start in range(0, rows, step):
            count = min(step, rows - start)
            packed = files.read(path, tensor.offset + start * width, count * width).reshape(count, width)
            out[start : start + count] = gguf.quants.dequantize(packed, kind)
    return out.reshape(tensor.shape)


def _unpermuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of rotary dimensions (0, half, 1, half + 1, ...) within each head's rows."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def export_dense(
    gguf_path: str | Path,
    out_folder: str | Path,
    *,
    dtype: str = "BF16",
    tokenizer: str | Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> list[str]:
    """Write the model of a GGUF file as a dense folder that transformers 4.57 and 5 load, one tensor at a time.

    The folder appears whole or not at all.

    Args:
        gguf_path: The .gguf file.
        out_folder: Must not exist yet, or be empty.
        dtype: ``"BF16"``, ``"F16"`` or ``"F32"`` (keeps dequantised values exactly).
        tokenizer: A folder whose tokenizer files are used instead of the vocabulary in the file.
        progress: Called after each tensor.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: The GGUF file is broken or cannot be carried over exactly, or a value does not fit ``dtype``.
        UsageError: The dtype is unknown, or ``out_folder`` is not empty.
    """
    out = Path(out_folder)
    if dtype not in _TORCH_NAMES:
        raise UsageError(f"dtype {dtype!r} is unknown; it is one of {', '.join(_TORCH_NAMES)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty.", hint="Give a folder that does not exist yet.")
    source = GgufCheckpoint(gguf_path, tokenizer=tokenizer)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")  # used by this process only
    partial.mkdir(parents=True)
    try:
        _write_weights(source, partial / "model.safetensors", dtype, progress)
        names = ["config.json", "model.safetensors", *source.save_tokenizer(partial)]
        _write_config(source.config, partial / "config.json", dtype)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return names


def _write_config(config: dict[str, Any], path: Path, dtype: str) -> None:
    """Write both spellings of rope and dtype with the same content: each version of transformers reads its own."""
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    both = {k: v for k, v in config.items() if k != "dtype"}
    both |= {"rope_theta": theta, "rope_scaling": rope if rope["rope_type"] != "default" else None}
    both |= {"torch_dtype": _TORCH_NAMES[dtype]}
    write_text(path, json.dumps(both, indent=2) + "\n")


def _write_weights(source: GgufCheckpoint, path: Path, dtype: str, progress: ProgressCallback) -> None:
    """Write one safetensors file: the header first, then each tensor as it is read."""
    width = DTYPE_BYTES[dtype]
    header, _ = shard_header({n: (dtype, info.shape, info.numel * width) for n, info in source.tensors.items()})
    with replacing(path) as file:
        file.write(header)
        for done, name in enumerate(source.tensors, 1):
            file.write(_bytes(source.read(name), name, dtype))
            progress(Progress("export", done, len(source.tensors), "tensor", name))
    source.check_unchanged()


def _bytes(values: torch.Tensor, name: str, dtype: str) -> memoryview:
    cast = values.to(getattr(torch, _TORCH_NAMES[dtype])).contiguous()
    if dtype == "F16" and not torch.isfinite(cast).all() and torch.isfinite(values).all():
        raise CheckpointError(f"{name} has values beyond the range of F16.", hint="Use BF16 or F32.")
    data: memoryview = cast.reshape(-1).view(torch.uint8).numpy().data
    return data
