"""The tensors beside the text model of a model of images and text, which a conversion copies byte for byte."""

from __future__ import annotations

from dataclasses import replace

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.moe_layout import Copy, OutTensor
from ..words import plural, size


def in_files(model: DenseModel, tensors: tuple[OutTensor, ...]) -> tuple[OutTensor, ...]:
    """Return the tensors under their names in files, followed by the rest if the model is part of a larger one."""
    if model.part is None:
        return tensors
    rest = (OutTensor(n, i.shape, "other", Copy(n), dtype=i.dtype) for n, i in model.part.rest.items())
    return (*(replace(tensor, name=model.part.file_name(tensor.name)) for tensor in tensors), *rest)


def rest_bytes(model: DenseModel) -> int:
    """Return the bytes of the rest, which the costs of a plan do not count."""
    return sum(info.nbytes for info in model.part.rest.values()) if model.part else 0


def rest_notes(model: DenseModel) -> list[str]:
    """Return a remark on what is copied beside the text model."""
    if model.part is None:
        return []
    return [
        f"the text model of a {model.part.whole['model_type']} is converted; all else, {plural(len(model.part.rest), 'tensor')} "
        f"({size(rest_bytes(model))}), is copied byte for byte and not counted"
    ]
