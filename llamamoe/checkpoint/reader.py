"""A folder of safetensors, opened safely: headers at once, tensors one at a time, memory-mapped.

Nothing is unpickled, no code of the checkpoint runs, and no path leaves the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..plain_text import printable
from .base import TensorInfo
from .files import copy_file, make_folder
from .headers import read_header
from .json_files import MOST_BYTES, read_json
from .paths import inside

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
"""Files in which transformers finds a vocabulary."""
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
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of further chat templates."""
PICKLES = (".bin", ".pt", ".pth")
_POINTER = b"version https://git-lfs"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor to file, from an index.

    Raises:
        CheckpointError: The index is broken.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{INDEX} has no usable 'weight_map'.")
    return weight_map


def check_side_file(path: Path) -> None:
    """Refuse a file beside the weights that cannot be what it is called: no regular file, too large, a pointer, no JSON.

    Raises:
        CheckpointError: It is one of these.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name} is not a regular file.", hint="Copy the file itself into the folder.")
    if path.stat().st_size > MOST_BYTES:
        raise CheckpointError(f"{path.name} has {path.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read.")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path.name} is a pointer of git LFS, not the file itself.",
                hint="Fetch it in that folder: git lfs pull",
            )
    if path.suffix == ".json" and path.name != "chat_template.json":
        read_json(path, vocabulary=path.name in VOCABULARIES)


def pickle_refusal(where: str, name: str) -> CheckpointError:
    """The refusal of weights that only pickle can read."""
    return CheckpointError(
        f"{where} holds its weights as pickle ({printable(name)}), which can run code when it is read: refused.",
        hint="Convert it once with: AutoModelForCausalLM.from_pretrained(PATH, weights_only=True).save_pretrained(NEW)",
    )


def refuse_tokenizer_code(folder: Path) -> None:
    """Refuse a folder whose tokenizer brings its own code.

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
        CheckpointError: Something is missing, broken or unsafe; see the message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        if not (path / "config.json").exists():
            raise CheckpointError(
                f"{path} holds no config.json, so it is no transformers checkpoint.", hint=self._what_is_there()
            )
        self.config = read_json(self._inside("config.json"))
        self._tensors: dict[str, TensorInfo] = {}
        self.tensors: Mapping[str, TensorInfo] = self._tensors
        for name in self._shards():
            self._add(read_header(self._inside(name)))
        self._check_index()
        for name in (*SIDE_FILES, *LICENSE_FILES):
            if (path / name).exists() or (path / name).is_symlink():
                check_side_file(self._inside(name))
        self._templates()
        self._open: dict[Path, Any] = {}

    def _what_is_there(self) -> str:
        found = sorted(printable(p.name) for p in self.path.iterdir())
        gguf = next((f for f in found if f.endswith(".gguf")), None)
        if gguf:
            return f"To convert a GGUF file, name the file itself: {self.path / gguf}"
        return f"It holds: {', '.join(found[:6]) or 'nothing'}."

    def _inside(self, name: str) -> Path:
        return inside(self.path, name)

    def _shards(self) -> list[str]:
        if (self.path / INDEX).exists():
            self._weight_map: dict[str, str] | None = read_weight_map(self._inside(INDEX))
            return sorted(set(self._weight_map.values()))
        self._weight_map = None
        if (self.path / SINGLE).exists():
            return [SINGLE]
        pickles = sorted(p.name for p in self.path.iterdir() if p.name.endswith(PICKLES))
        if pickles:
            raise pickle_refusal(str(self.path), pickles[0])
        raise CheckpointError(f"{self.path} holds neither {SINGLE} nor {INDEX}.", hint=self._what_is_there())

    def _add(self, header: dict[str, TensorInfo]) -> None:
        for name, info in header.items():
            if name in self._tensors:
                raise CheckpointError(
                    f"the tensor {name!r} stands in {self.tensors[name].file.name} and again in {info.file.name}."
                )
            self._tensors[name] = info

    def _check_index(self) -> None:
        for name, file in (self._weight_map or {}).items():
            info = self.tensors.get(name)
            if info is None or info.file.name != file:
                raise CheckpointError(f"{INDEX} says that {name!r} stands in {file}, but it does not.")

    def read(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped: its pages belong to the file, not to this process. Never write to it."""
        from safetensors import safe_open

        path = self.tensors[name].file
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor

    def save_tokenizer(self, out: Path) -> list[str]:
        """See `Checkpoint.save_tokenizer`; licence files are copied too."""
        copied = []
        for name in (*SIDE_FILES, *LICENSE_FILES):
            if (self.path / name).is_file():
                copy_file(self._inside(name), out / name)
                copied.append(name)
        for path in self._templates():
            make_folder(out / CHAT_TEMPLATES)
            copy_file(path, out / CHAT_TEMPLATES / path.name)
            copied.append(f"{CHAT_TEMPLATES}/{path.name}")
        return copied

    def _templates(self) -> list[Path]:
        """Further chat templates, each a regular file inside the folder."""
        folder = self.path / CHAT_TEMPLATES
        if not folder.is_dir():
            return []
        if folder.is_symlink():
            raise CheckpointError(f"{CHAT_TEMPLATES} is a symbolic link: refused.", hint="Copy the folder itself.")
        found = []
        for path in sorted(folder.glob("*.jinja")):
            roots = [self.path.resolve()]
            if roots[0].parent.name == "snapshots":
                roots.append(roots[0].parent.parent / "blobs")
            if not any(path.resolve().is_relative_to(root) for root in roots):
                raise CheckpointError(f"{path} is a symbolic link out of the folder: refused.", hint="Copy the file.")
            check_side_file(path)
            found.append(path)
        return found

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        facts: list[Any] = [[n, i.dtype, i.shape, i.file.name] for n, i in sorted(self.tensors.items())]
        facts += [
            [f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted({i.file for i in self.tensors.values()})
        ]
        facts.append(self.config)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
