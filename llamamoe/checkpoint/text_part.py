"""Read the text model inside a checkpoint of images (or sound) and text as a causal language model of its own.

Such a checkpoint holds a text model of any family, which gets embeddings, those of images among them, and returns hidden
states. Its tensors have Llama's names behind a prefix; all others (vision tower, projector) are the *rest*, which a
conversion copies byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..lazy import torch
from ..words import plural
from .base import Checkpoint, TensorInfo
from .locate import Location, open_checkpoint
from .reader import PROCESSOR_FILES, SafetensorsCheckpoint, check_side_file
from .tensor_names import EMBEDDING, HEAD, named_as_in_files
from .whole_pairs import LEFT_OUT, PAIRS, as_causal, outer_config

WRAPPERS = (
    "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "qwen2_audio", "smolvlm", "vipllava",
    "voxtral",
)  # fmt: skip
"""Model types whose class builds the text model by its ``text_config`` and only exchanges embeddings and hidden states."""
OF_SOUND = ("qwen2_audio", "voxtral")
"""Those that take sound in place of images."""
CONVERTED = tuple(sorted({*WRAPPERS, *PAIRS}))
"""Model types whose text model can be converted."""
_BODY = re.compile(r"language_model\.model\.|model\.language_model\.model\.|model\.(language|text)_model\.")
_OLDER = "language_model.model."
_TURNED = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")
_HEADS = (HEAD, f"language_model.{HEAD}")
_OF_ALL = ("auto_map", "quantization_config", "compression_config", "llamamoe")
"""Keys beside ``text_config`` that concern the text model, too."""


class TextPart(SafetensorsCheckpoint):
    """See `llamamoe.checkpoint.base.Checkpoint`; the rest is in `tensors`, too, under its own names.

    Attributes:
        whole: The folder's ``config.json``; ``config`` is that of the text model alone.
        rest: The tensors outside the text model.

    Args:
        path: The folder; see `is_whole`.

    Raises:
        CheckpointError: See `SafetensorsCheckpoint`; or two tensors have one name.
    """

    _carried = (*SafetensorsCheckpoint._carried, *PROCESSOR_FILES)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.whole: dict[str, Any] = self.config
        embedding = next(
            (n for n in self.tensors if n.endswith(EMBEDDING.removeprefix("model.")) and _BODY.match(n)), ""
        )
        found = _BODY.match(embedding)
        self._body = found[0] if found else _OLDER
        self.config: dict[str, Any] = as_causal(self.whole["text_config"]) | {
            k: self.whole[k] for k in _OF_ALL if k in self.whole
        }
        paired = self.whole["model_type"] not in WRAPPERS
        text: dict[str, TensorInfo] = {}
        rest: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            if name in _HEADS and HEAD in text:
                raise CheckpointError(f"the head of the text model is stored twice, under two names ({name!r}).")
            if name in _HEADS:
                text[HEAD] = info
            elif name.startswith(self._body):
                text[f"model.{name.removeprefix(self._body)}"] = info
            elif not (paired and name.startswith(LEFT_OUT)):
                rest[name] = info
        left = len(self.tensors) - len(text) - len(rest)
        if left:
            self.notes.append(
                f"left out: {plural(left, 'tensor')} for the prediction of further tokens ({LEFT_OUT}*), because their layer is dense, and "
                "the mixture's class would build it with experts"
            )
        inside = self._body == _OLDER and HEAD not in self.tensors
        self._head = _HEADS[1] if inside or _HEADS[1] in self.tensors else HEAD
        self._turned = {name for name, info in text.items() if self._is_turned(name, info)}
        turned = {
            n: replace(i, shape=(i.shape[0], i.shape[2], i.shape[1])) for n, i in text.items() if n in self._turned
        }
        self.tensors = (
            named_as_in_files({n: i for n, i in text.items() if n not in turned}, self.config) | turned | rest
        )
        self.rest: Mapping[str, TensorInfo] = rest
        self.config["tie_word_embeddings"] = HEAD not in self.tensors
        for file in PROCESSOR_FILES:
            if os.path.lexists(path / file):
                check_side_file(self._inside(file))

    def _is_turned(self, name: str, info: TensorInfo) -> bool:
        """Return whether a tensor holds all experts with rows and columns exchanged, as transformers decides it."""
        hidden, last = self.config.get("hidden_size"), -1 if name.endswith("gate_up_proj") else -2
        return bool(_TURNED.search(name)) and len(info.shape) == 3 and info.shape[last] != hidden

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """See `llamamoe.checkpoint.base.Checkpoint.read`."""
        found = super().read(name, rows)
        if name not in self._turned:
            return found
        count, first, second = found.shape
        return found.view(count, second, first).transpose(1, 2).contiguous()

    def text_name(self, name: str) -> str:
        """Return the canonical name of a tensor of the text model, from its name in files or in memory."""
        if name in _HEADS:
            return HEAD
        found = _BODY.match(name)
        return f"model.{name[found.end() :]}" if found else name

    @property
    def module(self) -> str:
        """Name of the text model's module in transformers 5, below ``model``."""
        return "text_model" if self._body == "model.text_model." else "language_model"

    def file_name(self, text_name: str) -> str:
        """Return the name in files of a tensor of the text model, or of one that a conversion puts in its place."""
        return self._head if text_name == HEAD else self._body + text_name.removeprefix("model.")

    def whole_config(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Return the folder's ``config.json`` with another text model."""
        changed = {"tie_word_embeddings": text["tie_word_embeddings"]}
        changed |= {key: text["torch_dtype"] for key in ("dtype", "torch_dtype") if key in self.whole}
        kept = {k: v for k, v in self.whole.items() if k not in ("llamamoe", "transformers_version")}
        return outer_config(kept, text) | changed


def is_whole(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is that of a model whose text model can be read by `TextPart`."""
    known = (*CONVERTED, *(pair.whole for pair in PAIRS.values()))
    return config.get("model_type") in known and isinstance(config.get("text_config"), Mapping)


def whole_hint(config: Mapping[str, Any], otherwise: str) -> str:
    """Return a hint for a command that does not support such a model, or the hint for any other."""
    commands = "split, verify, inspect, evaluate, report and bench"
    return (
        f"Of a model of images or sound and text, {commands} support the text model; train it with transformers' own Trainer."
        if is_whole(config)
        else otherwise
    )


def open_text(location: Location, **options: Any) -> Checkpoint:
    """Open a checkpoint (see `open_checkpoint`), of a model of images and text its text model.

    Raises:
        CheckpointError, UsageError: See `open_checkpoint`.
    """
    checkpoint = open_checkpoint(location, **options)
    return TextPart(location.path) if location.path.is_dir() and is_whole(checkpoint.config) else checkpoint
