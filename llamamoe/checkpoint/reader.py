"""Open a folder of safetensors safely: all headers at once, tensors one at a time.

Nothing is unpickled, no code of the checkpoint runs, and no path leaves the folder. Files and tensor names are
chosen as transformers chooses them; a folder that it would read differently is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CheckpointError, printable
from ..lazy import torch
from .base import DTYPE_BYTES, TORCH_NAMES, TensorInfo
from .files import copy_file, make_folder
from .headers import read_header
from .json_files import MOST_BYTES, read_json
from .paths import check_link, inside, refuse_pointer
from .source_files import SourceFiles
from .tensor_names import named_as_in_files
from .tokenizer_ids import check_ids

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
"""PEFT's configuration of an adapter: transformers applies the adapter silently if it can."""
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
)
"""Files from which transformers reads a vocabulary."""
SIDE_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files from which transformers reads the image processor of a model of images and text."""
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of further chat templates."""
PICKLES = (".bin", ".pt", ".pth")
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_WATCHED = (
    "config.json", ADAPTER, SINGLE, INDEX, "README.md", CHAT_TEMPLATES, *SIDE_FILES, *PROCESSOR_FILES, *LICENSE_FILES,
)  # fmt: skip
"""Files beside the weights that change the result if they change or appear while a folder is read."""


def read_weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor, from an index.

    Raises:
        CheckpointError: The index is broken.
    """
    index = read_json(path)
    if not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{INDEX}: 'metadata' must be a mapping: transformers refuses it.")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{INDEX} has no usable 'weight_map'.")
    return weight_map


def check_side_file(path: Path) -> None:
    """Refuse a file beside the weights that is not regular, too large, a pointer or not JSON.

    Raises:
        CheckpointError: The file is one of these.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name} is not a regular file.", hint="Copy the file itself into the folder.")
    if path.stat().st_size > MOST_BYTES:
        raise CheckpointError(f"{path.name} has {path.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read.")
    with path.open("rb") as file:
        refuse_pointer(path, file.read(64))
    if path.suffix == ".json" and path.name != "chat_template.json":
        data = read_json(path, vocabulary=path.name in VOCABULARIES)
        if path.name in VOCABULARIES:
            check_ids(path, data)


def check_side_files(folder: Path) -> None:
    """Check all existing files beside the weights of a folder; see `check_side_file`.

    Raises:
        CheckpointError: A file is invalid, or a link out of the folder.
    """
    for name in (*SIDE_FILES, *LICENSE_FILES):
        if os.path.lexists(folder / name):
            check_side_file(inside(folder, name))


def pickle_refusal(where: str, name: str) -> CheckpointError:
    """Return the refusal of weights that only pickle can read."""
    return CheckpointError(
        f"{where} stores its weights as pickle ({printable(name)}), which can run code when it is read: refused.",
        hint="Convert it once with: AutoModelForCausalLM.from_pretrained(PATH, weights_only=True).save_pretrained(NEW)",
    )


def refuse_tokenizer_code(folder: Path) -> None:
    """Refuse a folder whose tokenizer has its own code.

    Raises:
        CheckpointError: Its tokenizer_config.json has an 'auto_map', or cannot be read.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file() and read_json(path).get("auto_map"):
        raise CheckpointError(
            "tokenizer_config.json has an 'auto_map': the tokenizer brings its own code, which is never run.",
            hint="Save it as one of transformers' own tokenizers first.",
        )


class SafetensorsCheckpoint:
    """See `llamamoe.checkpoint.base.Checkpoint`.

    Args:
        path: The folder.

    Raises:
        CheckpointError: A file is missing, broken or unsafe; see the message.
    """

    _carried: ClassVar[tuple[str, ...]] = (*SIDE_FILES, *LICENSE_FILES)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._refuse_adapter()
        if not (path / "config.json").exists():
            raise CheckpointError(
                f"{path} holds no config.json, so it is not a transformers checkpoint.", hint=self._what_is_there()
            )
        self._files = SourceFiles()
        self._files.watch(*(path / name for name in _WATCHED))
        self.config = read_json(self._inside("config.json"))
        if not isinstance(self.config.get("llamamoe") or {}, dict):
            raise CheckpointError(f"config.json: llamamoe = {self.config['llamamoe']!r}, but it must be a mapping.")
        if not isinstance(self.config.get("model_type", ""), str):
            raise CheckpointError(f"config.json: model_type = {self.config['model_type']!r}, but it must be a name.")
        self._refuse_other_file()
        stored: dict[str, TensorInfo] = {}
        for name in self._shards():
            file = self._inside(name)
            self._files.watch(file)
            self._add(stored, read_header(file))
        self.tensors: Mapping[str, TensorInfo] = named_as_in_files(stored, self.config)
        self._check_index(stored)
        check_side_files(path)
        self._files.watch(*self._templates())

    def _refuse_adapter(self) -> None:
        if not (self.path / ADAPTER).exists():
            return
        hint = "Merge it first: AutoPeftModelForCausalLM.from_pretrained(PATH).merge_and_unload().save_pretrained(NEW)"
        if (self.path / "config.json").exists():
            raise CheckpointError(
                f"{self.path} contains a PEFT adapter ({ADAPTER}) beside a model: transformers would apply it, but "
                "only the model can be read.",
                hint=f"{hint}, or move {ADAPTER} away if the adapter is already merged or not needed.",
            )
        base = read_json(self._inside(ADAPTER)).get("base_model_name_or_path")
        of = f" of {printable(base)}" if isinstance(base, str) and base else ""
        raise CheckpointError(
            f"{self.path} contains a PEFT adapter{of}, not a model: its weights are only differences.", hint=f"{hint}."
        )

    def _refuse_other_file(self) -> None:
        other = self.config.get("transformers_weights")
        if other is not None:
            raise CheckpointError(
                f"config.json: transformers_weights = {other!r}: transformers takes the weights from that file, which "
                "is not supported.",
                hint="Load the folder with transformers and save it again.",
            )

    def _what_is_there(self) -> str:
        found = sorted(printable(p.name) for p in self.path.iterdir())
        gguf = next((f for f in found if f.endswith(".gguf")), None)
        if gguf:
            return f"To convert a GGUF file, name the file itself: {self.path / gguf}"
        models = [f for f in found if (self.path / f / "config.json").is_file()]
        if models:
            return f"Did you mean {' or '.join(repr(str(self.path / f)) for f in models[:3])}?"
        return f"It holds: {', '.join(found[:6]) or 'nothing'}."

    def _inside(self, name: str) -> Path:
        return inside(self.path, name)

    def _shards(self) -> list[str]:
        self._weight_map: dict[str, str] = {}
        if (self.path / SINGLE).exists():  # before the index, as transformers does
            if (self.path / INDEX).exists():
                self.notes.append(f"{SINGLE} is read, as transformers does, and not the files that {INDEX} names")
            return [SINGLE]
        if (self.path / INDEX).exists():
            self._weight_map = read_weight_map(self._inside(INDEX))
            return sorted(set(self._weight_map.values()))
        pickles = sorted(p.name for p in self.path.iterdir() if p.name.endswith(PICKLES))
        if pickles:
            raise pickle_refusal(str(self.path), pickles[0])
        raise CheckpointError(f"{self.path} holds neither {SINGLE} nor {INDEX}.", hint=self._what_is_there())

    @staticmethod
    def _add(stored: dict[str, TensorInfo], header: dict[str, TensorInfo]) -> None:
        for name, info in header.items():
            if name in stored:
                raise CheckpointError(
                    f"the tensor {name!r} is stored in {stored[name].file.name} and again in {info.file.name}."
                )
            stored[name] = info

    def _check_index(self, stored: Mapping[str, TensorInfo]) -> None:
        for name, file in self._weight_map.items():
            info = stored.get(name, self.tensors.get(name))  # by the usual name while files are being renamed
            if info is None or info.file.name != file:
                raise CheckpointError(f"{INDEX} places {name!r} in {file}, which does not contain it.")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """See `Checkpoint.read`."""
        info = self.tensors[name]
        shape, offset = info.shape, info.offset
        if rows is not None:
            first, stop = rows
            offset += first * (info.nbytes // max(1, info.shape[0]))
            shape = (stop - first, *info.shape[1:])
        nbytes = prod(shape) * DTYPE_BYTES[info.dtype]
        data = torch.from_numpy(self._files.read(info.file, offset, nbytes))
        return data.view(getattr(torch, TORCH_NAMES[info.dtype])).reshape(shape)

    def save_tokenizer(self, out: Path) -> list[str]:
        """See `Checkpoint.save_tokenizer`; licence files are copied too."""
        copied = []
        for name in self._carried:
            if (self.path / name).is_file():
                copy_file(self._inside(name), out / name)
                copied.append(name)
        for path in self._templates():
            make_folder(out / CHAT_TEMPLATES)
            copy_file(path, out / CHAT_TEMPLATES / path.name)
            copied.append(f"{CHAT_TEMPLATES}/{path.name}")
        return copied

    def _templates(self) -> list[Path]:
        """Return further chat templates, each a regular file inside the folder."""
        folder = self.path / CHAT_TEMPLATES
        if not folder.is_dir():
            return []
        if folder.is_symlink():
            raise CheckpointError(f"{CHAT_TEMPLATES} is a symbolic link: refused.", hint="Copy the folder itself.")
        found = []
        for path in sorted(folder.glob("*.jinja")):
            check_link(path, self.path)
            check_side_file(path)
            found.append(path)
        return found

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        facts: list[Any] = [[n, i.dtype, i.shape, i.file.name] for n, i in sorted(self.tensors.items())]
        facts += self._files.facts({info.file for info in self.tensors.values()})
        facts.append(self.config)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """See `Checkpoint.check_unchanged`."""
        self._files.check_unchanged()
