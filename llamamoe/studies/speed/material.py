"""Temporary models for measuring speed: a dense one of random weights, and its conversions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import gettempdir

from ...architectures.dense_checkpoint import understand
from ...architectures.sources.base import canonical_shapes
from ...checkpoint.files import make_folder, save_tensors, unsynced, write_text
from ...checkpoint.gguf.reader import export_dense
from ...checkpoint.locate import locate, open_checkpoint
from ...checkpoint.reader import SINGLE, SafetensorsCheckpoint
from ...checkpoint.scratch import scratch_folder
from ...conversion.plan import SplitPlan, plan_split
from ...conversion.recipe import SplitRecipe
from ...conversion.sizes import QUANTISED_BLOCK
from ...errors import RefusedError
from ...lazy import torch
from .shapes import FfnShape, ModelShape

_SCALE = 0.02
_FACTORS = {"embed_tokens": 50.0, "o_proj": 0.125, "down_proj": 0.125}
"""Scale that lets the token dominate its hidden state, so that routers choose per token, with all experts alike."""
_BLOCK = 2**22
_CONVERSIONS = "conversions"
COPIES = 8
"""Maximum number of models on the disk, in sizes of the dense one: itself, its GGUF, three shapes, three pruned."""


class Material:
    """A dense model, and conversions of it, each made once, in a separate folder.

    Attributes:
        dense: The dense model's folder.
        work: Folder of all other files.
        block: Divisor of the number of shared neurons.
    """

    def __init__(self, dense: Path, work: Path, block: int = 1) -> None:
        self.dense, self.work, self.block = dense, work, block
        self._model = understand(SafetensorsCheckpoint(dense))

    def recipe(self, shape: FfnShape) -> SplitRecipe:
        """Return the recipe of a shape of this model."""
        return shape.recipe(self._model.spec, self.block)

    def plan(self, recipe: SplitRecipe) -> SplitPlan:
        """Return the plan of a conversion."""
        return plan_split(self._model, recipe)

    def convert(self, recipe: SplitRecipe, name: str) -> Path:
        """Return the folder of a conversion."""
        from ...conversion.split import split

        out = self.work / _CONVERSIONS / name
        make_folder(out.parent)
        with unsynced():
            return split(self.dense, out, recipe, verify=False).out

    def clear(self) -> None:
        """Delete the conversions and files made from them; the dense model stays."""
        shutil.rmtree(self.work / _CONVERSIONS, ignore_errors=True)


@contextmanager
def material(
    model: ModelShape | Path, folder: Path | None = None, *, tokenizer: str | Path | None = None
) -> Iterator[Material]:
    """Yield the dense model and a folder for its conversions; both and leftovers of killed runs are deleted.

    Args:
        model: A shape, made of random weights in bfloat16; or a dense model's folder or GGUF file, which is kept.
        folder: A folder on the disk to use; None: the system's folder of temporary files.
        tokenizer: For a GGUF file, a folder whose tokenizer is used instead of the one in the file.

    Raises:
        RefusedError: The disk has too little room.
    """
    _check_room(model, Path(gettempdir()) if folder is None else folder, tokenizer)
    with scratch_folder(folder) as work:
        if isinstance(model, ModelShape):
            dense = work / "dense"
            with unsynced():
                write_random(dense, model)
        else:
            dense = model
            if model.is_file():
                dense = work / "dense"
                export_dense(model, dense, tokenizer=tokenizer)
        yield Material(dense, work, QUANTISED_BLOCK if isinstance(model, ModelShape) else 1)


def _check_room(model: ModelShape | Path, folder: Path, tokenizer: str | Path | None) -> None:
    if isinstance(model, ModelShape):
        nbytes = 2 * sum(prod(shape) for shape in _shapes(model.config()).values())
    else:
        nbytes = sum(info.nbytes for info in open_checkpoint(locate(model), tokenizer=tokenizer).tensors.values())
    have, need = shutil.disk_usage(folder).free, COPIES * nbytes
    if have < need:
        raise RefusedError(
            f"models to measure speeds on take up to {need / 1e9:.1f} GB, but the disk of {folder} has {have / 1e9:.1f} GB free.",
            hint="Free some space, or let TMPDIR name a folder on another disk.",
        )


def write_random(folder: Path, shape: ModelShape) -> None:
    """Write a dense Llama of random weights and a tokenizer of bytes."""
    make_folder(folder)
    config = shape.config()
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "tokenizer.json", json.dumps(_tokenizer()) + "\n")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_text(
        folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}) + "\n"
    )
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(_BLOCK, generator=generator) * _SCALE).to(torch.bfloat16)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        out = torch.empty(shape, dtype=torch.bfloat16)
        factor = next((f for part, f in _FACTORS.items() if part in name), 1.0)
        scaled = block if factor == 1.0 else block * factor
        flat, at = out.view(-1), 0
        while at < flat.numel():  # pieces of one block, each from another offset: rows differ, at no cost
            start = int(torch.randint(_BLOCK // 2, (1,), generator=generator))
            count = min(flat.numel() - at, _BLOCK // 2)
            flat[at : at + count] = scaled[start : start + count]
            at += count
        return out

    save_tensors(
        folder / SINGLE, {name: values(name, size) for name, size in _shapes(config).items()}, {"format": "pt"}
    )


def _shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    from ...architectures.sources import SOURCES

    return canonical_shapes(SOURCES.get("llama")().spec(config))


def _tokenizer() -> dict[str, object]:
    """Return a tokenizer of single bytes, of llama.cpp's kind ``llama``, since its server requires a tokenizer."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"])}
    added = [
        {
            "id": i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(special)
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decode = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": replace,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decode},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocabulary, "merges": [],
        },
    }  # fmt: skip
